"""The compiled package: what is committed is what the source says, and every pod gets what it must have."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import components
from distillery.config import Cell
from pipelines import resources
from pipelines.compile import PACKAGE, compile_to, documents, main

STEPS = [name for name in components.__all__ if name != "IMAGE"]
CELL = ("synthesize", "relabel", "evaluate_student")
TEACHERS = ("train_teacher", "gather_teachers")
LONG = ("prepare_data", *TEACHERS, *CELL)
OWN = {"prepare_data": "data_", "gather_teachers": "teacher_"}  # prefix of the parameters in the root
INNER = {"train_teacher": "comp-teacher"} | dict.fromkeys(CELL, "comp-cell")


@pytest.fixture(scope="module")
def package() -> list[Any]:
    """The committed package: specification and Kubernetes settings."""
    return documents(PACKAGE)


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


def test_committed_package_is_what_the_source_compiles_to(tmp_path: Path, package: list[Any]) -> None:
    fresh = documents(compile_to(tmp_path / "fresh.yaml"))
    assert len(fresh) == 2
    assert fresh == package, "run `make compile` and commit pipelines/distill_pipeline.yaml"


def test_compiling_again_leaves_the_committed_file_alone(capsys: pytest.CaptureFixture[str]) -> None:
    before = PACKAGE.read_bytes()
    main()
    assert "up to date" in capsys.readouterr().out
    assert PACKAGE.read_bytes() == before
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


def test_dag_is_the_flow(package: list[Any]) -> None:
    places = {name: where for where, name, _ in tasks(package) if name.replace("-", "_") in STEPS}
    assert sorted(places) == sorted(map(dash, STEPS))
    loop = next(where for where, name, _ in tasks(package) if name == "teacher")
    assert task(package, "gather_teachers")["inputs"]["artifacts"]["models"]["taskOutputArtifact"] == {
        "producerTask": loop.removeprefix("comp-"),
        "outputArtifactKey": "pipelinechannel--teacher-Output",
    }
    for name in STEPS:
        assert places[dash(name)] == INNER.get(name, "root")
    source = task(package, "report")["inputs"]["artifacts"]["results"]["taskOutputArtifact"]
    assert source["producerTask"].startswith("for-loop")
    failures = task(package, "verdict")["inputs"]["parameters"]["failures"]["taskOutputParameter"]
    assert failures == {"producerTask": "report", "outputParameterKey": "Output"}
    early = {"prepare_data": "upstream", "plan_teachers": "gathering", "gather_teachers": "gathering"}
    for name, text in early.items():
        experiment = task(package, name)["inputs"]["parameters"]["experiment"]["taskOutputParameter"]
        assert experiment == {"producerTask": "plan", "outputParameterKey": text}, "not the whole experiment"


def test_flat_loops_over_teachers_and_cells_and_no_conditions(package: list[Any]) -> None:
    loops = [
        (where, name, t) for where, name, t in tasks(package) if "parameterIterator" in t or "artifactIterator" in t
    ]
    assert [where for where, _, _ in loops] == ["root", "root"]
    assert sorted("gather-teachers" in t["dependentTasks"] for _, _, t in loops) == [False, True]
    assert all(t["iteratorPolicy"]["parallelismLimit"] == resources.CELLS_AT_ONCE for _, _, t in loops)
    assert not [name for _, name, t in tasks(package) if "triggerPolicy" in t]


def test_no_step_is_retried_by_kfp(package: list[Any]) -> None:
    assert not [name for _, name, t in tasks(package) if "retryPolicy" in t]


def test_every_component_has_its_row() -> None:
    assert list(resources.NEEDS) == STEPS


@pytest.mark.parametrize("name", STEPS)
def test_image_and_limits_are_parameters(package: list[Any], name: str) -> None:
    spec, inputs, need = container(package, name), task(package, name)["inputs"]["parameters"], resources.NEEDS[name]
    assert spec["image"] == "{{$.inputs.parameters['pipelinechannel--image']}}"
    limits = spec["resources"]
    assert limits["resourceCpuLimit"]
    assert limits["resourceMemoryLimit"]
    own = OWN.get(name, "" if name in INNER else None)
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


def test_each_cell_brings_its_own_resources(package: list[Any]) -> None:
    (inner,) = [t for _, name, t in tasks(package) if name == "cell"]
    for name in ("cpu", "memory", "gpus"):
        expression = inner["inputs"]["parameters"][name]["parameterExpressionSelector"]
        assert expression == f'parseJson(string_value)["{name}"]'
    assert {"cpu", "memory", "gpus"} <= set(Cell.model_fields)


@pytest.mark.parametrize("name", STEPS)
def test_pod_has_memory_home_user_place_and_deadline(package: list[Any], name: str) -> None:
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


@pytest.mark.parametrize("name", STEPS)
def test_caching_follows_the_table(package: list[Any], name: str) -> None:
    assert task(package, name)["cachingOptions"].get("enableCache", False) is resources.NEEDS[name].cached
    assert resources.NEEDS[name].cached is (name in LONG)


def test_cached_failures_have_a_way_out(package: list[Any]) -> None:
    for name in CELL:
        assert task(package, name)["inputs"]["parameters"]["attempt"] == {"componentInputParameter": "attempt"}


def test_package_fits_the_api_and_names_no_machine() -> None:
    text = PACKAGE.read_text(encoding="utf-8")
    assert len(text) < 200_000, "Argo keeps a workflow in about one megabyte"
    assert str(PACKAGE.parent.parent) not in text
    assert "pip install" not in text
