"""The compiled packages: what is committed is what the source says, and every pod gets what it must have."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kfp import dsl, kubernetes
from kfp.compiler import Compiler

import components
from distillery.config import Cell
from distillery.profiles import Wish
from pipelines import resources
from pipelines.compile import PACKAGE, SHARDED, documents
from pipelines.package import changed
from pipelines.package import main as write

STEPS = [name for name in components.__all__ if name != "IMAGE"]
PIECES = ("plan_pieces", "synthesize_piece", "bundle_pieces", "gather_pieces")  # only in the sharded one
CELL = ("synthesize", "synthesize_piece", "gather_pieces", "relabel", "evaluate_student")
TEACHERS = ("train_teacher", "gather_teachers")
LONG = ("prepare_data", *TEACHERS, *CELL, "bundle_pieces")
COPIES = ("gather_pieces",)  # the step of a cell that never has a GPU
# What a step's requests are called where it stands: outputs of plan in the root, parameters of an inner pipeline.
OWN = {
    "prepare_data": "plan-prepare_",
    "gather_teachers": "plan-gather_",
    "train_teacher": "",
    "synthesize_piece": "synthesize_",
}
OWN |= {name: f"{name}_" for name in ("synthesize", "gather_pieces", "relabel", "evaluate_student")}
PLAIN = {"train_teacher": "teacher", "synthesize": "cell", "relabel": "cell", "evaluate_student": "cell"}
INNER = {
    PACKAGE: PLAIN,
    SHARDED: {"train_teacher": "teacher", "synthesize_piece": "piece"}
    | dict.fromkeys(("gather_pieces", "relabel", "evaluate_student"), "sharded-cell"),
}  # the inner pipeline in which a step stands; all others stand in the root


@pytest.fixture(scope="module", params=[PACKAGE, SHARDED], ids=["distill", "sharded"])
def path(request: pytest.FixtureRequest) -> Path:
    """A committed package."""
    found: Path = request.param
    return found


@pytest.fixture(scope="module")
def package(path: Path) -> list[Any]:
    """Its specification and Kubernetes settings."""
    return documents(path)


@pytest.fixture(scope="module")
def steps(path: Path) -> list[str]:
    """Its steps in flow order."""
    return [name for name in STEPS if (name != "synthesize" if path == SHARDED else name not in PIECES)]


def dash(name: str) -> str:
    """KFP's spelling of a step."""
    return name.replace("_", "-")


def container(package: list[Any], name: str) -> dict[str, Any]:
    """What the specification says of a step's container."""
    found: dict[str, Any] = package[0]["deploymentSpec"]["executors"][f"exec-{dash(name)}"]["container"]
    return found


def pod(package: list[Any], name: str) -> dict[str, Any]:
    """What the Kubernetes settings say of a step's pod."""
    found: dict[str, Any] = package[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"][f"exec-{dash(name)}"]
    return found


def tasks(package: list[Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(where, name, task) of every task of every DAG."""
    dags = {"root": package[0]["root"]} | package[0]["components"]
    for where, part in dags.items():
        for name, task in part.get("dag", {}).get("tasks", {}).items():
            yield where, name, task


def task(package: list[Any], name: str) -> dict[str, Any]:
    """The one task of a step."""
    (found,) = [task for _, each, task in tasks(package) if each == dash(name)]
    return found


def in_a_child(*arguments: str) -> str:
    """What Python prints in a child: KFP walks all modules at every setting, so few of them are quicker."""
    command, root = [sys.executable, *arguments], PACKAGE.parent.parent
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_committed_package_is_what_the_source_compiles_to(tmp_path: Path, path: Path, package: list[Any]) -> None:
    code = "import sys, pathlib; from pipelines.compile import compile_to; compile_to(*map(pathlib.Path, sys.argv[1:]))"
    in_a_child("-c", code, str(tmp_path / "fresh.yaml"), str(path))
    fresh = documents(tmp_path / "fresh.yaml")
    assert len(fresh) == 2
    assert fresh == package, f"run `make compile` and commit {path}"


def test_compiling_again_leaves_the_committed_files_alone() -> None:
    before = PACKAGE.read_bytes(), SHARDED.read_bytes()
    assert in_a_child("-m", "pipelines.compile").count("up to date") == 2
    assert (PACKAGE.read_bytes(), SHARDED.read_bytes()) == before
    assert not list(PACKAGE.parent.glob("*.part.yaml"))


def test_every_parameter_has_a_default_and_recurring_runs_can_send_strings(package: list[Any]) -> None:
    parameters = package[0]["root"]["inputDefinitions"]["parameters"]
    defaults = {name: p["defaultValue"] for name, p in parameters.items()}
    assert defaults == dict.fromkeys(vars(Wish()), "") | {
        "experiment": "demo",
        "code_version": "",
        "attempt": "1",
        "image": components.IMAGE,
        "gpu_type": "nvidia.com/gpu",
        "tolerations": [],
        "node_selector": {},
        "s3_endpoint": "",
        "s3_region": "",
        "s3_secret": "distillery-s3",
        "s3_ca": "distillery-s3-ca",
        "checkpoints": "",
        "history": "",
        "schedule": "",
    }
    others = {name: p["parameterType"] for name, p in parameters.items() if p["parameterType"] != "STRING"}
    assert others == {"tolerations": "LIST", "node_selector": "STRUCT"}, "Kubernetes' own shapes"
    page = (PACKAGE.parent.parent / "docs" / "resources.md").read_text(encoding="utf-8")
    assert [name for name in defaults if f"`{name}`" not in page] == [], "docs/resources.md lists every parameter"


def test_both_packages_take_the_same_parameters() -> None:
    one, other = (documents(p)[0]["root"]["inputDefinitions"]["parameters"] for p in (PACKAGE, SHARDED))
    assert one == other


def made_by(package: list[Any], name: str, artifact: str) -> str:
    """The task whose artifact a step takes."""
    source = task(package, name)["inputs"]["artifacts"][artifact]
    return str(source["taskOutputArtifact"]["producerTask"])


def test_dag_is_the_flow(path: Path, package: list[Any], steps: list[str]) -> None:
    found = [(name, where) for where, name, _ in tasks(package) if name.replace("-", "_") in STEPS]
    inner = {name: f"comp-{inner}" for name, inner in INNER[path].items()}
    assert dict(found) == {dash(name): inner.get(name, "root") for name in steps}
    assert len(found) == len(steps)
    assert made_by(package, "gather_teachers", "models").startswith("for-loop")
    assert made_by(package, "report", "results").startswith("for-loop")
    assert made_by(package, "report", "results") != made_by(package, "gather_teachers", "models")
    failures = task(package, "verdict")["inputs"]["parameters"]["failures"]["taskOutputParameter"]
    assert failures == {"producerTask": "report", "outputParameterKey": "Output"}
    early = {"prepare_data": "upstream", "plan_teachers": "gathering", "gather_teachers": "gathering"}
    for name, text in early.items():
        experiment = task(package, name)["inputs"]["parameters"]["experiment"]["taskOutputParameter"]
        assert experiment == {"producerTask": "plan", "outputParameterKey": text}, "not the whole experiment"


def test_pieces_are_bundled_between_two_loops() -> None:
    package = documents(SHARDED)
    assert made_by(package, "bundle_pieces", "made").startswith("for-loop")
    (inner,) = [t for _, name, t in tasks(package) if name == "sharded-cell"]
    assert inner["inputs"]["artifacts"]["pieces"] == {"componentInputArtifact": "pipelinechannel--bundle-pieces-pieces"}
    cells = task(package, "plan_pieces")["inputs"]["parameters"]["cells"]["taskOutputParameter"]
    assert cells == {"producerTask": "plan", "outputParameterKey": "Output"}


def test_flat_loops_over_the_whole_items_and_no_conditions(path: Path, package: list[Any]) -> None:
    found = [t for _, _, t in tasks(package) if "parameterIterator" in t or "artifactIterator" in t]
    limits = sorted(t["iteratorPolicy"]["parallelismLimit"] for t in found)
    assert limits == [resources.CELLS_AT_ONCE] * 2 + [resources.PIECES_AT_ONCE] * (path == SHARDED)
    assert [where for where, _, t in tasks(package) if "parameterIterator" in t] == ["root"] * len(found)
    assert not [name for _, name, t in tasks(package) if "triggerPolicy" in t]


def test_no_step_is_retried_by_kfp(package: list[Any]) -> None:
    assert not [name for _, name, t in tasks(package) if "retryPolicy" in t]


def test_every_component_has_its_row() -> None:
    assert list(resources.NEEDS) == STEPS


def test_image_and_limits_are_parameters(path: Path, package: list[Any], steps: list[str]) -> None:
    for name in steps:
        spec, need = container(package, name), resources.NEEDS[name]
        inputs = task(package, name)["inputs"]["parameters"]
        assert spec["image"] == "{{$.inputs.parameters['pipelinechannel--image']}}"
        limits, said = spec["resources"], [need.cpu, need.memory]
        assert bool(need.cpu) == bool(need.memory) == (name not in OWN), "in the table, or from plan"
        if name in OWN:
            names = [f"pipelinechannel--{OWN[name]}{what}" for what in ("cpu", "memory")]
            assert set(names) <= set(inputs)
            said = [f"{{{{$.inputs.parameters['{each}']}}}}" for each in names]
        assert [limits["resourceCpuLimit"], limits["resourceMemoryLimit"]] == said
        if name in {*CELL, *TEACHERS} - {*COPIES}:
            gpus = limits["accelerator"]
            assert gpus["resourceType"] == "{{$.inputs.parameters['pipelinechannel--gpu_type']}}"
            assert gpus["resourceCount"] == f"{{{{$.inputs.parameters['pipelinechannel--{OWN[name]}gpus']}}}}"
        else:
            assert "accelerator" not in limits, f"{name} needs no GPU"


def test_everything_asked_for_reaches_plan(package: list[Any]) -> None:
    inputs = task(package, "plan")["inputs"]["parameters"]
    assert {name: inputs[name] for name in vars(Wish())} == {
        name: {"componentInputParameter": name} for name in vars(Wish())
    }
    teachers = task(package, "plan_teachers")["inputs"]["parameters"]
    assert {"teacher_cpu", "teacher_memory", "teacher_gpus"} <= set(teachers)


def test_each_item_of_a_loop_brings_its_own_requests(path: Path, package: list[Any]) -> None:
    inner = [t for _, name, t in tasks(package) if name in set(INNER[path].values())]
    assert len(inner) == (3 if path == SHARDED else 2)
    item = {"teacher", "experiment", "cpu", "memory", "gpus"} | set(Cell.model_fields)
    for each in inner:
        inputs = each["inputs"]["parameters"]
        asked = [name for name in inputs if name.rpartition("_")[2] in ("cpu", "memory", "gpus")]
        assert len(asked) >= 3
        for name in asked:
            assert inputs[name]["parameterExpressionSelector"] == f'parseJson(string_value)["{name}"]'
            assert name in item


def test_pod_has_volumes_home_user_place_and_deadline(package: list[Any], steps: list[str]) -> None:
    for name in steps:
        settings, need = pod(package, name), resources.NEEDS[name]
        shm, scratch = settings["emptyDirMounts"]
        assert (shm["mountPath"], shm["medium"], shm["sizeLimit"]) == ("/dev/shm", "Memory", need.shm)
        assert (scratch["mountPath"], scratch["sizeLimit"], scratch.get("medium")) == ("/tmp", need.scratch, None)
        assert int(settings["activeDeadlineSeconds"]) == need.deadline > 0
        assert settings["securityContext"] == {"runAsUser": "1000", "runAsGroup": "1000", "runAsNonRoot": True}
        (secret,) = settings["secretAsEnv"]
        assert secret["optional"] is True
        assert secret["secretNameParameter"] == {"componentInputParameter": "s3_secret"}
        assert {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"} <= {each["envVar"] for each in secret["keyToEnv"]}
        (authority,) = settings["secretAsVolume"]
        assert authority["optional"] is True, "most stores have none"
        assert authority["secretNameParameter"] == {"componentInputParameter": "s3_ca"}
        assert settings["tolerations"] == [{"tolerationJson": {"componentInputParameter": "tolerations"}}]
        assert settings["nodeSelector"] == {"nodeSelectorJson": {"componentInputParameter": "node_selector"}}
        assert not {"imagePullSecret", "podMetadata"} & set(settings), "see pipelines/package.py"
        places = {each["name"]: each["value"] for each in container(package, name)["env"]}
        assert places.pop("DISTILLERY_S3_CA") == f"{authority['mountPath']}/ca.crt"
        assert set(places) == {"HOME", "XDG_CACHE_HOME", "TORCH_HOME", "MPLCONFIGDIR"}
        assert all(place.startswith(scratch["mountPath"]) for place in places.values())


def test_no_task_has_a_display_name(package: list[Any], steps: list[str]) -> None:
    assert [name for name in steps if task(package, name)["taskInfo"]["name"] != dash(name)] == []


def compiled(tmp_path: Path, work: Any) -> list[Any]:
    """A package of one step, after `work` on its task."""

    @dsl.pipeline(name="one")
    def one() -> None:
        work(components.verdict(failures=[]))

    Compiler().compile(one, str(tmp_path / "one.yaml"))
    return documents(tmp_path / "one.yaml")


def test_copies_have_what_kfp_would_compile(tmp_path: Path) -> None:
    start = compiled(tmp_path, lambda task: kubernetes.set_timeout(task, 60))

    def work(task: dsl.PipelineTask) -> None:
        kubernetes.set_timeout(task, 60)
        kubernetes.add_pod_label(task, "kueue.x-k8s.io/queue-name", "team-a")
        kubernetes.set_image_pull_secrets(task, ["registry"])

    assert changed(start, queue="team-a", pull_secret="registry") == compiled(tmp_path, work)
    assert changed(start) == start


def test_copies_change_every_pod_and_every_loop_and_nothing_else(
    package: list[Any], path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "copy.yaml"
    asked = ["--package", str(path), "--out", str(out), "--queue", "team-a", "--pull-secret", "r", "--parallelism", "3"]
    assert write(asked) == 0
    assert str(out) in capsys.readouterr().out
    made = documents(out)
    pods = made[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"].values()
    assert {each.pop("podMetadata")["labels"]["kueue.x-k8s.io/queue-name"] for each in pods} == {"team-a"}
    assert {each.pop("imagePullSecret")[0]["secretName"] for each in pods} == {"r"}
    loops = [t["iteratorPolicy"] for _, _, t in tasks(made) if "iteratorPolicy" in t]
    before = [t["iteratorPolicy"] for _, _, t in tasks(package) if "iteratorPolicy" in t]
    assert {policy["parallelismLimit"] for policy in loops} == {3}
    for policy, old in zip(loops, before, strict=True):
        policy.update(old)
    assert made == package


def test_what_is_no_package_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other.yaml").write_text("a: 1\n")
    asked = ["--package", str(tmp_path / "other.yaml"), "--out", str(tmp_path / "out.yaml"), "--queue", "q"]
    assert write(asked) == 2
    assert "1 documents without Kubernetes settings" in capsys.readouterr().err
    assert write(["--out", str(tmp_path / "out.yaml"), "--parallelism", "-1"]) == 2
    assert not (tmp_path / "out.yaml").exists()


def test_caching_follows_the_table(package: list[Any], steps: list[str]) -> None:
    for name in steps:
        assert task(package, name)["cachingOptions"].get("enableCache", False) is resources.NEEDS[name].cached
        assert resources.NEEDS[name].cached is (name in LONG)


def test_cached_failures_have_a_way_out(package: list[Any], steps: list[str]) -> None:
    for name in set(CELL) & set(steps):
        assert task(package, name)["inputs"]["parameters"]["attempt"] == {"componentInputParameter": "attempt"}


def test_package_fits_the_api_and_names_no_machine(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text) < 200_000, "Argo keeps a workflow in about one megabyte"
    assert str(path.parent.parent) not in text
    assert "pip install" not in text
