"""Experiments: find the YAML, check every name against the registries, and expand it into cells."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
import yaml

from distillery import console, methods, nets, recipes
from distillery.code_version import code_version as current_code
from distillery.config import Cell, DatasetConfig, Experiment, MethodChoice, Student, parse, plain, read_yaml, short
from distillery.data import DATASETS, prepare
from distillery.errors import StoreError, UserError, choices, nearest

MAX_CELLS_BYTES = 100_000  # what KFP passes between steps without trouble
_KEEP = object()
# What a cell's pods request, by hardware profile: cpu, memory, gpus (strings, as KFP wants them).
PROFILES = {"cpu": ("2", "8Gi", "0"), "gpu": ("8", "32Gi", "1")}


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
        from distillery.store import MissingKey, open_store

        folder, _, name = source.rpartition("/")
        try:
            return open_store(folder).read(name).decode(), source
        except (MissingKey, UnicodeDecodeError) as error:
            raise UserError(f"experiment {source}: not readable ({error}); give the URI of a YAML file") from error
    known = shipped()
    path = known.get(source, Path(source))
    try:
        return path.read_text(encoding="utf-8"), str(source)
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
    _known("profile", experiment.profile, PROFILES)
    _at("teacher.net", nets.check_net, experiment.teacher.net, dict(experiment.teacher.net_options))
    for index, student in enumerate(experiment.students):
        _at(f"students[{index}].net", nets.check_net, student.net, dict(student.net_options))
    for index, choice in enumerate(experiment.methods):
        _at(f"methods[{index}].method", methods.find, choice.method)
    return experiment


def check(source: str, code: str = "") -> list[Cell]:
    """Everything that can be checked before anything is started, and the cells.

    Raises:
        UserError: as `load` and `cells`.
    """
    return cells(load(source), code)


def classes_of(dataset: DatasetConfig) -> int:
    """Number of classes; an imagefolder's are counted where it lies.

    Raises:
        UserError: the folder is missing or holds no class.
    """
    return len(prepare.class_names(dataset))


def cells(experiment: Experiment, code: str = "") -> list[Cell]:
    """Every (method, ipc, seed) with its students' recipes resolved: self-contained and in a stable order.

    Raises:
        UserError: impossible values, cells that are written twice, or too many cells for one run.
    """
    info = DATASETS[experiment.dataset.name]
    size, classes = experiment.dataset.size or info.size, classes_of(experiment.dataset)
    code = code or current_code()
    found: dict[str, Cell] = {}
    for index, choice in enumerate(experiment.methods):
        for ipc in choice.ipc:
            options = _options(experiment, index, choice, ipc, size)
            students = _students(experiment, classes, ipc, size)
            for seed in choice.seeds:
                cell = _cell(experiment, choice.method, ipc, seed, options, students, code)
                if cell.id in found:
                    raise UserError(f"methods[{index}]: the cell {cell.id} is asked for twice; keep one")
                found[cell.id] = cell
    length = len(json.dumps([plain(c) for c in found.values()]))
    if length > MAX_CELLS_BYTES:
        raise UserError(
            f"the experiment expands to {len(found)} cells of {length} bytes together; KFP passes at most "
            f"{MAX_CELLS_BYTES} between steps: split it into several experiments"
        )
    return list(found.values())


def _cell(
    experiment: Experiment,
    method: str,
    ipc: int,
    seed: int,
    options: dict[str, Any],
    students: tuple[Student, ...],
    code: str,
) -> Cell:
    defaults = plain(methods.config_of(method, {}, experiment.dataset.name, ipc))
    changed = {k: v for k, v in options.items() if defaults.get(k) != v}
    mark = "-" + hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()[:6] if changed else ""
    needs_gpu = experiment.device == "cuda" or experiment.profile != "cpu"
    cpu, memory, gpus = PROFILES[experiment.profile]
    return Cell(
        id=f"{method}-ipc{ipc}-seed{seed}{mark}",
        name=experiment.name,
        dataset=experiment.dataset,
        teacher=experiment.teacher,
        method=method,
        ipc=ipc,
        seed=seed,
        options=options,
        labels=experiment.labels,
        students=students,
        device=experiment.device,
        precision=experiment.precision,
        code_version=code,
        stop_on_failure=experiment.stop_on_failure,
        cpu=cpu,
        memory=memory,
        gpus=gpus if needs_gpu else "0",
    )


def _options(experiment: Experiment, index: int, choice: MethodChoice, ipc: int, size: int) -> dict[str, Any]:
    """The method's resolved options, checked against what can be known before the data is read."""

    def resolved() -> dict[str, Any]:
        config = methods.config_of(choice.method, dict(choice.options), experiment.dataset.name, ipc)
        methods.find(choice.method).check(config, ipc=ipc, size=size, per_class=None)
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
