"""Experiments: strict reading, errors that name the key, expansion into cells, and 1,000 mutated files."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from distillery import experiment, methods, steps
from distillery.config import Cell, Experiment, parse, plain, read_yaml
from distillery.errors import UserError

TEXT = """
name: toy
dataset: {name: digits}
teacher: {net: convnet3, net_options: {width: 16}, epochs: 2}
methods:
  - {method: rded, ipc: [1, 10], seeds: [0, 1]}
  - {method: random, ipc: [1]}
students:
  - {net: convnet3, recipe: fair-soft}
  - {net: convnet3, recipe: {preset: rded, epochs: 5}}
"""


def changed(**values: Any) -> str:
    """The toy experiment with top-level values replaced."""
    return yaml.safe_dump(yaml.safe_load(TEXT) | values, sort_keys=False)


def several(name: str = "deep", net: str = "convnet4", **choice: Any) -> str:
    """The toy experiment with three teachers, the last one and the first method as given."""
    teachers = [{"net": "convnet3"}, {"net": "convnet3", "name": "wide"}, {"net": net, "name": name}]
    data = yaml.safe_load(changed(teachers=teachers, methods=[{"method": "rded", "ipc": [1]} | choice]))
    return yaml.safe_dump({key: value for key, value in data.items() if key != "teacher"})


def test_a_cell_names_its_teachers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert steps.plan(TEXT)[0]["teachers"] == ["convnet3"]
    assert [one["teacher"] for one in steps.plan_teachers(several())] == ["convnet3", "wide", "deep"]
    (first,) = steps.plan(several())
    assert (first["id"], first["teachers"]) == ("rded-ipc1-seed0", ["convnet3"])
    (other,) = steps.plan(several(teachers=["wide"]))
    assert other["teachers"] == ["wide"]
    assert other["id"] != first["id"], "both may stand in one experiment"
    (labelled,) = steps.plan(several(method="random", teachers=["wide", "deep"]))
    assert labelled["teachers"] == ["wide", "deep"], "random images may be labelled by several"
    monkeypatch.setattr(methods.find("rded"), "NEEDS", methods.Needs(teacher=True, gpu=True, several=True))
    assert steps.plan(several())[0]["teachers"] == ["convnet3", "wide", "deep"]


def test_cells_are_every_method_ipc_and_seed_in_order() -> None:
    found = [cell["id"] for cell in steps.plan(TEXT)]
    assert found == [
        "rded-ipc1-seed0",
        "rded-ipc1-seed1",
        "rded-ipc10-seed0",
        "rded-ipc10-seed1",
        "random-ipc1-seed0",
    ]


def test_a_cell_survives_kfp_floats() -> None:
    cell = steps.plan(TEXT)[2]

    def floats(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: floats(v) for k, v in value.items()}
        if isinstance(value, list):
            return [floats(v) for v in value]
        return float(value) if isinstance(value, int) and not isinstance(value, bool) else value

    assert plain(parse(Cell, floats(cell), "cell")) == cell


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (changed(labls=1), ["labls", "did you mean 'labels'"]),
        (changed(name="a b"), ["name", "'a b'"]),
        (changed(methods=[]), ["methods", "at least 1"]),
        (changed(dataset={"name": "cifar11"}), ["dataset.name", "'cifar11'", "did you mean 'cifar10'"]),
        (changed(dataset={"name": "digits", "size": "16"}), ["dataset.size", "'16'"]),
        (changed(methods=[{"method": "redd", "ipc": [1]}]), ["methods[0].method", "'redd'", "did you mean 'rded'"]),
        (changed(methods=[{"method": "rded", "ipc": [0]}]), ["methods[0].ipc[0]", "got 0"]),
        (changed(methods=[{"method": "rded", "ipc": [301]}]), ["methods[0]", "301", "mipc"]),
        (changed(methods=[{"method": "rded", "ipc": [1], "options": {"mpic": 3}}]), ["mpic", "did you mean 'mipc'"]),
        (changed(methods=[{"method": "rded", "ipc": [1], "seeds": [0, 0]}]), ["rded-ipc1-seed0", "twice"]),
        (changed(students=[{"net": "convnt3"}]), ["students[0].net", "'convnt3'", "did you mean 'convnet3'"]),
        (changed(students=[{"net": "convnet3", "recipe": "rdd"}]), ["students[0]", "'rdd'", "did you mean 'rded'"]),
        (
            changed(students=[{"net": "convnet3", "recipe": {"preset": "rded", "epoch": 3}}]),
            ["students[0]", "epoch", "did you mean 'epochs'"],
        ),
        (changed(teacher={"net": "convnet3", "lr": float("nan")}), ["teacher.lr", "nan"]),
        (changed(teacher={"net": "convnet3", "mean": [0.5]}), ["teacher.mean", "three numbers"]),
        (changed(teachers=[{"net": "convnet3"}]), ["teacher, teachers", "both"]),
        (several(name="wide"), ["teachers[2]", "'wide'", "already that of teachers[1]", "a name of its own"]),
        (several(net="convnt3"), ["teachers[2].net", "'convnt3'", "did you mean 'convnet3'"]),
        (
            changed(teacher=None, teachers=[{"net": "convnet3"}, {"net": "convnet4", "std": [0.5, 0.5, 0.25]}]),
            ["teachers convnet3 and convnet4 differ in std", "0.3188", "0.25", "give both the same"],
        ),
        (several(name="a b"), ["teachers[2].name", "'a b'"]),
        (several(teachers=["wde"]), ["methods[0].teachers", "'wde'", "did you mean 'wide'", "convnet3, wide, deep"]),
        (several(teachers=["wide", "deep"]), ["methods[0].teachers", "rded uses one teacher", "wide, deep"]),
        (several(method="random", teachers=["wide", "wide"]), ["methods[0].teachers", "'wide' is listed 2 times"]),
        (changed(precision="fp16"), ["precision", "'fp16'", "bf16"]),
        (TEXT + "name: again\n", ["line", "'name'", "twice"]),
        ("name: [\n", ["not readable as YAML"]),
        ("- 1\n- 2\n", ["expected a mapping"]),
        ("a: &a [*a]\n", ["not readable"]),
        ("no_such_experiment", ["no_such_experiment", "shipped experiments"]),
    ],
)
def test_mistakes_name_the_key_and_show_the_value(text: str, said: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        experiment.check(text)
    for part in said:
        assert part in str(caught.value), f"{part!r} is missing in: {caught.value}"


def test_shipped_experiments_are_valid() -> None:
    names = experiment.shipped()
    assert "demo" in names
    for name in names:
        assert experiment.check(name)[0].name == name, f"{name}: the file's name and its key differ"


def test_overrides_replace_values_and_refuse_wrong_paths() -> None:
    text = experiment.override(TEXT, ["teacher.epochs=7", "students.1.recipe.epochs=9", "dataset.root=a/b"])
    found = experiment.load(text)
    assert (found.every_teacher[0].epochs, found.dataset.root) == (7, "a/b")
    assert experiment.cells(found)[0].students[1].recipe.epochs == 9
    for wrong in ("teacher.epochs", "students.7.net=x", "name.x=1"):
        with pytest.raises(UserError, match="--set"):
            experiment.override(TEXT, [wrong])


def mutate(data: Any, rng: random.Random) -> Any:
    """One random change somewhere in a tree of YAML values."""
    odd = [
        None,
        -1,
        0,
        10**30,
        1.5,
        float("nan"),
        float("inf"),
        "",
        "x" * 300,
        [],
        {},
        True,
        [[]],
        {"a": {"b": 1}},
        "1",
    ]
    if isinstance(data, dict) and data and rng.random() < 0.8:
        key = rng.choice(list(data))
        kind = rng.random()
        if kind < 0.15:
            return {k: v for k, v in data.items() if k != key}
        if kind < 0.3:
            return data | {key + rng.choice("sx_"): data[key]}
        return data | {key: mutate(data[key], rng)}
    if isinstance(data, list) and data and rng.random() < 0.8:
        place = rng.randrange(len(data))
        return [mutate(v, rng) if i == place else v for i, v in enumerate(data)]
    return rng.choice(odd)


def test_a_thousand_mutated_experiments_give_no_traceback() -> None:
    rng, base, refused = random.Random(0), yaml.safe_load(TEXT), 0
    for _ in range(1000):
        data = base
        for _ in range(rng.randint(1, 3)):
            data = mutate(data, rng)
        text = yaml.safe_dump(data)
        if rng.random() < 0.2:
            cut = rng.randrange(len(text))
            text = text[:cut] + rng.choice(["", ":", "\t", "\x00", "{", "- "]) + text[cut + rng.randint(0, 3) :]
        try:
            found = parse(Experiment, read_yaml(text, "mutated"), "mutated")
            experiment.check(yaml.safe_dump(plain(found)))
        except UserError as error:
            refused += 1
            places = ("mutated", "experiment", "methods", "students", "teacher", "dataset", "profile")
            assert str(error).startswith(places), error
    assert refused > 500, f"only {refused} of 1000 mutations were refused: the mutations are too tame"


def test_the_command_line_gives_exit_code_2_and_one_message(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(changed(labls=1))
    done = subprocess.run([sys.executable, "-m", "distillery", "check", str(path)], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "labls" in done.stderr
    assert "Traceback" not in done.stderr
