"""The image as a cluster runs it: another user, a read-only root, no network. `make test-containers` builds it first.

Needs a Docker daemon. The image is `distillery:test`, or what CONTAINER_IMAGE names.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from distillery import artifact, run
from distillery.code_version import code_version
from pipelines.compile import PACKAGE

pytestmark = [pytest.mark.containers, pytest.mark.timeout(1200)]

IMAGE = os.environ.get("CONTAINER_IMAGE", "distillery:test")
MADE = ("prepare_data", "train_teacher", "gather_teachers", "synthesize", "relabel", "evaluate_student")
MOUNTED = ("/tmp", "/minio", "/s3", "/gcs", "/kfp-launcher", "/.local", "/.cache", "/.config")  # writable in a pod
# What the administrator of a strict cluster gives a pod; one core, so that sums have one order.
STRICT: dict[str, Any] = {
    "user": "1000:1000",
    "read_only": True,
    "tmpfs": dict.fromkeys(MOUNTED, "mode=1777"),
    "network_mode": "none",
    "cap_drop": ["ALL"],
    "security_opt": ["no-new-privileges"],
    "shm_size": "64m",
    "cpuset_cpus": "0",
}
EXPERIMENT = """
name: small
dataset: {name: digits, per_class: 12}
teacher: {net: convnet1, net_options: {width: 8}, epochs: 2, batch: 32}
methods:
  - {method: rded, ipc: [2], options: {mipc: 12}}
students:
  - {net: convnet1, net_options: {width: 8}, recipe: {preset: fair-soft, epochs: 3}}
labels: {mode: stored}
device: cpu
"""
RUN = """
import json, sys
from kfp import components, local
package, out, experiment, strict = sys.argv[1:]
local.init(local.DockerRunner(**json.loads(strict)), pipeline_root=out)
components.load_component_from_file(package)(experiment=experiment)
"""


def docker(*command: str, status: int = 0) -> str:
    """What `docker` prints; any other exit status than the wanted one is a failure with both outputs."""
    done = subprocess.run(["docker", *command], capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def inside(*command: str, user: str = "1000:1000", status: int = 0) -> str:
    """What a command prints in a container as strict as the pods'."""
    strict = ("--read-only", "--network=none", "--cap-drop=ALL", "--security-opt=no-new-privileges")
    return docker("run", "--rm", *strict, "--tmpfs=/tmp", f"--user={user}", IMAGE, *command, status=status)


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    """The image's configuration; without an engine or an image nothing here can be said."""
    try:
        found: dict[str, Any] = json.loads(docker("image", "inspect", IMAGE))[0]["Config"]
    except (AssertionError, FileNotFoundError) as missing:
        pytest.fail(f"{missing}\n`make test-containers` builds {IMAGE} and needs a Docker daemon", pytrace=False)
    return found


def packaged(path: Path) -> Path:
    """The committed package with the image filled in, as KFP's API server does; kfp.local leaves the parameter."""
    text = PACKAGE.read_text(encoding="utf-8")
    asked = "{{$.inputs.parameters[''pipelinechannel--image'']}}"
    assert asked in text
    path.write_text(text.replace(asked, IMAGE), encoding="utf-8")
    return path


def finished(out: Path) -> dict[str, Path]:
    """Step -> folder of the artifact that its container left."""
    found = {}
    for manifest in out.rglob("manifest.json"):
        step = manifest.parent.parent.name.replace("-", "_")
        if step in MADE:
            assert step not in found
            found[step] = manifest.parent
    return found


def test_image_says_what_it_is(config: dict[str, Any]) -> None:
    assert config["User"] == "1000:1000"
    assert not config.get("Entrypoint"), "KFP's command must not become another program's arguments"
    labels = {key.removeprefix("org.opencontainers.image."): value for key, value in config["Labels"].items()}
    assert labels["version"] == code_version(), f"{IMAGE} was built from other code: make test-containers"
    assert labels["base.name"]
    assert labels["base.digest"].startswith("sha256:")
    assert inside("python", "-c", "from distillery import code_version as c; print(c.code_version())").strip() == (
        code_version()
    )


def test_commands_of_people_and_of_pods_start_without_home_name_or_network(config: dict[str, Any]) -> None:
    assert "Usage: distillery" in inside("distillery", "--help", user="123456:0")
    assert "--function_to_execute" in inside("python3", "-m", "kfp.dsl.executor_main", "--help")
    assert "rded" in inside("distillery", "plan", "demo")


def test_nothing_is_left_of_the_build(config: dict[str, Any]) -> None:
    compilers = "for c in gcc g++ cc c++ clang ld as make cmake ninja rustc cargo go; do command -v $c; done; true"
    assert inside("sh", "-c", compilers) == ""
    left = "find /build /code /root/.cache /tmp /opt/distillery/bin/pip* -mindepth 1 2>/dev/null; true"
    assert inside("sh", "-c", left, user="0:0") == ""
    wheels = "find /opt/distillery -name '*.whl' -o -name '*.tar.gz' -path '*pip*' -o -name pip -type d"
    assert inside("sh", "-c", wheels, user="0:0") == ""
    history = docker("image", "history", "--no-trunc", "--format", "{{.CreatedBy}}", IMAGE)
    assert "PIP_INDEX" not in history
    assert "://" not in history, "no index and no proxy is written into the image"


def test_root_is_read_only_for_the_user_even_where_the_cluster_leaves_it_writable(config: dict[str, Any]) -> None:
    writable = "find / -xdev -writable -not -type l 2>/dev/null"
    strict = ("--network=none", "--cap-drop=ALL")
    found = docker("run", "--rm", *strict, IMAGE, "sh", "-c", f"{writable} || true").split()
    allowed = ("/tmp", "/var/tmp", "/run/lock", "/proc", "/sys", "/dev")
    assert [path for path in found if not path.startswith(allowed)] == []


def test_compiled_pipeline_in_containers_makes_what_one_process_makes(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "kfp"
    out.mkdir()
    out.chmod(0o777)  # the folder belongs to who runs the tests, the containers to user 1000
    given = (str(packaged(tmp_path / "package.yaml")), str(out), EXPERIMENT, json.dumps(STRICT))
    done = subprocess.run([sys.executable, "-c", RUN, *given], capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    in_containers = {step: artifact.read(folder).fingerprint for step, folder in finished(out).items()}
    assert set(in_containers) == set(MADE)
    owners = {path.stat().st_uid for path in finished(out).values()}
    assert owners == {1000}, "made by the containers and by nobody else"
    assert list(out.rglob("report.html")), "the report's charts were drawn without a writable home"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert run.run(EXPERIMENT, str(tmp_path / "run")).failures == []
    finally:
        torch.set_num_threads(before)
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    made = {e["step"]: Path(e["path"]) for e in log if e["event"] == "step" and e["status"] == "finished"}
    assert {step: artifact.read(made[step]).fingerprint for step in MADE} == in_containers
