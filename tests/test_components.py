"""The KFP skin: every component is one thin, self-contained call of a step, and tells KFP only what KFP can keep."""

import ast
import inspect
import json
import math
import os
import textwrap
from pathlib import Path
from typing import Any

import pytest
from kfp import dsl

import components
from components._step import connect, facts
from components.evaluate_student import scores
from distillery import artifact, evaluate, experiment, methods, profiles, steps
from distillery.config import Cell, parse
from distillery.errors import DistilleryError, UserError

ALL = [name for name in components.__all__ if name != "IMAGE"]
EXPERIMENT = """
name: small
dataset: {name: digits, per_class: 4}
teacher: {net: convnet1, net_options: {width: 4}, epochs: 1, batch: 32}
methods: [{method: random, ipc: [1], seeds: [0, 1]}]
students: [{net: convnet1, net_options: {width: 4}, recipe: {preset: fair-soft, epochs: 1}}]
device: cpu
"""


def source(name: str) -> str:
    """The Python that KFP puts into the component's pod."""
    return str(getattr(components, name).component_spec.implementation.container.command[-1])


def body(name: str) -> list[ast.stmt]:
    """The statements of a component's function after its docstring."""
    (function,) = ast.parse(textwrap.dedent(inspect.getsource(getattr(components, name).python_func))).body
    assert isinstance(function, ast.FunctionDef)
    return function.body[1:] if ast.get_docstring(function) else function.body


PLANNED = ("upstream", "gathering", "prepare_cpu", "prepare_memory", "gather_cpu", "gather_memory", "gather_gpus")


def planned(tmp_path: Path, text: str, **more: str) -> tuple[list[dict[str, Any]], str, str]:
    """The cells, and the texts that `plan` gives for data and teachers."""
    tmp_path.mkdir(exist_ok=True)
    cells = components.plan.python_func(text, *(str(tmp_path / name) for name in PLANNED), **more)
    return cells, (tmp_path / "upstream").read_text(), (tmp_path / "gathering").read_text()


def test_they_stand_in_flow_order() -> None:
    before = ["plan", "prepare_data", "plan_teachers", "train_teacher", "gather_teachers"]
    pieces = ["plan_pieces", "synthesize_piece", "bundle_pieces", "gather_pieces"]
    assert [*before, "synthesize", *pieces, "relabel", "evaluate_student", "report", "verdict"] == ALL


@pytest.mark.parametrize("name", ALL)
def test_component_is_a_thin_skin_that_installs_nothing(name: str) -> None:
    container = getattr(components, name).component_spec.implementation.container
    assert container.image == components.IMAGE
    assert "pip install" not in " ".join(container.command)
    assert 2 <= len(body(name)) <= 6
    assert f"steps.{name}(" in source(name), "the component and its step carry one name"


@pytest.mark.parametrize("name", ALL)
def test_pod_source_compiles_alone_and_imports_only_steps(name: str) -> None:
    tree = ast.parse(source(name))
    found = [a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names]
    found += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    allowed = {"kfp", "typing", "json", "math", "os", "pathlib", "re", "shutil", "distillery"}
    assert {name.split(".")[0] for name in found} <= allowed
    assert all(f"from {m} import" not in source(name) for m in ("distillery.store", "distillery.data", "components"))


def test_facts_are_strings_and_finite_numbers() -> None:
    kept = {"images": 10, "accuracy": 0.5, "method": "rded"}
    lost = {"classes": ["a"], "bad": math.nan, "far": math.inf, "on": True, "none": None}
    manifest = artifact.Manifest("synthetic", "synthesize", {}, {}, kept | lost, {}, "1", {})
    found = facts(manifest)
    assert found == {"kind": "synthetic", "fingerprint": manifest.fingerprint, "code_version": "1"} | kept
    assert all(isinstance(v, str) or (not isinstance(v, bool) and math.isfinite(v)) for v in found.values())


def test_scores_are_percent_per_student_and_say_when_the_cell_failed(tmp_path: Path) -> None:
    assert scores(str(tmp_path), {}) == {"failed": 1.0}
    sizes = {"image_bytes": 300, "label_bytes": 40}
    students = [
        {"net": "convnet3", "recipe": recipe, "acc_last": last, "acc_best": 0.75} | sizes
        for recipe, last in (("fair-soft(lr=1)", 0.5), ("fair-soft(lr=1)", 0.25), ("fair-soft", math.nan))
    ]
    cell = {"method": "rded", "ipc": 10, "seed": 3}
    (tmp_path / "result.json").write_text(json.dumps({"cell": cell, "students": students}))
    found = scores(str(tmp_path), {"steps": {"relabel": 2.5}, "peaks": {"relabel": {"gpu": 7}}})
    name = "rded ipc10 convnet3 fair-soft"
    assert found == {
        "failed": 0.0,
        "seed": 3.0,
        f"accuracy {name} lr 1": 50.0,
        f"best accuracy {name} lr 1": 75.0,
        f"accuracy {name} lr 1 no2": 25.0,
        f"best accuracy {name} lr 1 no2": 75.0,
        f"best accuracy {name}": 75.0,  # KFP cannot keep the NaN beside it
        "image bytes": 300.0,
        "label bytes": 40.0,
        "seconds relabel": 2.5,
        "gpu bytes relabel": 7.0,
    }


def test_confusion_matrix_is_counted_where_a_table_holds_it(tmp_path: Path) -> None:
    assert steps.mistakes(tmp_path) == [], "a failed cell"
    evaluate.write_predictions([[0, 1, 1, 1], [0, 0, 0, 0]], [2, 2], tmp_path)
    for classes, expected in ((["a", "b"], ["a", "b"]), (["a", "a"], ["0 a", "1 a"])):
        (tmp_path / "result.json").write_text(json.dumps({"classes": classes}))
        assert steps.mistakes(tmp_path) == [(expected, [[1, 1], [0, 2]])]
    (tmp_path / "result.json").write_text(json.dumps({"classes": [str(i) for i in range(101)]}))
    assert steps.mistakes(tmp_path) == []


def test_data_and_teachers_depend_on_their_own_part_alone(tmp_path: Path) -> None:
    two = EXPERIMENT.replace("teacher: {", "teachers: [{name: a, net: convnet2}, {")
    two = two.replace("batch: 32}", "batch: 32}]")

    def texts(old: str, new: str, **more: str) -> tuple[str, str, list[str]]:
        _, upstream, gathering = planned(tmp_path, two.replace(old, new), **more)
        each = components.plan_teachers.python_func(gathering, **more)
        assert [one["teacher"] for one in each] == ["a", "convnet1"]
        return upstream, gathering, [one["experiment"] for one in each]

    data, gathering, (first, second) = texts("", "")
    assert texts("seeds: [0, 1]", "seeds: [5]") == texts("name: small", "name: other") == texts("", "")
    assert texts("fair-soft, epochs: 1", "fair-soft, epochs: 2") == texts("", "")
    changed = texts("epochs: 1, batch", "epochs: 2, batch")
    assert changed[0] == data
    assert changed[1] != gathering
    assert changed[2][0] == first
    assert changed[2][1] != second
    for old, new, more in (("per_class: 4", "per_class: 5", {}), ("", "", {"code_version": "9"})):
        found = texts(old, new, **more)
        assert found[0] != data
        assert first not in found[2]
        assert second not in found[2]
    for text in (data, gathering, first, second):
        experiment.load(text)  # they are experiments themselves


def test_statistics_that_a_method_asks_for_reach_the_gathering(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, before, without = planned(tmp_path, EXPERIMENT)
    needs = methods.Needs(teacher=True, gpu=False, statistics=("class_bn",))
    monkeypatch.setattr(methods.find("random"), "NEEDS", needs)
    _, after, gathering = planned(tmp_path, EXPERIMENT)
    assert (after, gathering) != (before, without)
    assert after == before
    wanted = experiment.load(gathering)
    assert experiment.statistics_of(wanted) == {"teachers": ["convnet1"], "kinds": ["class_bn"]}


def test_numbers_that_kfp_turned_into_floats_do_not_change_a_cell(tmp_path: Path) -> None:
    cell = planned(tmp_path, EXPERIMENT)[0][0]
    as_kfp = json.loads(json.dumps(cell), parse_int=float)
    assert isinstance(as_kfp["ipc"], float)
    assert parse(Cell, as_kfp, "cell") == parse(Cell, cell, "cell")


def test_endpoint_parameter_reaches_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://set.before:1")
    planned(tmp_path, EXPERIMENT)
    assert os.environ["AWS_ENDPOINT_URL"] == "http://set.before:1", "an empty parameter leaves the environment alone"
    planned(tmp_path, EXPERIMENT, s3_endpoint="http://store.example:9000")
    assert os.environ["AWS_ENDPOINT_URL"] == "http://store.example:9000"


def test_region_and_authority_reach_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_REGION", "from-the-secret")
    monkeypatch.setenv("AWS_CA_BUNDLE", "")  # so that what the calls set is undone
    monkeypatch.delenv("AWS_CA_BUNDLE")
    monkeypatch.setenv("DISTILLERY_S3_CA", str(tmp_path / "ca.crt"))
    connect("", "")
    assert os.environ["AWS_REGION"] == "from-the-secret"
    assert "AWS_CA_BUNDLE" not in os.environ, "the secret is missing, so the usual authorities count"
    (tmp_path / "ca.crt").write_text("")
    connect("", "eu-west-1")
    assert os.environ["AWS_REGION"] == "eu-west-1"
    assert os.environ["AWS_CA_BUNDLE"] == str(tmp_path / "ca.crt")


def test_plan_says_what_the_pods_outside_of_loops_ask_for(tmp_path: Path) -> None:
    planned(tmp_path, EXPERIMENT.replace("device: cpu", ""), profile="a100", data_cpu="7")
    said = {name: (tmp_path / name).read_text() for name in PLANNED[2:]}
    light, data = profiles.PROFILES["a100"].light, profiles.PROFILES["a100"].data
    assert said == {
        "prepare_cpu": "7",
        "prepare_memory": data.memory,
        "gather_cpu": light.cpu,
        "gather_memory": light.memory,
        "gather_gpus": "",
    }
    (teacher,) = components.plan_teachers.python_func((tmp_path / "gathering").read_text(), teacher_memory="9Gi")
    heavy = profiles.PROFILES["a100"].teachers
    assert (teacher["cpu"], teacher["memory"], teacher["gpus"]) == (heavy.cpu, "9Gi", heavy.gpus)
    assert experiment.load(teacher["experiment"]).device == "cuda", "the pod has a GPU, so the step must find it"


def test_faulty_experiment_stops_in_plan(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="ipcs"):
        planned(tmp_path, EXPERIMENT.replace("ipc:", "ipcs:"))


def test_failed_cell_passes_through_and_verdict_tells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (cell, _), upstream, gathering = planned(tmp_path, EXPERIMENT.replace("ipc: [1]", "ipc: [9]"))
    folder = {name: str(tmp_path / name) for name in ("data", "teacher", "teachers", "synthetic", "labels", "result")}
    data, teacher = dsl.Dataset(uri=folder["data"]), dsl.Model(uri=folder["teacher"])
    teachers = dsl.Model(uri=folder["teachers"])
    made, labels = dsl.Dataset(uri=folder["synthetic"]), dsl.Artifact(uri=folder["labels"])
    result, metrics = dsl.Artifact(uri=folder["result"]), dsl.Metrics()
    components.prepare_data.python_func(upstream, data)
    components.train_teacher.python_func(components.plan_teachers.python_func(gathering)[0], data, teacher)
    components.gather_teachers.python_func(gathering, data, [teacher], teachers)
    assert teachers.metadata["accuracy_convnet1"] == teacher.metadata["accuracy"]
    components.synthesize.python_func(cell, data, teachers, made)
    components.relabel.python_func(cell, made, teachers, labels)
    confusion = dsl.ClassificationMetrics()
    components.evaluate_student.python_func(cell, data, teachers, made, labels, result, metrics, confusion)
    assert not confusion.metadata
    assert made.metadata["kind"] == result.metadata["kind"] == "failure"
    assert metrics.metadata == {"failed": 1.0}
    page, table = dsl.HTML(uri=str(tmp_path / "page")), dsl.Markdown(uri=str(tmp_path / "table"))
    summary, shown = dsl.Artifact(uri=str(tmp_path / "summary")), dsl.Metrics()
    failures = components.report.python_func(EXPERIMENT, [result], summary, page, table, shown)
    assert shown.metadata["cells_failed"] == 1
    assert "<html" in Path(page.path).read_text()
    assert len(failures) == 1
    with pytest.raises(DistilleryError, match="1 of the cells failed"):
        components.verdict.python_func(failures)
    assert "attempt" in capsys.readouterr().out
    components.verdict.python_func([])
    assert not capsys.readouterr().out
