"""A real Kubernetes API server on this machine, from `make kube`: no nodes, so no pod runs."""

import json
import os
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _manifests import ROOT, kubectl
from _servers import free_ports

BINARIES = ROOT / ".tools" / "bin"
DEFINITIONS = ROOT / ".tools" / "crds"
DEFINED = ("kueue", "prometheus-operator")
STARTING = 120.0  # seconds
TOKEN = "token-of-a-test-server"


def built() -> bool:
    """Whether `make kube` has been here."""
    return all((DEFINITIONS / name).exists() for name in DEFINED) and all(
        (BINARIES / name).exists() for name in ("etcd", "kube-apiserver")
    )


@dataclass
class Cluster:
    """A running API server, and kubectl for its administrator."""

    kubeconfig: Path

    def run(self, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """One call of kubectl, whatever comes of it."""
        command = [kubectl(), "--kubeconfig", str(self.kubeconfig), *arguments]
        return subprocess.run(command, capture_output=True, text=True, input=stdin)

    def do(self, *arguments: str, stdin: str = "") -> str:
        """One call of kubectl that must succeed; its output."""
        done = self.run(*arguments, stdin=stdin)
        assert done.returncode == 0, f"kubectl {' '.join(arguments)}: {done.stderr}"
        return done.stdout

    def get(self, *arguments: str) -> dict[str, Any]:
        """An object, parsed."""
        found: dict[str, Any] = json.loads(self.do("get", *arguments, "-o", "json"))
        return found


@contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """Start both servers below `folder`; they end with the block."""
    etcd, peer, port = free_ports(3)
    key, tokens, kubeconfig = folder / "service-account.key", folder / "tokens.csv", folder / "kubeconfig"
    subprocess.run(["openssl", "genrsa", "-out", str(key), "2048"], check=True, capture_output=True)
    tokens.write_text(f"{TOKEN},admin,1,system:masters\n", encoding="utf-8")
    server = f"https://127.0.0.1:{port}"
    kubeconfig.write_text(
        json.dumps(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "current-context": "test",
                "contexts": [{"name": "test", "context": {"cluster": "test", "user": "admin"}}],
                "clusters": [{"name": "test", "cluster": {"server": server, "insecure-skip-tls-verify": True}}],
                "users": [{"name": "admin", "user": {"token": TOKEN}}],
            }
        ),
        encoding="utf-8",
    )
    store = [
        str(BINARIES / "etcd"),
        f"--data-dir={folder / 'etcd'}",
        f"--listen-client-urls=http://127.0.0.1:{etcd}",
        f"--advertise-client-urls=http://127.0.0.1:{etcd}",
        f"--listen-peer-urls=http://127.0.0.1:{peer}",
        f"--initial-advertise-peer-urls=http://127.0.0.1:{peer}",
        f"--initial-cluster=default=http://127.0.0.1:{peer}",
        "--unsafe-no-fsync",
    ]
    api = [
        str(BINARIES / "kube-apiserver"),
        f"--etcd-servers=http://127.0.0.1:{etcd}",
        "--bind-address=127.0.0.1",
        f"--secure-port={port}",
        f"--cert-dir={folder / 'certificates'}",
        "--authorization-mode=RBAC",
        f"--token-auth-file={tokens}",
        "--service-account-issuer=https://kubernetes.default.svc",
        f"--service-account-key-file={key}",
        f"--service-account-signing-key-file={key}",
        "--service-cluster-ip-range=10.0.0.0/24",
    ]
    with ExitStack() as stack:
        for name, command in (("etcd", store), ("kube-apiserver", api)):
            log = stack.enter_context((folder / f"{name}.log").open("wb"))
            process = subprocess.Popen(
                command, stdout=log, stderr=log, cwd=folder, env={**os.environ, "GOMAXPROCS": "2"}
            )
            stack.callback(stop, process)
        wait(f"{server}/readyz", process, folder / "kube-apiserver.log")
        yield Cluster(kubeconfig)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a server and wait for it."""
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until the API server is ready.

    Raises:
        RuntimeError: it ended, or took too long; with the end of its log.
    """
    trusting = ssl.create_default_context()
    trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE
    asked = urllib.request.Request(url, headers={"Authorization": f"Bearer {TOKEN}"})
    until = time.monotonic() + STARTING
    while process.poll() is None and time.monotonic() < until:
        try:
            with urllib.request.urlopen(asked, timeout=5, context=trusting) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise RuntimeError(f"kube-apiserver: not ready at {url}\n{log.read_text(errors='replace')[-3000:]}")
