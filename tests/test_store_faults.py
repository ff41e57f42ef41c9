"""The store against real servers behind a bad line, full, shut, overloaded, expired or replaced.

Each time: it completes after the fault, or there is one clear error; nobody accepts half an artifact or waits for ever.
"""

import base64
import hashlib
import hmac
import json
import os
import socket
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import _servers
import minio.time
import pytest
from _artifacts import make, raises_quickly
from _faulty_proxy import Line, faulty
from _servers import Server, available, minio_binary
from minio import Minio
from minio.credentials import AssumeRoleProvider

from distillery import artifact
from distillery.artifact import MANIFEST, Manifest
from distillery.errors import CorruptArtifact, StoreError, UserError
from distillery.store import Store, _lease, _patience, check_access, open_store

MIB = 1 << 20
BIG = 35 * MIB + 5  # three parts
needs_minio = pytest.mark.skipif(not minio_binary(), reason="needs the MinIO server: make minio")


@pytest.fixture(params=available())
def server(request: pytest.FixtureRequest, servers: Callable[[str], Server], monkeypatch: pytest.MonkeyPatch) -> Server:
    """A running server that the environment points to; the patience is for tests."""
    found = servers(request.param)
    use(found, monkeypatch)
    return found


@pytest.fixture
def bucket(server: Server) -> str:
    """URI of a new bucket."""
    return new_bucket(server)


MINIO, SWIFT = pytest.param("minio", marks=needs_minio), pytest.param("swift", marks=pytest.mark.slow)
only_minio = pytest.mark.parametrize("server", [MINIO], indirect=True)
swift_slowly = pytest.mark.parametrize("server", [MINIO, SWIFT], indirect=True)


def use(server: Server, monkeypatch: pytest.MonkeyPatch, **others: str) -> None:
    """Point the environment to a server; `others` replace variables."""
    for name, value in (server.environment() | {"DISTILLERY_STORE_TIMEOUT": "100"} | others).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(_patience, "LONGEST_PAUSE", 0.5)


def new_bucket(server: Server) -> str:
    """URI of a new bucket."""
    name = f"b-{uuid.uuid4().hex}"
    server.make_bucket(name)
    return f"s3://{name}"


@contextmanager
def behind(server: Server, monkeypatch: pytest.MonkeyPatch, line: Line) -> Iterator[Line]:
    """The environment points to the server behind that line."""
    with faulty(server.port, line) as port, monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        yield line


def sample(folder: Path, big: int = BIG, small: int = 10) -> Manifest:
    """An artifact of one file in parts and some small ones."""
    return make(folder, {f"small{i}": os.urandom(1000) for i in range(small)} | {"big": os.urandom(big)})


def finished(folder: Path, manifest: Manifest) -> bool:
    """Whether the whole artifact is there."""
    return artifact.read(folder).fingerprint == manifest.fingerprint


def no_half(store: Store, prefix: str, folder: Path) -> None:
    """Assert that a reader takes neither what is in the store nor what is in the folder."""
    with pytest.raises(CorruptArtifact, match=MANIFEST):
        store.pull(prefix, folder / "reader")
    assert not artifact.is_finished(folder)


def test_a_slow_line_that_resets_connections_costs_time_only(
    server: Server, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = sample(tmp_path / "a")
    for move in ("push", "pull"):
        line = Line(latency=0.0005, bandwidth=60 * MIB, reset_after=5 * MIB, left=4)
        with behind(server, monkeypatch, line):
            getattr(open_store(bucket), move)(*((tmp_path / "a", "x") if move == "push" else ("x", tmp_path / "b")))
        assert line.faults == 4
    assert finished(tmp_path / "b", manifest)


def test_a_download_closed_politely_in_the_middle_goes_on(
    server: Server, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = sample(tmp_path / "a")
    open_store(bucket).push(tmp_path / "a", "x")
    with behind(server, monkeypatch, Line(close_after=5 * MIB, left=4)) as line:
        open_store(bucket).pull("x", tmp_path / "b")
    assert line.faults == 4
    assert line.passed < 1.5 * BIG, "what had come was asked for again"
    assert finished(tmp_path / "b", manifest)


@swift_slowly
def test_a_line_that_falls_silent_is_given_up_in_time(
    server: Server, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = sample(tmp_path / "a")
    with behind(server, monkeypatch, Line(silent_after=8 * MIB)), monkeypatch.context() as patch:
        patch.setenv("DISTILLERY_STORE_TIMEOUT", "2")
        act = lambda: open_store(bucket).push(tmp_path / "a", "x")  # noqa: E731 - it is timed
        raises_quickly(act, StoreError, "'x/", "within 2 s", "timed out", "DISTILLERY_STORE_TIMEOUT")
    no_half(open_store(bucket), "x", tmp_path / "b")
    open_store(bucket).push(tmp_path / "a", "x")
    with behind(server, monkeypatch, Line(silent_after=8 * MIB)), monkeypatch.context() as patch:
        patch.setenv("DISTILLERY_STORE_TIMEOUT", "2")
        act = lambda: open_store(bucket).pull("x", tmp_path / "b")  # noqa: E731 - it is timed
        raises_quickly(act, StoreError, "'x/", "within 2 s", "timed out", "DISTILLERY_STORE_TIMEOUT")
    assert not artifact.is_finished(tmp_path / "b")
    assert not list((tmp_path / "b").glob("*.part"))
    open_store(bucket).pull("x", tmp_path / "b")
    assert finished(tmp_path / "b", manifest)


@swift_slowly
def test_silence_that_ends_is_waited_for(
    server: Server, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = sample(tmp_path / "a")
    monkeypatch.setenv("DISTILLERY_STORE_TIMEOUT", "8")
    for move in ("push", "pull"):
        with behind(server, monkeypatch, Line(silent_after=8 * MIB)) as line:
            heal = threading.Timer(1, lambda line=line: setattr(line, "silent_after", -1))
            heal.start()
            getattr(open_store(bucket), move)(*((tmp_path / "a", "x") if move == "push" else ("x", tmp_path / "b")))
            assert heal.finished.is_set(), "the line was not silent in the middle"
    assert finished(tmp_path / "b", manifest)


def test_a_name_that_does_not_resolve_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"ENDPOINT_URL": "http://no-such-host.invalid:9000", "REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b" * 8)
    monkeypatch.setenv("DISTILLERY_STORE_TIMEOUT", "1")
    raises_quickly(
        lambda: open_store("s3://bucket/x").read("k"),
        StoreError,
        "no-such-host.invalid",
        "resolve",
        "'x/k'",
        seconds=30,
    )


@only_minio
def test_an_upload_whose_last_answer_is_lost_is_not_sent_again(
    server: Server, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = os.urandom(BIG)
    (tmp_path / "big").write_bytes(data)
    with behind(server, monkeypatch, Line(swallow=b"?uploadId=")) as line:
        open_store(bucket).put("big", tmp_path / "big")
    assert line.faults == 1
    assert line.passed < 1.5 * BIG
    assert open_store(bucket).read("big") == data


@only_minio
def test_a_lock_taken_without_hearing_so_is_held(server: Server, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_lease, "SETTLE", 0.1)
    start = time.monotonic()
    with behind(server, monkeypatch, Line(swallow=b"If-None-Match")) as line, open_store(bucket).hold("run"):
        assert line.faults == 1
        assert time.monotonic() - start < _lease.STALE / 2, "it waited for itself"


@only_minio
def test_an_object_replaced_under_a_reader_is_never_mixed(
    server: Server, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, versions = open_store(bucket), [os.urandom(BIG), os.urandom(BIG - 3 * MIB)]
    for expected in ("", hashlib.sha256(versions[0]).hexdigest()):
        store.write("x", versions[0])
        with behind(server, monkeypatch, Line(bandwidth=2 * MIB)) as line:
            reader = open_store(bucket)

            def replace(line: Line = line) -> None:
                while line.passed < 6 * MIB:
                    time.sleep(0.01)
                line.reset_after, line.left = 1, -1  # or it may be read to the end as it was before this one is there
                store.write("x", versions[1])
                line.left, line.bandwidth = 0, 0

            writer = threading.Thread(target=replace)
            writer.start()
            if expected:
                with pytest.raises(CorruptArtifact, match="x has sha256"):
                    reader.fetch("x", tmp_path / "checked", expected)
                assert not (tmp_path / "checked").exists()
            else:
                reader.fetch("x", tmp_path / "x")
                assert (tmp_path / "x").read_bytes() == versions[1]
            writer.join()
            assert line.passed > BIG + 3 * MIB, "it was replaced too late"


@swift_slowly
def test_a_server_killed_among_the_parts_of_a_file_is_survived(
    server: Server, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = sample(tmp_path / "a")
    for move in ("push", "pull"):
        with behind(server, monkeypatch, Line(bandwidth=16 * MIB)) as line:
            killed, killer = kill_once(server, line, 8 * MIB)
            getattr(open_store(bucket), move)(*((tmp_path / "a", "x") if move == "push" else ("x", tmp_path / "b")))
            assert killed.is_set(), "the server was not killed in the middle"
            killer.join()
    assert finished(tmp_path / "b", manifest)


def kill_once(server: Server, line: Line, after: int) -> tuple[threading.Event, threading.Thread]:
    """Kill the server when that many bytes have passed, and start it again a second later; whether, and who does it."""
    killed = threading.Event()

    def work() -> None:
        while line.passed < after:
            time.sleep(0.01)
        server.kill()
        killed.set()
        time.sleep(1)
        line.bandwidth = 0
        server.start()

    killer = threading.Thread(target=work, daemon=True)
    killer.start()
    return killed, killer


@pytest.mark.slow
@only_minio
def test_a_server_killed_again_and_again_is_survived(
    server: Server, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, done = sample(tmp_path / "a", 400 * MIB, 200), threading.Event()
    kills = []
    monkeypatch.setenv("DISTILLERY_STORE_TIMEOUT", "90")

    def torment() -> None:
        while not done.wait(2.5 + os.urandom(1)[0] / 256):  # a part passes in less on a machine that is not busy
            server.kill()
            kills.append(time.monotonic())
            server.start()

    for move in ("push", "pull"):
        with behind(server, monkeypatch, Line(bandwidth=16 * MIB)):
            done.clear()
            tormentor = threading.Thread(target=torment)
            tormentor.start()
            try:
                getattr(open_store(bucket), move)(*((tmp_path / "a", "x") if move == "push" else ("x", tmp_path / "b")))
            finally:
                done.set()
                tormentor.join()
    assert len(kills) >= 2
    assert finished(tmp_path / "b", manifest)


@needs_minio
def test_a_server_that_asks_for_fewer_requests_gets_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with variant(tmp_path, {"MINIO_API_REQUESTS_MAX": "1"}) as server:
        use(server, monkeypatch)
        bucket = new_bucket(server)
        manifest = sample(tmp_path / "a", small=40)
        refused = count_refusals(monkeypatch)
        open_store(bucket).push(tmp_path / "a", "x")
        assert refused, "the server took everything"
        open_store(bucket).pull("x", tmp_path / "b")
    assert finished(tmp_path / "b", manifest)


def count_refusals(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The answers from now on that say "later"."""
    found: list[str] = []
    complaint = _patience._complaint

    def noted(answer: Any) -> str:
        cause = complaint(answer)
        found.extend([cause] if cause else [])
        return cause

    monkeypatch.setattr(_patience, "_complaint", noted)
    return found


@contextmanager
def variant(folder: Path, variables: dict[str, str], *arguments: str) -> Iterator[Server]:
    """A MinIO of its own with other settings."""
    folder = folder / "minio"
    folder.mkdir()
    server = _servers.minio(folder)
    server.variables |= variables
    server.command += arguments
    try:
        server.start()
        yield server
    finally:
        if server.process is not None:
            server.kill()


READ = {"Effect": "Allow", "Action": ["s3:GetObject", "s3:ListBucket", "s3:GetBucketLocation"], "Resource": "*"}
WRITE = {"Effect": "Allow", "Action": ["s3:PutObject"], "Resource": "*"}


def become(server: Server, monkeypatch: pytest.MonkeyPatch, *allowed: dict[str, Any]) -> str:
    """Use temporary keys that may do just that; gives their token."""
    policy = json.dumps({"Version": "2012-10-17", "Statement": allowed})
    found = AssumeRoleProvider(
        sts_endpoint=server.endpoint, access_key=server.access, secret_key=server.secret, policy=policy
    ).retrieve()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", found.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", found.secret_key)
    monkeypatch.setenv("AWS_SESSION_TOKEN", found.session_token or "")
    return found.session_token or ""


@only_minio
def test_a_place_that_may_be_read_but_not_written(
    server: Server, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, changed = sample(tmp_path / "a", 1000), sample(tmp_path / "c")
    open_store(bucket).push(tmp_path / "a", "x")
    become(server, monkeypatch, READ)
    store, named = open_store(bucket), (server.endpoint, "AccessDenied", "they may not do that", "put")
    store.pull("x", tmp_path / "b")
    assert finished(tmp_path / "b", manifest)
    store.push(tmp_path / "a", "x")  # it is there, so there is nothing to write
    for act in (
        lambda: check_access(bucket),
        lambda: store.push(tmp_path / "c", "y"),
        lambda: store.push(tmp_path / "c", "x"),
        lambda: store.put("big", tmp_path / "c" / "big"),
        lambda: store.hold("run").__enter__(),
    ):
        raises_quickly(act, UserError, *named)
    assert store.pull("x", tmp_path / "b").fingerprint != changed.fingerprint
    no_half(store, "y", tmp_path / "d")


@only_minio
def test_a_place_that_may_be_written_but_not_read(server: Server, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    open_store(bucket).write("x", b"data")
    become(server, monkeypatch, WRITE)
    for act in (lambda: open_store(bucket).read("x"), lambda: open_store(bucket).list(), lambda: check_access(bucket)):
        raises_quickly(act, UserError, server.endpoint, "AccessDenied", "list the bucket and to get")


@only_minio
def test_expired_keys_are_named(server: Server, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token = become(server, monkeypatch, READ, WRITE)
    open_store(bucket).write("x", b"they are good")
    monkeypatch.setenv("AWS_SESSION_TOKEN", expired(token, server.secret))
    manifest = sample(tmp_path / "a", 1000)
    assert manifest.files
    for act in (
        lambda: open_store(bucket).read("x"),
        lambda: open_store(bucket).push(tmp_path / "a", "x"),
        lambda: check_access(bucket),
    ):
        raises_quickly(act, UserError, server.endpoint, "expired", "AWS_SESSION_TOKEN")


def expired(token: str, secret: str) -> str:
    """The same session token as it would be if it had ended an hour ago (MinIO signs them with its root's secret)."""

    def encode(data: bytes) -> str:
        return base64.urlsafe_b64encode(data).rstrip(b"=").decode()

    header, claims, _ = token.split(".")
    said = json.loads(base64.urlsafe_b64decode(claims + "=" * (-len(claims) % 4)))
    signed = f"{header}.{encode(json.dumps(said | {'exp': int(time.time()) - 3600}).encode())}"
    return f"{signed}.{encode(hmac.digest(secret.encode(), signed.encode(), 'sha512'))}"


def test_a_clock_that_is_off_is_named_with_both_times(
    server: Server, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_store(bucket).write("x", b"data")
    now = minio.time.utcnow
    monkeypatch.setattr(minio.time, "utcnow", lambda: now() + timedelta(minutes=20))
    for act in (lambda: open_store(bucket).read("x"), lambda: check_access(bucket)):
        raises_quickly(act, UserError, server.endpoint, "RequestTimeTooSkewed", "GMT, there ", "set the clock")


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Callable[[int], None]]:
    """A file system of that many MiB on `folder`; gives a function that changes its size. Needs root."""
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("may not mount a small disk here")
    try:
        yield lambda size: subprocess.run(
            ["mount", "-o", f"remount,size={size}m", str(folder)], check=True, capture_output=True
        )
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@only_minio
def test_a_full_disk_of_the_reader(server: Server, bucket: str, tmp_path: Path) -> None:
    manifest, store = sample(tmp_path / "a"), open_store(bucket)
    store.push(tmp_path / "a", "x")
    with small_disk(tmp_path / "disk", 20) as resize:
        act = lambda: store.pull("x", tmp_path / "disk" / "b")  # noqa: E731 - it is timed
        raises_quickly(act, StoreError, str(tmp_path / "disk"), "is full", "free space")
        assert not artifact.is_finished(tmp_path / "disk" / "b")
        assert not list((tmp_path / "disk" / "b").glob("*.part")), "it still takes the space"
        resize(80)
        store.pull("x", tmp_path / "disk" / "b")
        assert finished(tmp_path / "disk" / "b", manifest)


@needs_minio
def test_a_full_disk_of_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = sample(tmp_path / "a", 60 * MIB)
    with small_disk(tmp_path / "minio" / "data", 48) as resize:
        server = _servers.minio(tmp_path / "minio")
        try:
            server.start()
            use(server, monkeypatch, DISTILLERY_STORE_TIMEOUT="3")
            store = open_store(new_bucket(server))
            act = lambda: store.push(tmp_path / "a", "x")  # noqa: E731 - it is timed
            raises_quickly(act, StoreError, server.endpoint, "'x/big'", "full", "free space")
            no_half(store, "x", tmp_path / "b")
            resize(400)
            monkeypatch.setenv("DISTILLERY_STORE_TIMEOUT", "100")
            server.kill()
            server.start()
            store = open_store(store.uri)
            store.push(tmp_path / "a", "x")
            store.pull("x", tmp_path / "b")
        finally:
            server.kill()
    assert finished(tmp_path / "b", manifest)


def openssl(*arguments: str) -> None:
    """Run openssl."""
    subprocess.run(["openssl", *arguments], check=True, capture_output=True)


def authority(folder: Path, name: str) -> Path:
    """A certificate authority of our own: its PEM file; its key lies beside."""
    pem = folder / f"{name}.pem"
    openssl(
        *f"req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN={name}".split(),
        *f"-keyout {folder / name}.key -out {pem}".split(),
        *"-addext basicConstraints=critical,CA:TRUE -addext keyUsage=critical,keyCertSign".split(),
    )
    return pem


def certify(folder: Path, ca: Path, names: str) -> None:
    """A certificate of that authority, as MinIO wants to find it."""
    folder.mkdir()
    openssl(
        *"req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj /CN=store".split(),
        *f"-keyout {folder}/private.key -out {folder}/request".split(),
    )
    (folder / "extensions").write_text(f"subjectAltName={names}\nauthorityKeyIdentifier=keyid\n")
    openssl(
        *f"x509 -req -in {folder}/request -CA {ca} -CAkey {ca.with_suffix('.key')} -days 2".split(),
        *f"-out {folder}/public.crt -extfile {folder}/extensions".split(),
    )
    (folder / "request").unlink()
    (folder / "extensions").unlink()


@needs_minio
def test_tls_of_a_private_authority_and_both_styles_of_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ca, other = authority(tmp_path, "ca"), authority(tmp_path, "other")
    certify(tmp_path / "certs", ca, "DNS:localhost,DNS:runs.localhost")
    manifest = sample(tmp_path / "a", 20 * MIB)
    with secure(tmp_path, {"MINIO_DOMAIN": "localhost"}) as server:
        asked = resolve_localhost(monkeypatch)
        use(server, monkeypatch, AWS_ENDPOINT_URL=f"https://localhost:{server.port}", AWS_CA_BUNDLE=str(ca))
        Minio(f"localhost:{server.port}", server.access, server.secret, http_client=pool(ca)).make_bucket("runs")
        for style in ("path", "virtual", "auto"):
            monkeypatch.setenv("AWS_S3_ADDRESSING_STYLE", style)
            asked.clear()
            store = open_store(f"s3://runs/{style}")
            store.push(tmp_path / "a", "x")
            store.pull("x", tmp_path / style)
            assert finished(tmp_path / style, manifest)
            asked.discard("127.0.0.1")  # threads that earlier tests left behind go on trying their stores
            assert asked == {"runs.localhost" if style == "virtual" else "localhost"}
        named = (f"localhost:{server.port}", "TLS failed", "AWS_CA_BUNDLE")
        monkeypatch.setenv("AWS_CA_BUNDLE", str(other))
        raises_quickly(lambda: check_access("s3://runs"), UserError, *named, "CERTIFICATE_VERIFY_FAILED")
        monkeypatch.delenv("AWS_CA_BUNDLE")
        raises_quickly(lambda: check_access("s3://runs"), UserError, *named, "CERTIFICATE_VERIFY_FAILED")
        monkeypatch.setenv("AWS_CA_BUNDLE", str(ca))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"https://127.0.0.1:{server.port}")
        raises_quickly(lambda: check_access("s3://runs"), UserError, "127.0.0.1", "TLS failed", "not valid for")
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://localhost:{server.port}")
        raises_quickly(lambda: check_access("s3://runs"), UserError, "not S3's", "https://")


def pool(ca: Path) -> Any:
    """urllib3's, trusting that authority, and patient: the server answers before it is ready."""
    import urllib3

    return urllib3.PoolManager(ca_certs=str(ca), retries=urllib3.Retry(9, backoff_factor=0.2, status_forcelist=[503]))


@contextmanager
def secure(folder: Path, variables: dict[str, str]) -> Iterator[Server]:
    """A MinIO that speaks TLS with the certificate in folder/certs."""
    (folder / "minio").mkdir()
    server = _servers.minio(folder / "minio")
    command = [*server.command, "--certs-dir", str(folder / "certs")]
    server.process = _servers.spawn(command, server.variables | variables, server.log)
    try:
        until = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", server.port)).close()
                break
            except OSError:
                assert time.monotonic() < until, server.log.read_text()
                time.sleep(0.1)
        yield server
    finally:
        server.kill()


def resolve_localhost(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names below localhost mean this machine (RFC 6761), which not every resolver knows; gives the names asked for."""
    asked: set[str] = set()
    original = socket.getaddrinfo

    def resolve(host: Any, *rest: Any, **options: Any) -> Any:
        asked.add(host)
        return original("127.0.0.1" if str(host).endswith("localhost") else host, *rest, **options)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    return asked
