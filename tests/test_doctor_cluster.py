"""`doctor` against a real Kubernetes API server (`make kube`): its objects and its admission, without any kubelet."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.__main__ import main
from tests._kfp_api import FakeKfp
from tests._kube import Cluster, built, cluster

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not built(), reason="make kube builds the API server"),
]
GPU_NODE = {"kind": "Node", "apiVersion": "v1", "metadata": {"name": "gpu-1"}}
ROOM = {"cpu": "8", "memory": "32Gi", "pods": "110", "nvidia.com/gpu": "2"}


@pytest.fixture(scope="module")
def kube(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A namespace under the strictest pod security, with what KFP and k8s/ put there."""
    with cluster(tmp_path_factory.mktemp("kube")) as found:
        found.do("create", "namespace", "kubeflow")
        found.do("label", "namespace", "kubeflow", "pod-security.kubernetes.io/enforce=restricted")
        found.do("-n", "kubeflow", "create", "serviceaccount", "pipeline-runner")
        for name in ("distillery-s3", "mlpipeline-minio-artifact"):
            keys = ("--from-literal=accesskey=tester", "--from-literal=secretkey=testing-secret")
            found.do("-n", "kubeflow", "create", "secret", "generic", name, *keys)
        found.do("create", "-f", "-", stdin=json.dumps(GPU_NODE))
        status = {"allocatable": ROOM, "capacity": ROOM, "conditions": [{"type": "Ready", "status": "True"}]}
        patch = json.dumps({"status": status})
        found.do("patch", "node", "gpu-1", "--subresource=status", "--type=merge", "-p", patch)
        yield found


def examine(
    kube: Cluster,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    *arguments: str,
    kubeconfig: Path | None = None,
) -> dict[str, dict[str, str]]:
    """What doctor finds, by what was looked at; afterwards no pod is left."""
    monkeypatch.setenv("KUBECONFIG", str(kubeconfig or kube.kubeconfig))
    with FakeKfp() as kfp:
        main(["doctor", "--endpoint", kfp.endpoint, "--json", "--pod-timeout", "5", *arguments])
    assert kube.get("pods", "-A")["items"] == []
    return {one["check"]: one for one in json.loads(capsys.readouterr().out)["checks"]}


def test_a_real_server_is_understood(
    kube: Cluster, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A new node is tainted by the server itself until somebody says that it is ready.
    found = examine(kube, capsys, monkeypatch, "--no-pod")
    assert "node.kubernetes.io/not-ready" in found["drivers"]["says"] and "healthy node" in found["drivers"]["do"]
    kube.do("taint", "node", "gpu-1", "node.kubernetes.io/not-ready:NoSchedule-")

    asked = ("--param", "teacher_gpus=2", "--store", "s3://runs/x", "--param", "s3_endpoint=http://minio.storage:9000")
    found = examine(kube, capsys, monkeypatch, *asked)
    assert found["namespace"]["says"] == "kubeflow, pod security level: restricted"
    assert found["node for train_teacher"]["status"] == found["secret"]["status"] == found["rights"]["status"] == "ok"
    assert "nothing scheduled it within" in found["pod"]["says"]  # so the server let it in


def test_what_the_server_refuses_is_told(
    kube: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kube.do("-n", "kubeflow", "create", "quota", "none", "--hard=pods=0")
    status = json.dumps({"status": {"hard": {"pods": "0"}, "used": {"pods": "0"}}})
    kube.do("-n", "kubeflow", "patch", "quota", "none", "--subresource=status", "--type=merge", "-p", status)
    try:
        found = examine(kube, capsys, monkeypatch)
    finally:
        kube.do("-n", "kubeflow", "delete", "quota", "none")
    assert "ResourceQuota none of kubeflow allows pods 0" in found["quota"]["says"]
    assert "exceeded quota: none" in found["pod"]["says"]


def test_a_user_without_rights(
    kube: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kube.do("-n", "kubeflow", "create", "serviceaccount", "nobody")
    settings = json.loads(kube.kubeconfig.read_text())
    settings["users"][0]["user"] = {"token": kube.do("-n", "kubeflow", "create", "token", "nobody").strip()}
    path = tmp_path / "nobody"
    path.write_text(json.dumps(settings))
    found = examine(kube, capsys, monkeypatch, kubeconfig=path)
    assert {found[name]["status"] for name in ("namespace", "rights", "secret", "nodes", "quota", "pod")} == {"skipped"}
    assert "create pods" in found["pod"]["says"]
