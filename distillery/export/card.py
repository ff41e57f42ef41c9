"""The card of an exported set: README.md in the form that model hubs show, made from the run and nothing else."""

from __future__ import annotations

import json
import re
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from distillery import console, methods
from distillery.data import DATASETS
from distillery.export import formats
from distillery.export.source import Origin

SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
Facts = Mapping[str, Any]


def text(facts: Facts, origin: Origin, view_bytes: int) -> str:
    """The whole card.

    Args:
        facts: what set.json holds.
        origin: where the set comes from.
        view_bytes: size of the recorded views.
    """
    parts = [_header(facts), _what(facts), _loading(facts, view_bytes), _accuracy(facts, origin), _recipe(facts)]
    return "\n\n".join([*parts, _origin(facts), _licence(facts), _limits(facts, origin), _citation(facts)]) + "\n"


def paper(method: str) -> str:
    """The paper that a method's module names, in one line; empty where it names none."""
    found = re.search(r"^Paper: (.*?)(?=^\w[\w ]*:|\Z)", methods.find(method).__doc__ or "", re.MULTILINE | re.DOTALL)
    said = " ".join(found[1].split()) if found else ""
    return "" if said.startswith("none") else said


def line(value: object) -> str:
    """A name as one harmless line of Markdown."""
    return re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", " ".join(str(value).split()))


def _header(facts: Facts) -> str:
    info = DATASETS.get(facts["dataset"])
    head: dict[str, Any] = {
        "license": info.licence if info else "unknown",
        "pretty_name": _title(facts),
        "task_categories": ["image-classification"],
        "tags": ["dataset-distillation", facts["method"]],
        "size_categories": [next((name for limit, name in SIZES if facts["images"] < limit), "n>1M")],
    }
    if facts["format"] == "huggingface":
        head["configs"] = [{"config_name": "default", "data_files": [{"split": "train", "path": "train/**"}]}]
    elif facts["format"] != "imagefolder":
        head["viewer"] = False
    return f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=False)}---"


def _title(facts: Facts) -> str:
    return f"{facts['dataset'] or 'Images'} distilled by {facts['method']}, {facts['ipc']} images per class"


def _what(facts: Facts) -> str:
    soft = "the soft label of each by the run's teacher" if facts["soft"] else "no soft labels: there was no teacher"
    lines = [
        f"# {line(_title(facts))}",
        f"{facts['images']} synthetic images of {facts['size']} x {facts['size']} pixels, {facts['ipc']} for each of "
        f"{len(facts['classes'])} classes, and {soft}. A network is trained on them instead of on the real images.",
        "![The first images of the first classes](preview.png)",
    ]
    return "\n\n".join(lines)


def _loading(facts: Facts, view_bytes: int) -> str:
    shape = (facts["images"], 3, facts["size"], facts["size"])
    shards = f"train-{{000000..{(facts['images'] - 1) // formats.SHARD:06d}}}.tar"
    code = formats.find(facts["format"]).load
    values = {"at": "SET", "bytes": 3 * facts["images"] * facts["size"] ** 2, "shape": shape, "n": facts["images"]}
    values |= {"shards": shards, "soft_field": ", sample['soft.npy']" if facts["soft"] else ""}
    for name, value in values.items():
        code = code.replace(f"{{{name}}}", str(value))
    kept = "`labels.npy` has the class of each image"
    kept += ", `soft.npy` the teacher's logits for it." if facts["soft"] else "."
    ways = ["## Load it", f"`SET` is this folder. {kept}", f"```python\n{code}\n```"]
    ways += ["With Distillery, from any folder or store:"]
    ways += ['```python\nimport distillery\ndataset = distillery.load("SET")\nimage, soft_label = dataset[0]\n```']
    if facts["recorded"]:
        script = ", and so does Distillery's `docs/train_on_it.py`, which is plain PyTorch" if facts["plain"] else ""
        script += "" if facts["format"] == "folder" or not script else " (it reads the format `folder`)"
        ways.append(
            f"`views/` ({console.size(view_bytes)}) records every view that the student below was shown, in order, "
            f"with the teacher's logits of it. `dataset.loader()` replays them{script}. `set.json` holds the recipe, "
            "the learning rate of each epoch, and which positions each step has."
        )
    return "\n\n".join(ways)


def _accuracy(facts: Facts, origin: Origin) -> str:
    if origin.result is None:
        return "## Accuracy\n\nNot known: the images were exported without the run that they belong to."
    groups: dict[tuple[str, str, str], list[tuple[float, float]]] = defaultdict(list)
    for manifest, result in (origin.result, *origin.beside):
        same = manifest.config["ipc"] == facts["ipc"] and manifest.config["dataset"] == facts["dataset"]
        mine = manifest.config["method"] == facts["method"] and manifest.config["options"] == facts["options"]
        if same and (mine or manifest.config["method"] == "random"):
            for student in result["students"]:
                key = (manifest.config["method"], student["net"], student["recipe"])
                groups[key].append((student["acc_last"], student["acc_best"]))
    rows = [[line(m), line(n), line(r), *_means(v), str(len(v))] for (m, n, r), v in sorted(groups.items())]
    teacher = facts["teacher"]
    own = ", ".join(
        f"{100 * s['acc_last']:.2f} % ({line(s['net'])}, {line(s['recipe'])})" for s in origin.result[1]["students"]
    )
    said = f"Top-1 on the validation images of {line(facts['dataset'])}, in percent; the deviation is over seeds. "
    said += f"The images in this set have seed {facts['seed']} and reached {own}."
    said += f" The teacher reaches {100 * teacher['accuracy']:.2f} %." if teacher else ""
    if not any(method == "random" for method, _, _ in groups):
        said += " Random real images were not run beside them: how much the method adds is not known."
    return f"## Accuracy\n\n{said}\n\n" + _table(("images", "student", "recipe", "last", "best", "seeds"), rows)


def _means(values: Sequence[tuple[float, float]]) -> list[str]:
    found = []
    for numbers in zip(*values, strict=True):
        spread = f" +- {100 * statistics.stdev(numbers):.2f}" if len(numbers) > 1 else ""
        found.append(f"{100 * statistics.fmean(numbers):.2f}{spread}")
    return found


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _recipe(facts: Facts) -> str:
    if not facts["student"]:
        return "## Recipe\n\nNone: train as you like, normalising as you like."
    recipe = {key: value for key, value in facts["recipe"].items() if value not in ("", [], {})}
    student = facts["student"]
    return (
        f"## Recipe\n\n{line(student['net'])} {line(json.dumps(student['net_options'], sort_keys=True))}, trained as "
        f"follows; pixels are divided by 255 and normalised by mean {facts['mean']} and deviation {facts['std']}.\n\n"
        f"```json\n{json.dumps(recipe, indent=1, sort_keys=True)}\n```"
    )


def _origin(facts: Facts) -> str:
    teacher = facts["teacher"]
    names = f"{line(teacher['net'])}, {100 * teacher['accuracy']:.2f} % on the validation images" if teacher else "none"
    rows = [["method", f"{line(facts['method'])} {line(json.dumps(facts['options'], sort_keys=True))}"]]
    rows += [["teacher", names], *([key, f"`{value}`"] for key, value in sorted(facts["source"].items()) if value)]
    return "## Where it comes from\n\n" + _table(("what", "value"), rows)


def _licence(facts: Facts) -> str:
    info = DATASETS.get(facts["dataset"])
    said = info.terms if info else "The data set is not known, and so is its licence: ask whoever gave the images."
    return (
        f"## Licence of the source data\n\n{said}\n\nDistilled images are made from the real ones, and some methods "
        "copy pieces of them: treat this set as you have to treat its source."
    )


def _limits(facts: Facts, origin: Origin) -> str:
    copies = facts["method"] in ("random", "median", "rded")
    lines = [
        "- It was made for classification with these classes and this size; for anything else it is untested.",
        "- It inherits the errors and biases of its source and of the teacher.",
        "- " + ("Its images are, or are cut out of, real images: it keeps nothing private." if copies else
        "No privacy is promised: what an image tells about the real ones has not been examined."),
    ]  # fmt: skip
    if origin.result is not None:
        seeds = {m.config["seed"] for m, _ in (origin.result, *origin.beside) if m.config["method"] == facts["method"]}
        lines += ["- Fewer than three seeds were run: the spread is a guess."] if len(seeds) < 3 else []
        lines += ["- Other networks and recipes than those in the table reach other accuracies."]
    return "## Limits\n\n" + "\n".join(lines)


def _citation(facts: Facts) -> str:
    info, cited = DATASETS.get(facts["dataset"]), paper(facts["method"])
    lines = [f"- Method: {cited}"] if cited else [f"- Method: {line(facts['method'])} is a baseline without a paper."]
    lines += [f"- Data: {info.cite}"] if info and info.cite else []
    return "## Cite\n\n" + "\n".join(lines)
