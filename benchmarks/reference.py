"""Generated tables of docs/experiment.md and docs/formats.md: every key of an experiment, and what it may name.

`benchmarks/tables.py` writes them. A key's meaning is the comment behind its line in `distillery/config.py`.
"""

from __future__ import annotations

import ast
import inspect
import tokenize
from collections.abc import Iterator
from io import StringIO
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from distillery import config, recipes
from distillery.config import Strict, plain
from distillery.data import DATASETS
from distillery.nets import NETS, convnet
from distillery.recipes import PRESETS

# What an experiment consists of, in the order of the page.
MODELS: dict[str, type[Strict]] = {
    "experiment": config.Experiment,
    "dataset": config.DatasetConfig,
    "teacher": config.TeacherConfig,
    "methods": config.MethodChoice,
    "students": config.StudentChoice,
    "labels": config.LabelConfig,
    "recipe": config.Recipe,
    "views": config.ViewPolicy,
}
NAMED = {config.Name: "name", config.NameOrNone: "name", config.PerChannel: "3 numbers"}
NAMED |= {config.PositivePerChannel: "3 numbers above 0", config.Area: "2 shares"}
WORDS = {str: "text", int: "whole number", float: "number", bool: "true or false", Any: "value"}
LOOKED_AT = ("cifar10", "tiny_imagenet", "imagenette")  # data sets whose resolved presets are shown, at IPC 10
SHOWN = ("epochs", "batch", "optimizer", "lr", "loss")


def keys(model: type[Strict]) -> list[tuple[str, ...]]:
    """The keys of a model: name, value, default, meaning."""
    hints, said = inspect.get_annotations(model, eval_str=True), meanings(model)
    taken = {"name": "the preset's"} if model is config.Recipe else {}
    return [
        (f"`{key}`", kind(hints[key]), taken.get(key) or default(field), said[key].replace("|", "\\|"))
        for key, field in model.model_fields.items()
    ]


def meanings(model: type[Strict]) -> dict[str, str]:
    """Key -> the comment behind its line.

    Raises:
        ValueError: a key without one.
    """
    source = inspect.getsource(model)
    tokens = tokenize.generate_tokens(StringIO(source).readline)
    comments = {token.start[0]: token.string for token in tokens if token.type == tokenize.COMMENT}
    body = next(node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)).body
    lines = {ast.unparse(node.target): node.end_lineno or 0 for node in body if isinstance(node, ast.AnnAssign)}
    found = {key: comments.get(line, "").removeprefix("#").strip() for key, line in lines.items()}
    if lacking := sorted(key for key in model.model_fields if not found.get(key)):
        raise ValueError(f"{model.__name__}: no comment behind {lacking} in distillery/config.py; say what each means")
    return found


def kind(hint: Any) -> str:
    """A type as people say it."""
    for known, word in NAMED.items():
        if hint == known:
            return word
    origin, inside = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return f"{kind(inside[0])}{limits(inside[1:])}"
    if origin is Literal:
        return ", ".join(f"`{one}`" for one in inside)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(kind(one) for one in inside if one is not NoneType))
    if origin is tuple:
        items = [one for one in inside if one is not Ellipsis]
        return f"list of {kind(items[0])}" if len(items) < len(inside) else " and ".join(map(kind, items))
    if origin is dict:
        return "keys and values"
    if isinstance(hint, type) and issubclass(hint, BaseModel):
        section = next((name for name, model in MODELS.items() if model is hint), "")
        return f"[{section}](#{section})"
    return WORDS[hint]


def limits(marks: tuple[Any, ...]) -> str:
    """The bounds in an annotation: `, 0 to 1`, `, from 1`."""
    found = {type(m).__name__: m for mark in marks for m in getattr(mark, "metadata", [mark])}
    low, above = (getattr(found.get(name), key, None) for name, key in (("Ge", "ge"), ("Gt", "gt")))
    high, below = (getattr(found.get(name), key, None) for name, key in (("Le", "le"), ("Lt", "lt")))
    if low is not None and (high if high is not None else below) is not None:
        end = f"{high:g}" if high is not None else f"below {below:g}" if below < 2**31 else ""
        return f", {low:g} to {end}" if end else f", from {low:g}"
    return f", from {low:g}" if low is not None else f", above {above:g}" if above is not None else ""


def default(field: Any) -> str:
    """A default as it is written in YAML."""
    if field.default is PydanticUndefined:
        return "**required**"
    value = field.default
    if isinstance(value, BaseModel):
        return "its own"
    if value in ("", (), None) or value == {}:
        return ""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{list(value)}`" if isinstance(value, tuple) else f"`{value}`"


def data_sets() -> Iterator[tuple[str, ...]]:
    """Every data set: name, classes, images, side, where it is expected."""
    for name, info in DATASETS.items():
        images = f"{info.train:,} + {info.val:,}" if info.train else "the folder's"
        yield f"`{name}`", str(len(info.classes) or "the folder's"), images, f"{info.size} px", info.note


def nets() -> Iterator[tuple[str, ...]]:
    """Every family of nets: names, options."""
    for family in dict.fromkeys(NETS.values()):
        names = [f"`{name}`" for name, own in NETS.items() if own is family]
        deeper = [f"any `{names[0].strip('`')[:-1]}<depth>`"] if family is convnet else []
        hints = inspect.get_annotations(family.Options, eval_str=True)
        said = [f"`{key}`: {kind(hints[key])}; {default(field)}" for key, field in family.Options.model_fields.items()]
        yield ", ".join([*names, *deeper]), "<br>".join(said) or "none"
    yield (
        "any classification model of torchvision, such as `resnet50`, `mobilenet_v2`, `swin_v2_t`",
        "torchvision's own",
    )


def presets() -> Iterator[tuple[str, ...]]:
    """Every preset at IPC 10 with a ResNet-18, on some data sets."""
    for name, preset in PRESETS.items():
        shown = []
        for dataset in LOOKED_AT:
            info = DATASETS[dataset]
            recipe = plain(recipes.resolve(name, {}, dataset, len(info.classes), 10, info.size, "resnet18"))
            values = (recipe[key] for key in SHOWN)
            shown.append(", ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values))
        yield f"`{name}`", (preset.__doc__ or "").strip().splitlines()[0].rstrip("."), *shown


def tables() -> dict[str, tuple[tuple[str, ...], list[tuple[str, ...]]]]:
    """The parts of docs/experiment.md: heading and lines of each table."""
    head = ("key", "value", "default", "meaning")
    found = {name: (head, keys(model)) for name, model in MODELS.items()}
    found["datasets"] = (
        ("name", "classes", "training + test images", "side", "where it is expected"),
        list(data_sets()),
    )
    found["nets"] = (("name", "options"), list(nets()))
    found["presets"] = (("preset", "from", *(f"on {name}" for name in LOOKED_AT)), list(presets()))
    return found
