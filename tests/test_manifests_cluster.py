"""k8s/ before a real Kubernetes API server: accepted, admitted under `restricted`, applied twice, and removed.

Needs `make kube`. No pod runs here: what a pod does is for a cluster with nodes.
"""

import itertools
import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from _kube import DEFINITIONS, Cluster, built, cluster
from _manifests import K8S, NAMESPACE, ROOT, build, combinations, own, pod_templates

from pipelines import compiled, package
from pipelines.doctor import asks

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not built(), reason="run `make kube` first: there is no .tools/bin/kube-apiserver"),
]
WATCH = f"system:serviceaccount:{NAMESPACE}:distillery-watch"
RESTRICTED = "pod-security.kubernetes.io/enforce=restricted"


@pytest.fixture(scope="module")
def kube(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("kube")) as found:
        found.do("apply", "--server-side", "-R", "-f", str(DEFINITIONS))
        for name in (NAMESPACE, "kubeflow", "elsewhere"):
            found.do("create", "namespace", name)
        found.do("label", "namespace", NAMESPACE, RESTRICTED)
        found.do("wait", "--for=condition=Established", "crd", "--all", "--timeout=60s")
        yield found


@pytest.fixture
def applied(kube: Cluster, tmp_path: Path) -> Iterator[Cluster]:
    """The local overlay with the exporter, applied in earnest and removed afterwards."""
    folder = str(own(tmp_path, "local", ("monitoring",)))
    kube.do("apply", "--server-side", "-k", folder)
    yield kube
    kube.do("delete", "-k", folder, "--wait=false", "--ignore-not-found")


@pytest.mark.parametrize(("name", "chosen"), combinations())
def test_the_server_takes_every_combination(kube: Cluster, tmp_path: Path, name: str, chosen: tuple[str, ...]) -> None:
    folder = str(own(tmp_path, name, chosen))
    done = kube.run("apply", "--server-side", "--dry-run=server", "--validate=strict", "-k", folder)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr  # what a later Kubernetes removes
    assert len(done.stdout.splitlines()) == len(build(tmp_path))
    assert "(server dry run)" in done.stdout


def test_the_server_refuses_what_is_misspelt(kube: Cluster) -> None:
    text = (
        (K8S / "base" / "watch.yaml").read_text().replace("concurrencyPolicy: Forbid", "concurrencyPolicy: Forbidden")
    )
    done = kube.run("apply", "--server-side", "--dry-run=server", "-n", NAMESPACE, "-f", "-", stdin=text)
    assert done.returncode != 0 and "Forbidden" in done.stderr


def test_pods_pass_the_restricted_level(applied: Cluster, tmp_path: Path) -> None:
    found = dict(pod_templates(build(tmp_path)))
    assert set(found) == {
        "CronJob/distillery-watch",
        "Job/distillery-bucket",
        "Deployment/distillery-s3",
        "Deployment/distillery-exporter",
    }
    for name, template in found.items():
        pod = {"apiVersion": "v1", "kind": "Pod", **template}
        pod["metadata"] = {"name": "probe", "namespace": NAMESPACE, "labels": template["metadata"]["labels"]}
        pod["spec"].setdefault("serviceAccountName", "distillery-watch")
        applied.do("create", "--dry-run=server", "-f", "-", stdin=json.dumps(pod))
        pod["spec"]["securityContext"].pop("runAsNonRoot")
        loose = applied.run("create", "--dry-run=server", "-f", "-", stdin=json.dumps(pod))
        assert loose.returncode != 0 and 'violates PodSecurity "restricted' in loose.stderr, name


@pytest.mark.parametrize("name", ["distill_pipeline.yaml", "distill_sharded_pipeline.yaml"])
def test_the_steps_pods_pass_the_restricted_level(kube: Cluster, name: str) -> None:
    chosen = compiled.load(ROOT / "pipelines" / name)
    given = {"tolerations": '[{"key": "gpu", "operator": "Exists"}]', "node_selector": '{"disk": "ssd"}'}
    values = asks.values(chosen, given)
    spec, settings = chosen.spec["deploymentSpec"]["executors"], package.pods_of(chosen.platform)
    assert set(settings) == set(spec)
    for label, pod in settings.items():
        made = step_pod(spec[label]["container"], pod, values)
        made["metadata"] = {"name": label, "namespace": NAMESPACE}
        made["spec"]["serviceAccountName"] = "pipeline-runner"
        kube.run("create", "serviceaccount", "pipeline-runner", "-n", NAMESPACE)  # there from the second one on
        done = kube.run(
            "create", "--dry-run=server", "--validate=strict", "-o", "json", "-f", "-", stdin=json.dumps(made)
        )
        assert done.returncode == 0, f"{label}: {done.stderr}"
        found = json.loads(done.stdout)["spec"]
        assert found["containers"][0]["imagePullPolicy"] == "IfNotPresent", "an image that was loaded onto the nodes"
        assert found["activeDeadlineSeconds"] >= 1800 and found["nodeSelector"] == {"disk": "ssd"}
        assert {"key": "gpu", "operator": "Exists"} in found["tolerations"]
        (made["spec"]["containers"][0]["securityContext"]).pop("runAsNonRoot")
        loose = kube.run("create", "--dry-run=server", "-f", "-", stdin=json.dumps(made))
        assert 'violates PodSecurity "restricted' in loose.stderr


def test_applying_twice_changes_nothing_and_deleting_leaves_nothing(applied: Cluster, tmp_path: Path) -> None:
    folder, names = str(tmp_path), [(d["kind"], d["metadata"]["name"]) for d in build(tmp_path)]

    def objects() -> list[dict[str, Any]]:
        found = [applied.get(kind, name, "-n", NAMESPACE) for kind, name in names]
        for one in found:  # Kubernetes 1.36 stores a claim for a volume once more, with nothing else changed
            one["metadata"].pop("resourceVersion")
        return found

    before = objects()
    applied.do("apply", "--server-side", "-k", folder)
    assert objects() == before
    applied.do("delete", "-k", folder, "--wait=false")
    kinds = "serviceaccounts,roles,rolebindings,cronjobs,deployments,services,networkpolicies"
    left = applied.get(kinds, "-n", NAMESPACE, "-l", "app.kubernetes.io/part-of=distillery")
    assert left["items"] == []


def test_the_watch_account_may_do_exactly_this(applied: Cluster) -> None:
    def rules(namespace: str) -> set[tuple[str, str, str]]:
        kind = {"apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectRulesReview"}
        asked = json.dumps({**kind, "spec": {"namespace": namespace}})
        token = applied.do("create", "token", "distillery-watch", "-n", NAMESPACE).strip()
        create = ("create", "--validate=false", "-f", "-", "-o", "json")
        found = json.loads(applied.do("--token", token, *create, stdin=asked))["status"]["resourceRules"]
        return {one for r in found for one in itertools.product(r["apiGroups"], r["resources"], r["verbs"])}

    everybody = rules("elsewhere")  # questions about oneself, which Kubernetes lets every account ask
    assert {group for group, _, _ in everybody} <= {"authorization.k8s.io", "authentication.k8s.io"}
    group = "pipelines.kubeflow.org"
    runs = {(group, "runs", verb) for verb in ("get", "list", "readLog", "retry")}
    assert rules(NAMESPACE) - everybody == runs | {(group, "experiments", verb) for verb in ("get", "list")}


def test_kfp_keeps_its_own_keys_when_the_store_s_are_added(kube: Cluster) -> None:
    kfp = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "kfp-launcher", "namespace": "kubeflow"}}
    shipped = json.dumps({**kfp, "data": {"defaultPipelineRoot": "minio://mlpipeline/v2/artifacts"}})
    kube.do("apply", "-f", "-", stdin=shipped)
    plain = kube.do("apply", "--dry-run=server", "-o", "json", "-k", str(K8S / "launcher"))
    assert "defaultPipelineRoot" not in json.loads(plain)["data"], "then the way round it is needless"
    kube.do(*command("k8s/launcher"))
    kube.do("apply", "-f", "-", stdin=shipped)  # an upgrade of KFP
    data = kube.get("configmap", "kfp-launcher", "-n", "kubeflow")["data"]
    assert data["defaultPipelineRoot"] == "minio://mlpipeline/v2/artifacts"
    assert "distillery-s3" in data["providers"]
    kube.do("delete", "configmap", "kfp-launcher", "-n", "kubeflow")


def test_the_retry_patch_leaves_argo_s_other_settings(kube: Cluster) -> None:
    defaults = {"ttlStrategy": {"secondsAfterCompletion": 3600}}
    retry = {"templateDefaults": {"retryStrategy": {"limit": "2", "retryPolicy": "OnError"}}}
    data = {
        "artifactRepository": "archiveLogs: true\n",
        "workflowDefaults": yaml.safe_dump({"spec": {**defaults, **retry}}),
    }
    name = {"name": "workflow-controller-configmap", "namespace": "kubeflow"}
    config = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": name, "data": data}
    kube.do("apply", "-f", "-", stdin=json.dumps(config))
    kube.do(*command("k8s/argo/retry-policy.yaml"))
    found = kube.get("configmap", name["name"], "-n", "kubeflow")["data"]
    assert found["artifactRepository"] == data["artifactRepository"]
    assert yaml.safe_load(found["workflowDefaults"]) == {"spec": defaults}
    kube.do("delete", "configmap", name["name"], "-n", "kubeflow")


def test_the_secret_s_command_makes_it_and_replaces_it(kube: Cluster, tmp_path: Path) -> None:
    text = (K8S / "s3.env.example").read_text()
    for key in ("first", "second"):
        filled = tmp_path / "s3.env"
        filled.write_text(re.sub(r"^(accesskey|secretkey)=", rf"\1={key}", text, flags=re.MULTILINE))
        made = kube.do("-n", NAMESPACE, "create", "secret", "generic", "distillery-s3", f"--from-env-file={filled}",
                       "--dry-run=client", "-o", "yaml")  # fmt: skip
        kube.do("apply", "--server-side", "-f", "-", stdin=made)
        found = kube.get("secret", "distillery-s3", "-n", NAMESPACE)
        assert set(found["data"]) == {"accesskey", "secretkey", "region"}
        assert "annotations" not in found["metadata"], "a copy of the keys where nobody looks for them"
    kube.do("-n", NAMESPACE, "delete", "secret", "distillery-s3")


def test_limits_leave_room_for_pods_that_ask_for_nothing(kube: Cluster, tmp_path: Path) -> None:
    folder = str(own(tmp_path, "gpu", ("limits",), "elsewhere"))
    kube.do("apply", "--server-side", "-k", folder)
    try:
        quotas = kube.get("resourcequota", "-n", "elsewhere")["items"]
        for quota in quotas:  # what the controller does, which does not run here
            status = {"status": {"hard": quota["spec"]["hard"], "used": dict.fromkeys(quota["spec"]["hard"], "0")}}
            name = quota["metadata"]["name"]
            kube.do("patch", "resourcequota", name, "-n", "elsewhere", "--subresource=status", "--type=merge",
                    "-p", json.dumps(status))  # fmt: skip
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": "probe", "namespace": "elsewhere"},
            "spec": {"serviceAccountName": "distillery-watch", "containers": [{"name": "main", "image": "some"}]},
        }
        made = json.loads(kube.do("create", "--dry-run=server", "-o", "json", "-f", "-", stdin=json.dumps(pod)))
        assert made["spec"]["containers"][0]["resources"] == {"requests": {"cpu": "50m", "memory": "64Mi"}}
        for gpus, fits in (("8", True), ("9", False)):
            pod["spec"]["containers"][0]["resources"] = {"limits": {"nvidia.com/gpu": gpus}}  # type: ignore[index]
            done = kube.run("create", "--dry-run=server", "-f", "-", stdin=json.dumps(pod))
            assert (done.returncode == 0) == fits, done.stderr
            assert fits or "exceeded quota" in done.stderr
    finally:
        kube.do("delete", "-k", folder, "--wait=false")


def test_every_kubectl_command_of_the_operations_page_works(kube: Cluster, tmp_path: Path) -> None:
    text = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8").replace(" NS ", " kubeflow ")
    secrets = tmp_path / "s3.env"
    secrets.write_text("accesskey=some\nsecretkey=other\n", encoding="utf-8")
    text = text.replace("k8s/s3.env ", f"{secrets} ")
    found: dict[str, list[str]] = {}
    for section in text.split("\n## ")[1:]:
        blocks = re.findall(r"```bash\n(.*?)```", section, re.DOTALL)
        lines = [line for block in blocks for line in re.sub(r"([|\\])\n +", r"\1 ", block).splitlines()]
        found[section.splitlines()[0]] = [line for line in lines if line.startswith("kubectl ")]
    assert sum(map(len, found.values())) >= 12 and len(found["Uninstall"]) == 3
    for name in ("ml-pipeline", "distillery-s3"):
        kube.do("create", "deployment", name, "-n", "kubeflow", "--image=some")
    kube.do("create", "serviceaccount", "pipeline-runner", "-n", "kubeflow")
    config = ("create", "configmap", "-n", "kubeflow", "--from-literal=workflowDefaults=x")
    kube.do(*config, "workflow-controller-configmap")
    last = found.pop("Uninstall")
    for line in [*itertools.chain(*found.values()), *last]:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", line],
            cwd=ROOT,
            env={**os.environ, "KUBECONFIG": str(kube.kubeconfig)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{line}: {done.stderr}"
    left = kube.get("all,networkpolicies,roles,quota", "-n", "kubeflow", "-l", "app.kubernetes.io/part-of=distillery")
    assert [item["kind"] for item in left["items"] if item["kind"] != "Job"] == []


def step_pod(container: dict[str, Any], pod: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """A step's pod as KFP's driver makes it of a package (backend/src/v2/driver/k8s.go), without Argo's own containers.

    Args:
        container, pod: the executor's entries in the package and among its settings for Kubernetes.
        values: of the pipeline's parameters; what a profile says is made up.
    """
    volumes = [
        {"name": one["volumeName"], "emptyDir": {k: one[k] for k in ("medium", "sizeLimit") if k in one}}
        for one in pod["emptyDirMounts"]
    ]
    mounts = [{"name": one["volumeName"], "mountPath": one["mountPath"]} for one in pod["emptyDirMounts"]]
    variables = list(container["env"])
    for one in pod["secretAsVolume"]:
        name = values[one["secretNameParameter"]["componentInputParameter"]]
        volumes.append({"name": name, "secret": {"secretName": name, "optional": one["optional"]}})
        mounts.append({"name": name, "mountPath": one["mountPath"]})
    for one in pod["secretAsEnv"]:
        name = values[one["secretNameParameter"]["componentInputParameter"]]
        for pair in one["keyToEnv"]:
            key = {"name": name, "key": pair["secretKey"], "optional": one["optional"]}
            variables.append({"name": pair["envVar"], "valueFrom": {"secretKeyRef": key}})
    user = {name: int(pod["securityContext"][name]) for name in ("runAsUser", "runAsGroup")}
    user["runAsNonRoot"] = pod["securityContext"]["runAsNonRoot"]
    # What KFP's compiler gives every launcher itself.
    hardened = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    limits = {
        "cpu": "2",
        "memory": "8Gi",
        **({values["gpu_type"]: "1"} if "accelerator" in container["resources"] else {}),
    }
    main = {
        "name": "main",
        "image": values["image"],
        "command": container["command"],
        "args": container["args"],
        "env": variables,
        "resources": {"limits": limits},
        "volumeMounts": mounts,
        "securityContext": {**hardened, "seccompProfile": {"type": "RuntimeDefault"}, **user},
    }
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "spec": {
            "restartPolicy": "Never",
            "activeDeadlineSeconds": int(pod["activeDeadlineSeconds"]),
            "containers": [main],
            "volumes": volumes,
            "tolerations": values[pod["tolerations"][0]["tolerationJson"]["componentInputParameter"]],
            "nodeSelector": values[pod["nodeSelector"]["nodeSelectorJson"]["componentInputParameter"]],
        },
    }


def command(target: str) -> list[str]:
    """The arguments of the kubectl command that a file under k8s/ tells people to use, made absolute."""
    path = ROOT / target
    text = (path / "kustomization.yaml" if path.is_dir() else path).read_text(encoding="utf-8")
    found = re.search(rf"^# +kubectl (.*{re.escape(target)})$", text, re.MULTILINE)
    assert found, f"{target} does not say how it is applied"
    return [str(path) if part == target else part for part in found[1].split()]
