"""Real S3 servers for tests, on this machine: OpenStack Swift (from PyPI) and, where its binary is, MinIO."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from minio import Minio
from minio.error import MinioException
from urllib3.exceptions import HTTPError

ROOT = Path(__file__).resolve().parent.parent
STARTING = 180.0  # seconds a server may take to answer

SWIFT_CONF = """[swift-hash]
swift_hash_path_suffix = tests
[storage-policy:0]
name = Policy-0
default = yes
"""
COMMON_CONF = """[DEFAULT]
swift_dir = {folder}
devices = {folder}/devices
mount_check = false
fallocate_reserve = 0
[pipeline:main]
pipeline = {pipeline}
"""
PROXY_CONF = """
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
[filter:tempauth]
use = egg:swift#tempauth
user_test_tester = testing-secret .admin
[filter:s3api]
use = egg:swift#s3api
location = us-east-1
"""
BACKENDS = ("account", "container", "object")
FILTERS = ("catch_errors", "listing_formats", "s3api", "tempauth", "copy", "slo")


@dataclass
class Server:
    """A running S3 server; `kill` and `start` again use the same port and data."""

    name: str
    port: int
    access: str
    secret: str
    command: list[str]  # the process that answers on `port`
    variables: dict[str, str]
    log: Path
    process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        """Its URL."""
        return f"http://127.0.0.1:{self.port}"

    def environment(self) -> dict[str, str]:
        """What a client has to have in its environment."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_REGION": "us-east-1",
        }

    def start(self) -> None:
        """Start it and wait until it answers."""
        self.process = spawn(self.command, self.variables, self.log)
        wait_for(self.endpoint, self.process, self.log)
        self._wait_for_keys()

    def make_bucket(self, name: str) -> None:
        """Create an empty bucket."""
        self._client().make_bucket(name)

    def _client(self) -> Minio:
        return Minio(self.endpoint.removeprefix("http://"), self.access, self.secret, secure=False)

    def _wait_for_keys(self) -> None:
        """Wait until it knows its keys: MinIO refuses strangers earlier than it serves its users."""
        until = time.monotonic() + STARTING
        while True:
            try:
                self._client().bucket_exists(f"no-{uuid.uuid4().hex}")
                return
            except (MinioException, HTTPError):
                if time.monotonic() > until:
                    raise
            time.sleep(0.1)

    def kill(self) -> None:
        """End it as a power cut would."""
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


def minio_binary() -> str:
    """Path of a MinIO server binary, or an empty string."""
    places = [os.environ.get("DISTILLERY_MINIO", ""), str(ROOT / ".tools" / "bin" / "minio")]
    return next((p for p in places if p and os.access(p, os.X_OK)), shutil.which("minio") or "")


def available() -> list[str]:
    """Names of the servers that can be started here."""
    return ["swift", "minio"] if minio_binary() else ["swift"]


@contextmanager
def running(name: str, folder: Path) -> Iterator[Server]:
    """A server with its data in `folder`, stopped at the end."""
    folder.mkdir(parents=True, exist_ok=True)
    server = {"swift": swift, "minio": minio}[name](folder)
    try:
        server.start()
        yield server
    finally:
        server.kill()


def minio(folder: Path) -> Server:
    """MinIO with one drive."""
    port, access, secret = free_port(), "tester", "testing-secret"
    variables = {"MINIO_ROOT_USER": access, "MINIO_ROOT_PASSWORD": secret, "HOME": str(folder)}
    command = [minio_binary(), "server", str(folder / "data"), "--address", f"127.0.0.1:{port}", "--quiet"]
    return Server("minio", port, access, secret, command, variables, folder / "minio.log")


def swift(folder: Path) -> Server:
    """Swift with one device: account, container and object servers and a proxy that speaks S3, in one process."""
    (folder / "swift.conf").write_text(SWIFT_CONF)
    ports = free_ports(len(BACKENDS) + 1)
    for name in BACKENDS:
        text = COMMON_CONF.format(folder=folder, pipeline=f"{name}-server")
        (folder / f"{name}.conf").write_text(f"{text}[app:{name}-server]\nuse = egg:swift#{name}\n")
    text = COMMON_CONF.format(folder=folder, pipeline=" ".join((*FILTERS, "proxy-server"))) + PROXY_CONF
    plain = "".join(f"[filter:{name}]\nuse = egg:swift#{name}\n" for name in FILTERS if f":{name}]" not in text)
    (folder / "proxy.conf").write_text(text + plain)
    command = [sys.executable, str(Path(__file__).resolve()), str(folder), *map(str, ports)]
    return Server("swift", ports[-1], "test:tester", "testing-secret", command, {}, folder / "swift.log")


def serve_swift(folder: Path, ports: list[int]) -> None:
    """Run Swift in this process until it is killed."""
    import eventlet
    import eventlet.wsgi
    from swift.common import utils, wsgi
    from swift.common.ring import RingBuilder

    utils.set_swift_dir(str(folder))
    utils.monkey_patch()
    for name, port in zip(BACKENDS, ports, strict=False):
        (folder / "devices" / name).mkdir(parents=True, exist_ok=True)
        builder = RingBuilder(2, 1, 0)  # 2**2 partitions, one replica
        device = {"region": 1, "zone": 1, "ip": "127.0.0.1", "port": port, "device": name, "weight": 1}
        builder.add_dev(device | {"replication_ip": "127.0.0.1", "replication_port": port})
        builder.rebalance()
        builder.get_ring().save(str(folder / f"{name}.ring.gz"))
    for name, port in zip((*BACKENDS, "proxy"), ports, strict=True):
        app = wsgi.loadapp(str(folder / f"{name}.conf"), {"log_name": name})
        door = eventlet.listen(("127.0.0.1", port))
        options = {"protocol": wsgi.SwiftHttpProtocol, "capitalize_response_headers": False}  # clients need "ETag"
        eventlet.spawn(eventlet.wsgi.server, door, app, utils.NullLogger(), **options)
    while True:
        eventlet.sleep(3600)


def spawn(command: list[str], variables: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    """Start a process whose output goes to a file."""
    with log.open("ab") as out:
        return subprocess.Popen(command, env=os.environ | variables, stdout=out, stderr=out)


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until something answers HTTP there."""
    until = time.monotonic() + STARTING
    while time.monotonic() < until:
        try:
            urllib.request.urlopen(url, timeout=2).close()
        except urllib.error.HTTPError as error:
            error.close()
            if error.code < 500:
                return
        except OSError:
            pass
        else:
            return
        assert process.poll() is None, f"the server ended: {log.read_text()[-2000:]}"
        time.sleep(0.1)
    raise TimeoutError(f"{url} did not answer: {log.read_text()[-2000:]}")


def free_ports(count: int) -> list[int]:
    """Different ports that nobody uses just now."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


def free_port() -> int:
    """A port nobody uses just now."""
    return free_ports(1)[0]


if __name__ == "__main__":
    serve_swift(Path(sys.argv[1]), [int(port) for port in sys.argv[2:]])
