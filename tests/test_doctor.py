"""`doctor` and planted faults: a fake Kubeflow, a fake Kubernetes that runs its pods' commands, a real store."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from _kfp_api import FakeKfp
from _kube_api import FakeKube
from _servers import ROOT, Server, available, running

from pipelines.__main__ import main
from pipelines.doctor import asks, cluster, pod

SPACE = "/api/v1/namespaces/kubeflow"
SECRET_VALUE = "s3cr3t-value-nobody-may-see"
CA = ("--param", "s3_ca=mine")
DEMO = ROOT / "pipelines" / "experiments" / "demo.yaml"
GPU_TAINT = {"key": "nvidia.com/gpu", "value": "present", "effect": "NoSchedule"}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """An S3 server with the two buckets of a run."""
    with running(available()[-1], tmp_path_factory.mktemp("store")) as server:
        server.make_bucket("runs")
        server.make_bucket("mlpipeline")
        yield server


@dataclass
class World:
    """A healthy cluster, to plant faults in."""

    kfp: FakeKfp
    kube: FakeKube
    store: Server
    folder: Path
    capsys: pytest.CaptureFixture[str]

    def doctor(self, *arguments: str, endpoint: str = "") -> tuple[int, dict[str, list[dict[str, str]]]]:
        """Exit status and the findings, by what was looked at."""
        given = ["--endpoint", endpoint or self.kfp.endpoint, "--store", "s3://runs/here", *arguments, "--json"]
        status = main(["doctor", "--param", f"s3_endpoint={self.store.endpoint}", *given])
        said = self.capsys.readouterr()
        assert SECRET_VALUE not in said.out + said.err
        assert self.store.secret not in said.out + said.err
        answer = json.loads(said.out)
        found: dict[str, list[dict[str, str]]] = {}
        for one in answer["checks"]:
            found.setdefault(one["check"], []).append(one)
        wrong = [one for one in answer["checks"] if one["status"] == "wrong"]
        assert answer["ok"] == (not wrong) == (status == 0)
        assert all(one["do"] for one in wrong), "a fault without what to do"
        assert not [path for path in self.kube.objects if "distillery-doctor" in path and "/pods/" in path]
        return status, found

    def fault(self, check: str, *arguments: str, endpoint: str = "") -> str:
        """What is said of the only fault that is found, without or with a pod."""
        status, found = self.doctor(*arguments, *([] if check in ("pod", "image") else ["--no-pod"]), endpoint=endpoint)
        wrong = [one for many in found.values() for one in many if one["status"] == "wrong"]
        assert status == 1
        assert {one["check"] for one in wrong} == {check}, wrong
        return " ".join(f"{one['says']} -> {one['do']}" for one in wrong)


@pytest.fixture
def world(
    store: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[World]:
    """Everything a run needs, on one machine."""
    monkeypatch.setattr(pod, "POLL", 0.1)
    monkeypatch.setattr(pod, "SETTLED", 0.3)
    monkeypatch.setattr(pod, "UNSCHEDULED", 0.5)
    with FakeKfp() as kfp, FakeKube() as kube:
        kube.put(SPACE, status={"phase": "Active"})
        kube.put(f"{SPACE}/serviceaccounts/pipeline-runner")
        providers = {
            "endpoint": store.endpoint.removeprefix("http://"),
            "disableSSL": True,
            "region": "us-east-1",
            "credentials": {
                "secretRef": {"secretName": "kfp-store", "accessKeyKey": "id", "secretKeyKey": "key"},
            },
        }
        text = json.dumps({"minio": {"default": providers}})
        root = "minio://mlpipeline/v2/artifacts"
        kube.put(f"{SPACE}/configmaps/kfp-launcher", data={"defaultPipelineRoot": root, "providers": text})
        kube.put(f"{SPACE}/configmaps/workflow-controller-configmap", data=controller("OnError"))
        kube.secret("kubeflow", "kfp-store", id=store.access, key=store.secret)
        kube.secret("kubeflow", "distillery-s3", accesskey=store.access, secretkey=store.secret)
        kube.node("node-1")
        monkeypatch.setenv("KUBECONFIG", str(kube.kubeconfig(tmp_path / "kubeconfig")))
        yield World(kfp, kube, store, tmp_path, capsys)


def controller(policy: str, limit: str = "2") -> dict[str, str]:
    """The controller's configuration as KFP ships it."""
    return {
        "workflowDefaults": "spec:\n  templateDefaults:\n    retryStrategy:\n"
        f"      limit: '{limit}'\n      retryPolicy: {policy}\n"
    }


def test_nothing_is_wrong_with_a_healthy_cluster(world: World) -> None:
    status, found = world.doctor()
    assert status == 0
    words = {check: one["status"] for check, many in found.items() for one in many}
    assert set(words.values()) == {"ok", "skipped"}
    assert {check for check, word in words.items() if word == "skipped"} == {"pull secret", "queue", "store's CA"}
    assert "written, read, listed, deleted" in found["store, here"][0]["says"]
    assert "written, read, listed, deleted" in found["store, pod"][0]["says"]
    assert "s3://mlpipeline/v2/artifacts" in found["KFP's artifacts, pod"][0]["says"]
    assert "2.17.0" in found["version"][0]["says"]
    assert "81 pods" in found["retries"][0]["says"]
    made = world.kube.pods_made[0]
    assert made["spec"]["securityContext"]["runAsNonRoot"] is True
    assert made["spec"]["serviceAccountName"] == "pipeline-runner"
    assert {c["name"] for c in made["spec"]["containers"]} == {"store", "kfps-artifacts"}


def test_lines_are_for_people(world: World) -> None:
    world.kube.objects.pop(f"{SPACE}/secrets/distillery-s3")
    status = main(["doctor", "--endpoint", world.kfp.endpoint, "--no-pod"])
    lines = world.capsys.readouterr().out.splitlines()
    assert status == 1
    at = next(i for i, line in enumerate(lines) if line.startswith("wrong"))
    assert "there is no secret distillery-s3 in namespace kubeflow" in lines[at]
    assert lines[at + 1].split("-> ")[1].startswith("kubectl -n kubeflow create secret generic distillery-s3")
    assert lines[-1].split()[:4] == [str(sum(x.startswith("ok") for x in lines)), "ok,", "1", "wrong,"]


# The planted faults


def test_wrong_endpoint(world: World) -> None:
    assert "Connection refused" in world.fault("endpoint", endpoint="http://127.0.0.1:9")


def test_an_endpoint_that_is_something_else(world: World) -> None:
    refusal = {"minio": "403", "swift": "400"}[world.store.name]
    assert refusal in world.fault("endpoint", endpoint=world.store.endpoint)


def test_wrong_token(world: World) -> None:
    world.kfp.token = "right"
    assert "token was not accepted" in world.fault("token", "--existing-token", "wrong")
    assert "token is missing" in world.fault("token")


def test_missing_namespace(world: World) -> None:
    said = world.fault("namespace", "--namespace", "nowhere")
    assert "there is no namespace nowhere" in said
    assert "kubectl create namespace nowhere" in said


def test_a_namespace_that_the_user_may_not_use(world: World) -> None:
    world.kfp.multi_user = True
    status, found = world.doctor("--namespace", "theirs")
    assert status == 1
    assert "theirs" in next(one["says"] for one in found["namespace"] if "403" in one["says"])


def test_many_users_and_no_namespace(world: World) -> None:
    world.kfp.multi_user = True
    assert "--namespace" in world.fault("namespace")


def test_missing_secret(world: World) -> None:
    world.kube.objects.pop(f"{SPACE}/secrets/distillery-s3")
    assert "there is no secret distillery-s3" in world.fault("secret")


def test_wrong_secret_key_names(world: World) -> None:
    world.kube.secret("kubeflow", "distillery-s3", AWS_ACCESS_KEY_ID="x", AWS_SECRET_ACCESS_KEY=SECRET_VALUE)
    said = world.fault("secret")
    assert "lacks the keys accesskey, secretkey; it has AWS.ACCESS.KEY.ID, AWS.SECRET.ACCESS.KEY" in said


@pytest.mark.parametrize(("value", "why"), [(f"{SECRET_VALUE}\n", "line break"), ("", "is empty")])
def test_a_secret_value_that_cannot_work(world: World, value: str, why: str) -> None:
    world.kube.secret("kubeflow", "distillery-s3", accesskey="tester", secretkey=value)
    assert why in world.fault("secret")


def test_wrong_credentials(world: World) -> None:
    world.kube.secret("kubeflow", "distillery-s3", accesskey=world.store.access, secretkey=SECRET_VALUE)
    status, found = world.doctor()
    assert status == 1
    for check in ("store, here", "store, pod"):
        assert "SignatureDoesNotMatch" in found[check][0]["says"], found[check]
    assert "secret distillery-s3" in found["store, pod"][0]["do"]
    assert found["KFP's artifacts, pod"][0]["status"] == "ok"


@pytest.mark.slow
def test_wrong_credentials_of_kfp_itself(world: World) -> None:
    world.kube.secret("kubeflow", "kfp-store", id=world.store.access, key=SECRET_VALUE)
    status, found = world.doctor()
    assert status == 1
    assert found["KFP's artifacts, pod"][0]["status"] == "wrong"
    assert found["store, pod"][0]["status"] == "ok"


def test_a_server_that_repeats_what_it_was_sent(world: World) -> None:
    fault = f"denied for {world.store.secret}; look into it"
    world.kube.plant.output = json.dumps({"fault": fault, "version": "1", "user": 1, "shm": 1 << 40, "home": True})
    status, found = world.doctor()  # which looks for the value in everything that is said
    assert status == 1
    assert "denied for (hidden)" in found["store, pod"][0]["says"]


def test_missing_bucket(world: World) -> None:
    status, found = world.doctor("--store", "s3://not-there/x")
    assert status == 1
    assert "NoSuchBucket" in found["store, pod"][0]["says"] and "create that bucket" in found["store, pod"][0]["do"]
    assert found["store, here"][0]["status"] == "wrong"


@pytest.mark.slow
def test_an_endpoint_of_the_store_that_only_the_cluster_knows(world: World) -> None:
    status, found = world.doctor("--param", "s3_endpoint=http://minio.storage.svc:9000")
    assert found["store, here"][0]["status"] == "skipped"
    assert status == 1  # this machine plays the pod, and does not know the name either
    assert "no answer from http://minio.storage.svc:9000" in found["store, pod"][0]["says"]


def test_image_that_does_not_exist(world: World) -> None:
    world.kube.plant.pull = "docker.io/library/nope:1: not found"
    said = world.fault("image", "--param", "image=nope:1")
    assert "nope:1 cannot be pulled" in said
    assert "not found" in said


def test_image_of_something_else(world: World) -> None:
    world.kube.plant.output, world.kube.plant.code = "No module named distillery", 1
    assert "No module named distillery" in world.fault("image")


def test_no_gpu_node(world: World) -> None:
    world.kube.node("amd-1", amd="8")
    said = world.fault("node for train_teacher", "--param", "teacher_gpus=2")
    assert "no nvidia.com/gpu" in said
    assert "nodes offer amd.com/gpu" in said


def test_gpu_nodes_that_are_too_small_or_busy(world: World) -> None:
    world.kube.node("gpu-1", nvidia="1")
    world.kube.node("gpu-2", nvidia="4")
    world.kube.running_pod("gpu-2", "training", nvidia="3", cpu="2")
    said = world.fault("node for train_teacher", "--param", "teacher_gpus=2")
    assert "gpu-1: has 1 nvidia.com/gpu" in said
    assert "gpu-2: 1 of 4 nvidia.com/gpu free" in said
    assert "no node has room now" in said
    assert said.index("gpu-2:") < said.index("gpu-1:") < said.index("node-1:")  # the nearest to fitting first


def test_tainted_nodes(world: World) -> None:
    world.kube.node("node-1", taints=[GPU_TAINT])
    status, found = world.doctor(
        "--param", f"tolerations={json.dumps([{'key': 'nvidia.com/gpu', 'operator': 'Exists'}])}"
    )
    assert status == 1
    assert found["drivers"][0]["status"] == "wrong"  # nobody gives them tolerations
    assert "taint nvidia.com/gpu=present:NoSchedule" in found["drivers"][0]["says"]
    assert found["node for plan"][0]["status"] == "ok"
    said = world.doctor("--no-pod")[1]["node for plan"][0]
    assert said["status"] == "wrong"
    assert json.loads(said["do"].split("tolerations=")[1].split("'")[0])[0]["key"] == "nvidia.com/gpu"


def test_no_room_for_drivers(world: World) -> None:
    world.kube.node("node-1", cpu="8")
    world.kube.running_pod("node-1", "hungry", cpu="7950m")
    status, found = world.doctor()
    assert status == 1
    assert "node-1: 0.05 of 8 cpu free" in found["drivers"][0]["says"]


def test_node_selector_that_no_node_has(world: World) -> None:
    said = world.doctor("--no-pod", "--param", 'node_selector={"gpu": "h100"}')[1]["node for plan"][0]
    assert "label gpu is missing, not h100" in said["says"]


def test_quota(world: World) -> None:
    hard = {"requests.memory": "10Gi", "pods": "50"}
    world.kube.put(f"{SPACE}/resourcequotas/small", spec={"hard": hard}, status={"hard": hard, "used": {"pods": "1"}})
    said = world.fault("quota")
    assert "ResourceQuota small of kubeflow allows requests.memory 10Gi" in said
    assert ": train_teacher can never start" in said


def test_quota_that_is_used_up(world: World) -> None:
    hard = {"pods": "5"}
    world.kube.put(f"{SPACE}/resourcequotas/few", spec={"hard": hard}, status={"hard": hard, "used": {"pods": "5"}})
    assert "5 used" in world.fault("quota")


def test_quotas_for_other_pods_do_not_count(world: World) -> None:
    world.kube.put(f"{SPACE}/resourcequotas/none", spec={"hard": {"pods": "0"}, "scopes": ["BestEffort"]})
    assert world.doctor("--no-pod")[0] == 0


def test_limit_range(world: World) -> None:
    rule = {"type": "Container", "max": {"cpu": "2", "memory": "64Gi"}}
    world.kube.put(f"{SPACE}/limitranges/caps", spec={"limits": [rule]})
    said = world.fault("limits")
    assert "prepare_data" in said and "LimitRange caps" in said and "max of 2 per container" in said
    assert "drivers" not in said
    rule["max"] = {"cpu": "4"}  # what the largest step asks, and not less
    assert world.doctor("--no-pod")[0] == 0


# What else can be wrong


@pytest.mark.parametrize(
    ("words", "check"),
    [
        ("exceeded quota: few, requested: pods=1", "quota or limits"),
        ('violates PodSecurity "restricted:latest": x', "pod security"),
    ],
)
def test_pods_that_are_not_let_in(world: World, words: str, check: str) -> None:
    world.kube.plant.refusal = words
    said = world.fault("pod")
    assert check in said and words in said


def test_a_pod_that_no_node_takes(world: World) -> None:
    world.kube.plant.unschedulable = "0/1 nodes are available: 1 Insufficient cpu."
    assert "1 Insufficient cpu" in world.fault("pod")


def test_a_cluster_without_scheduler(world: World) -> None:
    world.kube.plant.no_scheduler = True
    assert "nothing scheduled it" in world.fault("pod", "--pod-timeout", "1")


def test_a_container_that_cannot_be_made(world: World) -> None:
    world.kube.plant.broken = ("CreateContainerConfigError", "container has runAsNonRoot and image will run as root")
    assert "runAsNonRoot" in world.fault("pod")


def test_an_image_that_takes_long(world: World) -> None:
    world.kube.plant.slow = 600
    assert "--pod-timeout" in world.fault("pod", "--pod-timeout", "2")


def test_service_account_is_missing(world: World) -> None:
    world.kube.objects.pop(f"{SPACE}/serviceaccounts/pipeline-runner")
    assert "pipeline-runner" in world.fault("service account")


@pytest.mark.parametrize(
    ("data", "why"),
    [
        ({"providers": "minio: [1"}, "cannot be read"),
        ({"providers": "minio: text"}, "must be a mapping"),
        ({"providers": "minio: {default: {endpoint: x}}"}, "has no credentials"),
        ({"providers": "minio: {default: {credentials: {secretRef: {secretName: a}}}}"}, "accessKeyKey, secretKeyKey"),
        ({"defaultPipelineRoot": "/data"}, "defaultPipelineRoot is '/data'"),
    ],
)
def test_launcher_settings_that_kfp_would_stumble_over(world: World, data: dict[str, str], why: str) -> None:
    world.kube.put(f"{SPACE}/configmaps/kfp-launcher", data=data)
    assert why in world.fault("kfp-launcher")


def test_kfp_secret_is_missing_where_nothing_is_configured(world: World) -> None:
    world.kube.objects.pop(f"{SPACE}/configmaps/kfp-launcher")
    assert "mlpipeline-minio-artifact" in world.fault("KFP's secret")


def test_overrides_of_the_launcher(world: World) -> None:
    text = world.kube.objects[f"{SPACE}/configmaps/kfp-launcher"]["data"]
    settings = json.loads(text["providers"])
    other = {"secretName": "other", "accessKeyKey": "a", "secretKeyKey": "b"}
    override = {"bucketName": "mlpipeline", "keyPrefix": "v2/", "credentials": {"secretRef": other}}
    settings["minio"]["overrides"] = [override]
    text["providers"] = json.dumps(settings)
    assert "there is no secret other" in world.fault("KFP's secret")


def test_retries_that_multiply(world: World) -> None:
    world.kube.put(f"{SPACE}/configmaps/workflow-controller-configmap", data=controller("Always", "3"))
    assert "256 pods" in world.fault("retries")


def test_shared_memory_as_large_as_the_memory(world: World) -> None:
    said = world.fault("shared memory", "--param", "data_memory=512Mi")
    assert "prepare_data" in said and "1Gi" in said


def test_pull_secret(world: World) -> None:
    package = ("--package", str(with_constants(world.folder, imagePullSecret=[{"secretName": "registry"}])))
    assert "there is no secret registry" in world.fault("pull secret", *package)
    assert "there is no secret other" in world.fault("pull secret", "--pull-secret", "other")
    world.kube.secret("kubeflow", "registry", x="y")
    assert "is of type Opaque" in world.fault("pull secret", *package)
    world.kube.secret("kubeflow", "registry", kind="kubernetes.io/dockerconfigjson", _dockerconfigjson="{}")
    assert world.doctor(*package)[0] == 0
    assert world.kube.pods_made[-1]["spec"]["imagePullSecrets"] == [{"name": "registry"}]


def test_the_authority_of_the_store(world: World) -> None:
    world.kube.secret("kubeflow", "mine", x="y")
    assert "lacks the key ca.crt" in world.fault("store's CA", *CA)
    assert "there is no secret other" in world.fault("store's CA", "--param", "s3_ca=other")
    world.kube.secret("kubeflow", "mine", ca_crt="a certificate")
    world.doctor(*CA)  # this machine has no such file for the pod that it plays
    variables = {e["name"]: e.get("value") for e in world.kube.pods_made[-1]["spec"]["containers"][0]["env"]}
    assert variables["AWS_CA_BUNDLE"].endswith("/ca.crt")


def test_queue(world: World) -> None:
    assert "no Kueue" in world.fault("queue", "--queue", "team")
    given = with_constants(world.folder, podMetadata={"labels": {"kueue.x-k8s.io/queue-name": "team"}})
    group = {"preferredVersion": {"groupVersion": "kueue.x-k8s.io/v1beta2"}}
    world.kube.put("/apis/kueue.x-k8s.io", **group)
    queues = "/apis/kueue.x-k8s.io/v1beta2/namespaces/kubeflow/localqueues"
    world.kube.put(f"{queues}/other", spec={"clusterQueue": "all"})
    assert "there is no LocalQueue team in kubeflow; it has other" in world.fault("queue", "--package", str(given))
    world.kube.put(f"{queues}/team", spec={"clusterQueue": "all"})
    found = world.doctor("--package", str(given), "--no-pod")[1]
    assert "ClusterQueue all" in found["queue"][0]["says"]


def test_an_experiment_that_is_wrong(world: World) -> None:
    path = world.folder / "mine.yaml"
    path.write_text(DEMO.read_text().replace("name: digits", "name: digitz"))
    assert "digits" in world.fault("package", "--experiment-yaml", str(path))


def test_what_each_cell_asks_is_known(world: World) -> None:
    path = world.folder / "mine.yaml"
    path.write_text(DEMO.read_text() + "\nprofile: a100\n")
    said = world.fault("node for train_teacher", "--experiment-yaml", str(path))
    assert "evaluate_student" in said
    assert "1 nvidia.com/gpu" in said


def test_every_cell_of_the_loop_counts(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = asks._plan_here

    def with_a_larger_cell(step: str, *arguments: Any) -> dict[str, Any]:
        found = planned(step, *arguments)
        if step == "plan":
            first = found["Output"][0]
            found["Output"] = [first, json.loads(json.dumps(first).replace('"8Gi"', '"900Gi"'))]
        return found

    monkeypatch.setattr(asks, "_plan_here", with_a_larger_cell)
    status, found = world.doctor("--no-pod")
    assert status == 1
    lines = [one for check, many in found.items() if check.startswith("node for") for one in many]
    assert [one for one in lines if one["status"] == "ok" and "evaluate_student" in one["says"]]
    assert [one for one in lines if one["status"] == "wrong" and "900Gi memory" in one["says"]]


# What the user may not see


def test_rights_that_are_missing_are_told_not_counted_as_faults(world: World) -> None:
    world.kube.forbidden = ["(GET|list|get) .*(nodes|secrets)", "(POST|create) .*pods"]
    status, found = world.doctor()
    assert status == 0
    assert "list nodes" in found["rights"][0]["says"] and "create pods" in found["rights"][0]["says"]
    assert found["nodes"][0]["status"] == found["secret"][0]["status"] == found["pod"][0]["status"] == "skipped"


def test_pods_of_others_that_may_not_be_seen(world: World) -> None:
    world.kube.running_pod("node-1", "hungry", cpu="16")
    world.kube.forbidden = ["GET /api/v1/pods$"]
    status, found = world.doctor("--no-pod")
    assert status == 0
    assert "compared with empty nodes" in found["nodes"][0]["says"]


def test_without_kubernetes(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", str(world.folder / "missing"))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", world.store.access)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", world.store.secret)
    status, found = world.doctor()
    assert status == 0
    assert found["store, here"][0]["status"] == "ok"
    assert "secret" in found["not looked at"][0]["says"]


def test_kubernetes_that_refuses_the_login(world: World) -> None:
    world.kube.kubeconfig(world.folder / "kubeconfig", token="wrong")
    assert "Unauthorized" in world.fault("kubernetes")


def test_kubernetes_that_never_answers(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "READ", 0.5)
    world.kube.silent = True
    began = time.monotonic()
    world.fault("kubernetes")
    assert time.monotonic() - began < 60


def test_work_that_hangs_is_left_behind() -> None:
    with pytest.raises(cluster.ClusterError, match="sleeping: no answer within 0 s"):
        cluster.within(0.1, "sleeping", lambda: time.sleep(60))


def test_long_lists_come_page_by_page(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "PAGE", 2)
    for index in range(5):
        world.kube.running_pod("node-1", f"pod-{index}", cpu="3")
    assert "node-1: 1 of 16 cpu free" in world.doctor("--no-pod")[1]["node for prepare_data"][0]["says"]


def test_mistakes_in_the_command(world: World) -> None:
    for arguments in (
        ["--param", "nope=1"],
        ["--param", "x"],
        ["--store", "/data"],
        ["--package", "/dev/null"],
        ["--x"],
    ):
        assert main(["doctor", "--endpoint", world.kfp.endpoint, *arguments]) == 2, arguments
        assert world.capsys.readouterr().err


@pytest.mark.parametrize("how", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_interrupted_it_deletes_its_pod(world: World, how: signal.Signals) -> None:
    world.kube.plant.no_scheduler = True
    command = [sys.executable, "-m", "pipelines", "doctor", "--endpoint", world.kfp.endpoint]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with (world.folder / "out").open("w") as out:
        child = subprocess.Popen(command, env=environment, stdout=out, stderr=out)
    until = time.monotonic() + 90
    while not world.kube.pods_made and time.monotonic() < until:
        time.sleep(0.1)
    child.send_signal(how)
    assert child.wait(30) in (130, 143)
    assert any(line.startswith("DELETE ") for line in world.kube.requests)
    assert not [path for path in world.kube.objects if "distillery-doctor" in path]


def with_constants(folder: Path, **settings: Any) -> Path:
    """The package with settings of every pod that are no parameters."""
    documents = list(yaml.safe_load_all((ROOT / "pipelines" / "distill_pipeline.yaml").read_text()))
    for one in documents[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"].values():
        one.update(settings)
    path = folder / "package.yaml"
    path.write_text(yaml.safe_dump_all(documents))
    return path
