"""The compiled packages: what is committed is what the source says, and every pod gets what it must have."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import components
from distillery.config import Cell
from pipelines import resources
from pipelines.compile import PACKAGE, SHARDED, compile_to, documents, main

STEPS = [name for name in components.__all__ if name != "IMAGE"]
PIECES = ("plan_pieces", "synthesize_piece", "bundle_pieces", "gather_pieces")  # only in the sharded one
CELL = ("synthesize", "synthesize_piece", "gather_pieces", "relabel", "evaluate_student")
TEACHERS = ("train_teacher", "gather_teachers")
LONG = ("prepare_data", *TEACHERS, *CELL, "bundle_pieces")
OWN = {"prepare_data": "data_", "gather_teachers": "teacher_"}  # prefix of the parameters in the root
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


def test_committed_package_is_what_the_source_compiles_to(tmp_path: Path, path: Path, package: list[Any]) -> None:
    fresh = documents(compile_to(tmp_path / "fresh.yaml", path))
    assert len(fresh) == 2
    assert fresh == package, f"run `make compile` and commit {path}"


def test_compiling_again_leaves_the_committed_files_alone(capsys: pytest.CaptureFixture[str]) -> None:
    before = PACKAGE.read_bytes(), SHARDED.read_bytes()
    main()
    assert capsys.readouterr().out.count("up to date") == 2
    assert (PACKAGE.read_bytes(), SHARDED.read_bytes()) == before
    assert not list(PACKAGE.parent.glob("*.part.yaml"))


def test_every_parameter_has_a_default_and_recurring_runs_can_send_strings(package: list[Any]) -> None:
    parameters = package[0]["root"]["inputDefinitions"]["parameters"]
    kinds = {name: p["parameterType"] for name, p in parameters.items()}
    asked = {
        "experiment",
        "code_version",
        "image",
        "gpu_type",
        "teacher_gpus",
        "s3_endpoint",
        "s3_secret",
        "checkpoints",
    }
    assert asked <= set(parameters)
    assert all("defaultValue" in p for p in parameters.values())
    assert parameters["experiment"]["defaultValue"] == "demo"
    assert parameters["image"]["defaultValue"] == components.IMAGE
    others = {name: kind for name, kind in kinds.items() if kind != "STRING"}
    assert others == {"tolerations": "LIST", "node_selector": "STRUCT"}, "Kubernetes' own shapes"


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
        spec, inputs, need = (
            container(package, name),
            task(package, name)["inputs"]["parameters"],
            resources.NEEDS[name],
        )
        assert spec["image"] == "{{$.inputs.parameters['pipelinechannel--image']}}"
        limits = spec["resources"]
        assert limits["resourceCpuLimit"]
        assert limits["resourceMemoryLimit"]
        own = OWN.get(name, "" if name in INNER[path] else None)
        if own is None:
            assert (limits["resourceCpuLimit"], limits["resourceMemoryLimit"]) == (need.cpu, need.memory)
        else:
            assert {f"pipelinechannel--{own}cpu", f"pipelinechannel--{own}memory"} <= set(inputs)
        if name in (*CELL, *TEACHERS):
            gpus = limits["accelerator"]
            assert gpus["resourceType"] == "{{$.inputs.parameters['pipelinechannel--gpu_type']}}"
            assert gpus["resourceCount"] == f"{{{{$.inputs.parameters['pipelinechannel--{own}gpus']}}}}"
        else:
            assert "accelerator" not in limits


def test_each_cell_and_piece_brings_its_own_resources(path: Path, package: list[Any]) -> None:
    inner = [t for _, name, t in tasks(package) if name in set(INNER[path].values()) - {"teacher"}]
    assert len(inner) == (2 if path == SHARDED else 1)
    for name in ("cpu", "memory", "gpus"):
        for each in inner:
            expression = each["inputs"]["parameters"][name]["parameterExpressionSelector"]
            assert expression == f'parseJson(string_value)["{name}"]'
    assert {"cpu", "memory", "gpus"} <= set(Cell.model_fields)


def test_pod_has_memory_home_user_place_and_deadline(package: list[Any], steps: list[str]) -> None:
    for name in steps:
        settings, need = pod(package, name), resources.NEEDS[name]
        (shm,) = settings["emptyDirMounts"]
        assert (shm["mountPath"], shm["medium"], shm["sizeLimit"]) == ("/dev/shm", "Memory", need.shm)
        assert int(settings["activeDeadlineSeconds"]) == need.deadline > 0
        assert settings["securityContext"] == {"runAsUser": "1000", "runAsGroup": "1000", "runAsNonRoot": True}
        (secret,) = settings["secretAsEnv"]
        assert secret["optional"] is True
        assert secret["secretNameParameter"] == {"componentInputParameter": "s3_secret"}
        assert {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"} <= {each["envVar"] for each in secret["keyToEnv"]}
        assert settings["tolerations"] == [{"tolerationJson": {"componentInputParameter": "tolerations"}}]
        assert settings["nodeSelector"] == {"nodeSelectorJson": {"componentInputParameter": "node_selector"}}
        places = {each["name"]: each["value"] for each in container(package, name)["env"]}
        assert set(places) == {"HOME", "XDG_CACHE_HOME", "TORCH_HOME", "MPLCONFIGDIR"}
        assert all(place.startswith("/tmp") for place in places.values())


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
