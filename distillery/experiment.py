"""Experiments: find the YAML, check every name against the registries, and expand it into cells."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from distillery import console, methods, nets, profiles, recipes
from distillery.code_version import code_version as current_code
from distillery.config import (
    MAX_TEXT,
    Cell,
    DatasetConfig,
    Experiment,
    MethodChoice,
    Student,
    TeacherConfig,
    parse,
    plain,
    read_yaml,
    short,
)
from distillery.data import DATASETS, prepare
from distillery.errors import StoreError, UserError, choices, nearest
from distillery.profiles import Wish
from distillery.store import MissingKey, check_uri, open_store

MAX_CELLS_BYTES = 100_000  # what KFP passes between steps without trouble
_KEEP = object()


def shipped() -> dict[str, Path]:
    """Experiments that come with Distillery, by name."""
    spec = importlib.util.find_spec("pipelines")
    folders = [Path(p) / "experiments" for p in (spec.submodule_search_locations or [])] if spec else []
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*.yaml"))}


def read(source: str) -> tuple[str, str]:
    """The YAML text an experiment argument stands for, and a name for it in errors.

    Args:
        source: the name of a shipped experiment, a path, a file:// or s3:// URI, or the YAML text itself.

    Raises:
        UserError: nothing of that name.
    """
    if "\n" in source or source.lstrip().startswith(("{", "name:")):
        return source, "experiment"
    if source.startswith(("file://", "s3://")):
        folder, _, name = source.rpartition("/")
        try:
            store = open_store(folder)
            found = next((entry.bytes for entry in store.list(name) if entry.key == name), 0)
            if found > MAX_TEXT:
                raise UserError(f"experiment {source}: {found} bytes, more than an experiment can have ({MAX_TEXT})")
            return store.read(name).decode(), source
        except (MissingKey, UnicodeDecodeError) as error:
            raise UserError(f"experiment {source}: not readable ({error}); give the URI of a YAML file") from error
    known = shipped()
    path = known.get(source, Path(source))
    try:
        if path.is_file() and path.stat().st_size > MAX_TEXT:
            raise UserError(
                f"experiment {source}: {path.stat().st_size} bytes, more than an experiment can have ({MAX_TEXT})"
            )
        return path.read_text(encoding="utf-8"), str(source)
    except UserError:
        raise
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise UserError(
            f"experiment {source!r}: no such file ({error}){nearest(source, known)}; give a path, a file:// or "
            f"s3:// URI, the YAML text, or one of the shipped experiments: {choices(known)}"
        ) from error


def override(source: str, changes: list[str]) -> str:
    """The experiment's YAML text with some values replaced.

    Args:
        source: see `read`.
        changes: `key.path=value`; a number selects a list's entry, and the value is read as YAML.

    Raises:
        UserError: not of that form, or a path that leads nowhere.
    """
    if not changes:
        return source
    text, where = read(source)
    data = read_yaml(text, where)
    for change in changes:
        path, equals, value = change.partition("=")
        *parents, last = path.split(".")
        if not equals or not last:
            raise UserError(f"--set {change!r}: expected key.path=value, for example dataset.root=data/cifar10")
        place: Any = data
        for part in parents:
            place = _inside(place, part, change)
        _inside(place, last, change, read_yaml(f"value: {value}", f"--set {change}")["value"])
    return str(yaml.safe_dump(data, sort_keys=False))


def _inside(place: Any, part: str, change: str, value: Any = _KEEP) -> Any:
    """One step down a path; with a value, put it there."""
    if isinstance(place, list) and part.isdigit() and int(part) < len(place):
        if value is not _KEEP:
            place[int(part)] = value
        return place[int(part)]
    if isinstance(place, dict):
        if value is not _KEEP:
            place[part] = value
        return place.setdefault(part, {})
    raise UserError(f"--set {change!r}: {part!r} leads nowhere in {short(place)}")


def load(source: str) -> Experiment:
    """Read, validate and cross-check an experiment.

    Raises:
        UserError: one line per fault, with key path, value and what is allowed.
    """
    text, where = read(source)
    experiment = parse(Experiment, read_yaml(text, where), where)
    _known("dataset.name", experiment.dataset.name, DATASETS)
    _known("profile", experiment.profile, profiles.PROFILES)
    _check_teachers(experiment)
    for key, uri in (("dataset.root", experiment.dataset.root), ("dataset.store", experiment.dataset.store)):
        _at(key, check_uri, uri)
    for one in (experiment.teacher, *experiment.teachers):
        _at("teacher.weights", check_uri, one.weights if one else "")
    for index, student in enumerate(experiment.students):
        _at(f"students[{index}].net", nets.check_net, student.net, dict(student.net_options))
    for index, choice in enumerate(experiment.methods):
        _at(f"methods[{index}].method", methods.find, choice.method)
        _at(f"methods[{index}].teachers", teachers_of, experiment, choice)
    return experiment


def _check_teachers(experiment: Experiment) -> None:
    if experiment.teacher and experiment.teachers:
        raise UserError(
            f"teacher, teachers: both are written (net {experiment.teacher.net!r} beside {len(experiment.teachers)} "
            "others); keep teacher for one, or list all of them under teachers"
        )
    names: dict[str, str] = {}
    for index, teacher in enumerate(experiment.every_teacher):
        where = f"teachers[{index}]" if experiment.teachers else "teacher"
        _at(f"{where}.net", nets.check_net, teacher.net, dict(teacher.net_options))
        if teacher.name in names:
            raise UserError(
                f"{where}: the name {teacher.name!r} is already that of {names[teacher.name]} (without a name a "
                "teacher is called by its net); give each teacher a name of its own"
            )
        names[teacher.name] = where
    info, (first, *others) = DATASETS[experiment.dataset.name], experiment.every_teacher
    for teacher in others:  # known before any of them is trained
        for what in ("mean", "std"):
            here, there = (tuple(getattr(one, what)) or getattr(info, what) for one in (first, teacher))
            if here != there:
                raise UserError(
                    f"teachers {first.name} and {teacher.name} differ in {what}: {here} and {there}; teachers of one "
                    "experiment see the same images, so give both the same"
                )


def teacher_named(experiment: Experiment, name: str) -> TeacherConfig:
    """One of the experiment's teachers.

    Raises:
        UserError: no teacher of that name; names the nearest.
    """
    known = {teacher.name: teacher for teacher in experiment.every_teacher}
    if name not in known:
        raise UserError(f"no teacher is called {name!r}{nearest(name, known)}; known: {choices(known)}")
    return known[name]


def teachers_of(experiment: Experiment, choice: MethodChoice) -> tuple[str, ...]:
    """Names of the teachers that a method's cells use, in the order in which they are averaged.

    By default all of them where the method can use several, else the first. A method that runs no teacher takes as
    many as it is given: they only label its images.

    Raises:
        UserError: an unknown name, one twice, or several for a method that uses one.
    """
    needs, every = methods.find(choice.method).NEEDS, [teacher.name for teacher in experiment.every_teacher]
    names = choice.teachers or tuple(every if needs.several else every[:1])
    for name in names:
        teacher_named(experiment, name)
        if names.count(name) > 1:
            raise UserError(f"{name!r} is listed {names.count(name)} times; name each teacher once")
    if len(names) > 1 and needs.teacher and not needs.several:
        raise UserError(f"{choice.method} uses one teacher, and {len(names)} are listed: {choices(names)}; keep one")
    return names


def statistics_of(experiment: Experiment) -> dict[str, list[str]]:
    """What must be known of the training images for some method: {"teachers": whose statistics, "kinds": which}.

    Both in order; empty lists where no method asks for any.
    """
    asking = [choice for choice in experiment.methods if methods.find(choice.method).NEEDS.statistics]
    kinds = {kind for choice in asking for kind in methods.find(choice.method).NEEDS.statistics}
    names = {name for choice in asking for name in teachers_of(experiment, choice)}
    return {"teachers": [t.name for t in experiment.every_teacher if t.name in names], "kinds": sorted(kinds)}


def check(source: str, code: str = "", wish: Wish | None = None) -> list[Cell]:
    """Everything that can be checked before anything is started, and the cells.

    Raises:
        UserError: as `load` and `cells`.
    """
    return cells(load(source), code, wish)


def reduced(
    experiment: Experiment,
    code: str = "",
    teachers: Sequence[TeacherConfig] = (),
    asking: Sequence[MethodChoice] = (),
) -> str:
    """An experiment cut down to its data and what else is given, as text; the first line names the code.

    KFP's cache compares what a step is given: adding a method then neither makes the data again nor trains a teacher
    again, while other data, another teacher or changed code does. What the text holds besides (a name, a student, a
    method where none is given) only makes it a whole experiment.
    """
    found: dict[str, Any] = {"name": "upstream", "dataset": plain(experiment.dataset)}
    if teachers:
        found |= {"device": experiment.device, "precision": experiment.precision, "profile": experiment.profile}
        found["teachers"] = [plain(teacher) for teacher in teachers]
    asked = [{"method": c.method, "ipc": [1], "teachers": teachers_of(experiment, c)} for c in asking]
    found["methods"] = asked or [{"method": "random", "ipc": [1]}]
    found["students"] = [{"net": teacher.net, "net_options": teacher.net_options} for teacher in teachers[:1]]
    found["students"] = found["students"] or [{"net": TeacherConfig().net}]
    return f"# distillery {code or current_code()}\n{json.dumps(found, sort_keys=True)}\n"


def classes_of(dataset: DatasetConfig) -> int:
    """Number of classes; an imagefolder's are counted where it lies.

    Raises:
        UserError: the folder is missing or holds no class.
    """
    return len(prepare.class_names(dataset))


def cells(experiment: Experiment, code: str = "", wish: Wish | None = None) -> list[Cell]:
    """Every (method, ipc, seed) with its students' recipes resolved: self-contained and in a stable order.

    Args:
        experiment: as `load` gives it.
        code: code version to stamp on the cells; "" = this package's.
        wish: what was said about pods; None where the steps run on this machine.

    Raises:
        UserError: impossible values, cells that are written twice, or too many cells for one run.
    """
    info = DATASETS[experiment.dataset.name]
    size, classes = experiment.dataset.size or info.size, classes_of(experiment.dataset)
    code = code or current_code()
    found: dict[str, Cell] = {}
    for index, choice in enumerate(experiment.methods):
        for ipc in choice.ipc:
            options = _options(experiment, index, choice, ipc, size, classes)
            students = _students(experiment, classes, ipc, size)
            for seed in choice.seeds:
                cell = _cell(experiment, choice, ipc, seed, options, students, code)
                cell = profiles.placed(experiment, cell, wish)
                if cell.id in found:
                    raise UserError(f"methods[{index}]: the cell {cell.id} is asked for twice; keep one")
                found[cell.id] = cell
    made = list(found.values())
    _check_length("cells", [plain(cell) for cell in made], "split it into several experiments")
    _check_length("pieces", [p for cell in made for p in pieces(cell)], "lower shards, or split it into several")
    return made


def taught(experiment: Experiment) -> dict[str, str]:
    """The teachers of each cell in words, by its id: their names, and their nets where a name does not say it."""
    nets = {one.name: one.net for one in experiment.every_teacher}
    words = {name: name if name == net else f"{name} ({net})" for name, net in nets.items()}
    return {cell.id: " + ".join(words[name] for name in cell.teachers) for cell in cells(experiment)}


def pieces(cell: Cell) -> list[dict[str, Any]]:
    """The shards of a cell, as JSON values of `config.Piece`."""
    return [plain(cell) | {"students": [], "shard": shard} for shard in range(cell.shards)]


def _check_length(what: str, made: list[dict[str, Any]], remedy: str) -> None:
    length = len(json.dumps(made))
    if length > MAX_CELLS_BYTES:
        raise UserError(
            f"the experiment expands to {len(made)} {what} of {length} bytes together; KFP passes at most "
            f"{MAX_CELLS_BYTES} between steps: {remedy}"
        )


def _cell(
    experiment: Experiment,
    choice: MethodChoice,
    ipc: int,
    seed: int,
    options: dict[str, Any],
    students: tuple[Student, ...],
    code: str,
) -> Cell:
    defaults = plain(methods.config_of(choice.method, {}, experiment.dataset.name, ipc))
    changed = {k: v for k, v in options.items() if defaults.get(k) != v}
    teachers, usual = (teachers_of(experiment, c) for c in (choice, choice.model_copy(update={"teachers": ()})))
    changed |= {"teachers": teachers} if teachers != usual else {}
    mark = "-" + hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()[:6] if changed else ""
    return Cell(
        id=f"{choice.method}-ipc{ipc}-seed{seed}{mark}",
        name=experiment.name,
        dataset=experiment.dataset,
        teachers=teachers,
        method=choice.method,
        ipc=ipc,
        seed=seed,
        options=options,
        shards=choice.shards,
        labels=experiment.labels,
        students=students,
        device=experiment.device,
        precision=experiment.precision,
        code_version=code,
        stop_on_failure=experiment.stop_on_failure,
    )


def _options(
    experiment: Experiment, index: int, choice: MethodChoice, ipc: int, size: int, classes: int
) -> dict[str, Any]:
    """The method's resolved options, checked against what can be known before the data is read."""

    def resolved() -> dict[str, Any]:
        config = methods.config_of(choice.method, dict(choice.options), experiment.dataset.name, ipc)
        method = methods.find(choice.method)
        method.check(config, ipc=ipc, size=size, per_class=None)
        methods.cut(choice.method, method.groups(config, ipc=ipc, classes=classes), choice.shards)
        return plain(config)

    found: dict[str, Any] = _at(f"methods[{index}] ({choice.method}, ipc {ipc})", resolved)
    return found


def _students(experiment: Experiment, classes: int, ipc: int, size: int) -> tuple[Student, ...]:
    done = []
    for index, choice in enumerate(experiment.students):
        preset, written = _at(f"students[{index}]", recipes.split, choice.recipe)
        resolved = _at(
            f"students[{index}]",
            lambda preset=preset, written=written, net=choice.net: recipes.resolve(
                preset, written, dataset=experiment.dataset.name, classes=classes, ipc=ipc, size=size, net=net
            ),
        )
        for text in recipes.without_effect(resolved, written):
            _say_once(f"students[{index}]: {text}")
        options = recipes.net_options(resolved, choice.net, dict(choice.net_options))
        _at(f"students[{index}]", _try_net, choice.net, classes, size, options)
        done.append(Student(net=choice.net, net_options=options, recipe=resolved))
    return tuple(done)


def _try_net(name: str, classes: int, size: int, options: dict[str, Any]) -> None:
    """Build the net without memory or arithmetic: images too small for it show now, not after the teacher."""
    with torch.device("meta"):
        nets.build(name, classes, size, **options)


@functools.cache
def _say_once(text: str) -> None:
    console.emit({"event": "note", "step": "check", "text": text})


def _known(where: str, name: str, allowed: dict[str, Any]) -> None:
    if name not in allowed:
        raise UserError(f"{where}: {name!r} is unknown{nearest(name, allowed)}; known: {choices(allowed)}")


def _at(where: str, check: Any, *args: Any) -> Any:
    """Run a check and put the key's path in front of its message."""
    try:
        return check(*args)
    except (UserError, StoreError) as error:
        raise type(error)(f"{where}: {error}") from error
