"""k8s/: every overlay with every component is valid for all supported Kubernetes, restricted, and free of secrets."""

import functools
import json
import re
import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from _manifests import K8S, NAMESPACE, OVERLAYS, ROOT, Doc, build, combinations, kubectl, own, pod_templates
from _servers import available, running
from kubernetes_validate import utils
from minio import Minio
from typer.main import get_command

from distillery.__main__ import app
from pipelines.api import TOKEN_FILE
from pipelines.resources import SECRET
from pipelines.watch import watch

OPERATIONS = ROOT / "docs" / "operations.md"
VERSIONS = [f"1.{minor}" for minor in range(30, 38)]
# Kueue's, and the Prometheus Operator's; the API server test has their definitions.
FOREIGN = {"ResourceFlavor", "ClusterQueue", "LocalQueue", "ServiceMonitor", "PrometheusRule"}
CLUSTER_WIDE = {"PriorityClass", "ResourceFlavor", "ClusterQueue"}


@pytest.fixture(autouse=True, scope="module")
def schemas_read_once() -> object:
    """The validator parses 1 MiB of definitions for every document otherwise."""
    plain = utils.schema_contents
    utils.schema_contents = functools.cache(plain)
    yield
    utils.schema_contents = plain


@functools.cache
def overlay(name: str) -> str:
    return json.dumps(build(K8S / "overlays" / name))


@pytest.fixture(params=OVERLAYS)
def documents(request: pytest.FixtureRequest) -> list[Doc]:
    found: list[Doc] = json.loads(overlay(request.param))
    return found


@pytest.fixture(params=OVERLAYS)
def everything(request: pytest.FixtureRequest, tmp_path: Path) -> list[Doc]:
    """An overlay with all components."""
    (chosen,) = [one.values[1] for one in combinations() if one.values[0] == request.param][-1:]
    return build(own(tmp_path, request.param, chosen))


@pytest.mark.parametrize(("name", "chosen"), combinations())
def test_every_combination_is_valid_for_every_kubernetes(tmp_path: Path, name: str, chosen: tuple[str, ...]) -> None:
    found = build(own(tmp_path, name, chosen))
    names = [(d["kind"], d["metadata"].get("namespace", ""), d["metadata"]["name"]) for d in found]
    assert len(names) == len(set(names))
    subjects = [s["namespace"] for d in found if d["kind"] == "RoleBinding" for s in d["subjects"]]
    assert set(subjects) == {NAMESPACE}
    for doc in found:
        assert doc["kind"] in CLUSTER_WIDE or doc["metadata"]["namespace"] == NAMESPACE, doc["kind"]
        for version in VERSIONS:
            if doc["kind"] not in FOREIGN:
                kubernetes_validate.validate(doc, version, strict=True)


def test_the_validator_refuses_a_misspelt_field() -> None:
    doc = next(d for d in json.loads(overlay("gpu")) if d["kind"] == "CronJob")
    doc["spec"]["concurencyPolicy"] = doc["spec"].pop("concurrencyPolicy")
    for version in VERSIONS:
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(doc, version, strict=True)


def test_overlays_stay_inside_their_namespace(documents: list[Doc]) -> None:
    assert not {d["kind"] for d in documents} & CLUSTER_WIDE
    assert len({d["metadata"]["namespace"] for d in documents}) == 1


def test_bindings_name_accounts_that_exist(documents: list[Doc]) -> None:
    accounts = {(d["metadata"]["namespace"], d["metadata"]["name"]) for d in documents if d["kind"] == "ServiceAccount"}
    bound = [s for d in documents if d["kind"] == "RoleBinding" for s in d["subjects"]]
    used = {(d["metadata"]["namespace"], d["metadata"]["name"]) for d in documents if d["kind"] == "Role"}
    assert bound and {(s["namespace"], s["name"]) for s in bound} <= accounts
    refs = [(d["metadata"]["namespace"], d["roleRef"]["name"]) for d in documents if d["kind"] == "RoleBinding"]
    assert set(refs) == used


def test_labels_follow_the_convention(everything: list[Doc]) -> None:
    for doc in everything:
        labels = doc["metadata"].get("labels", {})
        assert labels.get("app.kubernetes.io/part-of") == "distillery", (doc["kind"], labels)
        assert labels.get("app.kubernetes.io/name") in ("distillery", "minio"), (doc["kind"], labels)


def test_pods_are_restricted_and_bounded(everything: list[Doc]) -> None:
    found = list(pod_templates(everything))
    assert found
    for name, template in found:
        pod = template["spec"]
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] > 0, name
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert pod["automountServiceAccountToken"] is False, name
        for container in pod["containers"]:
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False and context["readOnlyRootFilesystem"], name
            assert context["capabilities"] == {"drop": ["ALL"]}, name
            assert {"cpu", "memory"} <= set(container["resources"]["requests"]), name
            assert {"cpu", "memory"} <= set(container["resources"]["limits"]), name
            assert "/tmp" in [m["mountPath"] for m in container["volumeMounts"]], name


def test_one_line_says_which_image_runs(everything: list[Doc]) -> None:
    wanted = dict(line.split("=", 1) for line in (K8S / "image" / "image.env").read_text().split())["IMAGE"]
    ours = [c for _, template in pod_templates(everything) for c in template["spec"]["containers"]]
    images = {c["image"] for c in ours if c["name"] == "distillery"}
    assert images == {wanted}
    assert all(":" in c["image"] or "@sha256:" in c["image"] for c in ours)


def test_selectors_find_the_pods_they_are_for() -> None:
    documents = json.loads(overlay("local"))
    labels = {name: template["metadata"]["labels"] for name, template in pod_templates(documents)}

    def chosen(selector: dict[str, str]) -> set[str]:
        return {name for name, have in labels.items() if selector.items() <= have.items()}

    service = next(d for d in documents if d["kind"] == "Service")
    deployment = next(d for d in documents if d["kind"] == "Deployment")
    policy = next(d for d in documents if d["kind"] == "NetworkPolicy")
    assert chosen(service["spec"]["selector"]) == {"Deployment/distillery-s3"}
    assert chosen(deployment["spec"]["selector"]["matchLabels"]) == {"Deployment/distillery-s3"}
    (one_of,) = policy["spec"]["podSelector"]["matchExpressions"]
    wanted = [{**policy["spec"]["podSelector"]["matchLabels"], one_of["key"]: value} for value in one_of["values"]]
    assert set().union(*map(chosen, wanted)) == {"CronJob/distillery-watch", "Job/distillery-bucket"}


def test_no_secret_is_rendered_and_the_filled_in_template_stays_out_of_git(documents: list[Doc]) -> None:
    assert "Secret" not in {d["kind"] for d in documents}
    ignored = subprocess.run(["git", "check-ignore", "-q", "k8s/s3.env"], cwd=ROOT)
    assert ignored.returncode == 0, "git would take k8s/s3.env"


def test_the_secret_has_the_keys_that_pods_read() -> None:
    lines = [line for line in (K8S / "s3.env.example").read_text().splitlines() if not line.startswith("#")]
    template = dict(line.split("=", 1) for line in lines)
    assert set(template) <= set(SECRET)
    assert not template["accesskey"] and not template["secretkey"]
    read = {
        value["valueFrom"]["secretKeyRef"]["key"]
        for _, pod in pod_templates(json.loads(overlay("local")))
        for container in pod["spec"]["containers"]
        for value in container["env"]
        if "secretKeyRef" in value.get("valueFrom", {})
    }
    assert read == {"accesskey", "secretkey"} <= set(template)


def test_kfp_s_store_points_to_what_the_local_overlay_makes() -> None:
    (found,) = build(K8S / "launcher")
    assert set(found["data"]) == {"providers"}, "another key would be taken from KFP"
    assert "labels" not in found["metadata"]
    default = yaml.safe_load(found["data"]["providers"])["minio"]["default"]
    service = next(d for d in json.loads(overlay("local")) if d["kind"] == "Service")
    host, port = default["endpoint"].split(":")
    assert host == f"{service['metadata']['name']}.{service['metadata']['namespace']}"
    assert int(port) == service["spec"]["ports"][0]["port"]
    assert default["credentials"]["secretRef"]["secretName"] == "distillery-s3"


def test_the_watch_job_calls_a_command_that_exists(documents: list[Doc]) -> None:
    job = next(template for name, template in pod_templates(documents) if name == "CronJob/distillery-watch")
    (container,) = job["spec"]["containers"]
    assert container["command"] == ["python", "-m", "pipelines", "watch"]
    given = watch.make_context("watch", list(container["args"])).params
    assert given["once"] and given["retries"] == 3
    assert given["namespace"] == "$(NAMESPACE)" and "NAMESPACE" in {e["name"] for e in container["env"]}
    mounts = {m["mountPath"]: m["name"] for m in container["volumeMounts"]}
    tokens = {v["name"]: v["projected"]["sources"] for v in job["spec"]["volumes"] if "projected" in v}
    ((source,),) = [tokens[mounts[str(TOKEN_FILE.parent)]]]
    assert source["serviceAccountToken"]["audience"] == "pipelines.kubeflow.org"
    assert source["serviceAccountToken"]["path"] == TOKEN_FILE.name


def test_the_folder_of_one_s_own_in_the_docs_builds(tmp_path: Path) -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", OPERATIONS.read_text(encoding="utf-8"), re.DOTALL)
    (text,) = [block for block in blocks if "kind: Kustomization" in block]
    (tmp_path / "k8s").symlink_to(K8S)
    (tmp_path / "my-cluster").mkdir()
    (tmp_path / "my-cluster" / "kustomization.yaml").write_text(text, encoding="utf-8")
    found = build(tmp_path / "my-cluster")
    quotas = {d["metadata"]["name"]: d["spec"]["hard"] for d in found if d["kind"] == "ResourceQuota"}
    assert quotas["distillery-gpu"] == {"requests.nvidia.com/gpu": "32"} and "distillery" in quotas
    assert {d["metadata"]["namespace"] for d in found} == {"team-a"}


def test_the_folder_with_monitoring_in_the_docs_builds(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "monitoring.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    (tmp_path / "k8s").symlink_to(K8S)
    (tmp_path / "my-cluster").mkdir()
    (tmp_path / "my-cluster" / "kustomization.yaml").write_text(text, encoding="utf-8")
    found = {
        (d["kind"], re.sub("-[a-z0-9]{10}$", "", d["metadata"]["name"])): d for d in build(tmp_path / "my-cluster")
    }
    settings = found["ConfigMap", "distillery-exporter"]
    assert settings["data"] == {"PLACE": "s3://my-bucket/runs", "AWS_ENDPOINT_URL": "https://s3.example.com"}
    (container,) = found["Deployment", "distillery-exporter"]["spec"]["template"]["spec"]["containers"]
    assert container["envFrom"] == [{"configMapRef": {"name": settings["metadata"]["name"]}}]
    rules = found["PrometheusRule", "distillery"]
    links = [rule["annotations"]["runbook_url"] for rule in rules["spec"]["groups"][-1]["rules"]]
    assert links and all(link.startswith("https://git.example.com/distillery/docs/runbooks.md#d") for link in links)
    assert rules["metadata"]["labels"]["release"] == "kube-prometheus-stack"
    assert ("ConfigMap", "distillery-runbooks") not in found


def test_prometheus_finds_the_exporter_and_grafana_the_dashboards(tmp_path: Path) -> None:
    found = {
        (d["kind"], d["metadata"]["name"].split("-")[1]): d
        for d in build(own(tmp_path, "gpu", ("monitoring",)))
        if "-" in d["metadata"]["name"]
    }
    deployment, service = found["Deployment", "exporter"], found["Service", "exporter"]
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    for selector in (
        deployment["spec"]["selector"]["matchLabels"],
        service["spec"]["selector"],
        found["NetworkPolicy", "exporter"]["spec"]["podSelector"]["matchLabels"],
    ):
        assert selector.items() <= labels.items() and "app.kubernetes.io/component" in selector
    monitor = found["ServiceMonitor", "exporter"]["spec"]
    assert monitor["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    (endpoint,), (port,) = monitor["endpoints"], service["spec"]["ports"]
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    assert endpoint["port"] == port["name"] and port["targetPort"] == container["ports"][0]["name"]
    command = get_command(app).commands["exporter"]
    assert container["command"] == ["distillery", "exporter"]
    given = command.make_context("exporter", list(container["args"])).params
    assert given["place"] == "$(PLACE)" and "PLACE" in found["ConfigMap", "exporter"]["data"]
    assert given["port"] == container["ports"][0]["containerPort"]
    dashboards = found["ConfigMap", "dashboards"]
    assert dashboards["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert {json.loads(text)["uid"] for text in dashboards["data"].values()} == {
        f"distillery-{name}" for name in ("overview", "run", "gpu")
    }


def test_the_read_only_patch_in_the_docs_does_that(tmp_path: Path) -> None:
    (text,) = re.findall(
        r"COMPILED_PIPELINE_SPEC_PATCH='(\{\"podSpecPatch.*?)'", OPERATIONS.read_text(encoding="utf-8")
    )
    patch = json.loads(json.loads(text)["podSpecPatch"])
    volume = {"name": "scratch", "emptyDir": {"sizeLimit": "1Gi"}}
    scratch = {"name": "scratch", "mountPath": "/tmp"}
    main = {"name": "main", "image": "some", "command": ["work"], "volumeMounts": [scratch]}
    spec = {"containers": [{"name": "wait", "image": "argo"}, main], "volumes": [volume]}
    pod = tmp_path / "pod.json"
    pod.write_text(json.dumps({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "step"}, "spec": spec}))
    given = [kubectl(), "patch", "--local", "-f", str(pod), "--type=strategic", "-o", "json", "-p"]
    done = subprocess.run([*given, json.dumps({"spec": patch})], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    containers = {c["name"]: c for c in json.loads(done.stdout)["spec"]["containers"]}
    assert containers["main"]["securityContext"] == {"readOnlyRootFilesystem": True}
    assert containers["main"]["command"] == ["work"] and "securityContext" not in containers["wait"]
    assert [m["mountPath"] for m in containers["main"]["volumeMounts"]] == ["/tmp"], "one mount, whoever gave it"


def test_the_bucket_job_makes_the_buckets_and_can_run_again(tmp_path: Path) -> None:
    job = next(pod for name, pod in pod_templates(json.loads(overlay("local"))) if name == "Job/distillery-bucket")
    (container,) = job["spec"]["containers"]
    with running(available()[0], tmp_path) as server:
        given = {"AWS_ACCESS_KEY_ID": server.access, "AWS_SECRET_ACCESS_KEY": server.secret}
        given |= {e["name"]: e["value"] for e in container["env"] if "value" in e}
        given |= {"ENDPOINT": f"127.0.0.1:{server.port}"}
        assert {e["name"] for e in container["env"]} == set(given)
        for _ in range(2):
            subprocess.run([sys.executable, *container["command"][1:], *container["args"]], env=given, check=True)
        client = Minio(given["ENDPOINT"], server.access, server.secret, secure=False)
        assert [bucket.name for bucket in client.list_buckets()] == ["distillery", "mlpipeline"]
        bad = subprocess.run(
            [sys.executable, *container["command"][1:], *container["args"]],
            env={**given, "AWS_SECRET_ACCESS_KEY": "wrong"},
            capture_output=True,
        )
        assert bad.returncode != 0
