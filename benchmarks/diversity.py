"""How alike the images of a class are, set by set, and what each set cost: from finished folders of `distillery run`.

    python benchmarks/diversity.py RUN --out RESULT
    python benchmarks/diversity.py RUN OTHER_RUN --teacher RUN/2-teachers/resnet20-0123456789abcdef --out RESULT
    python benchmarks/diversity.py RUN --also OTHER_RUN/2-teachers/convnet3-0123456789abcdef --out RESULT

Features are what enters the teacher's last linear layer, in the evaluation view. For each class

    centroid   mean cosine similarity of its K features to their mean (DELT, CVPR 2025, the diversity figure)
    pairwise   mean cosine similarity of two different images of it; needs K >= 2

and then the mean over classes; lower is more diverse. Both depend on K (an image is part of its own centroid), so the
baseline is as many real training images of each class, drawn at random `--draws` times.

Cost: seconds of the synthesis by the set's manifest, and the work that the method's `estimate` counts. An image-step is
one image going forth and back through a teacher once. Beside CDA with the same data, IPC and iterations stands the
share of its image-steps and, where both ran on the same hardware, of its seconds: DELT's saving.

Grain: how much of a set's contrast lies between neighbouring pixels (`grain`). White noise has 1.

Recognised: the share of a set's images that the net which gives the features, and every net of `--also`, puts into
their class. What only the teacher recognises is made for it alone; a net that had no part in the set tells.

RESULT gets metrics.json, sets.csv, report.md and environment.json.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.accuracy import environment
from distillery import artifact, methods
from distillery.artifact import Manifest
from distillery.data import augment, real, synthetic
from distillery.data.real import Real
from distillery.device import choose
from distillery.errors import UserError, choices
from distillery.nets import head
from distillery.rng import generator
from distillery.teacher import Frozen
from distillery.teacher import load as load_teacher

REAL = "real images"
DRAWS = 5
BATCH = 256  # images per forward
COLUMNS = (
    *("method", "options", "ipc", "seed", "centroid", "pairwise", "grain", "recognised", "iterations"),
    *("forwards", "image_steps", "seconds", "hardware", "dataset", "set", "fingerprint"),
)
FEATURES, COSTS = (
    ("method", "IPC", "sets", "centroid", "pairwise", "grain"),
    ("iterations", "image-steps", "seconds", "image-steps / CDA", "seconds / CDA"),
)
Row = dict[str, Any]


@dataclass(frozen=True)
class Finished:
    """A finished artifact."""

    folder: Path
    manifest: Manifest


def finished(run: Path, part: str, kind: str) -> list[Finished]:
    """The finished artifacts of a kind in one part of a run folder ("3-synthetic"); failures are passed over.

    Raises:
        UserError: no such folder, or nothing finished in it.
    """
    if not (run / part).is_dir():
        raise UserError(f"{run}: has no folder {part}; give the folder of a finished `distillery run`")
    found = [Finished(path.parent, artifact.read(path.parent)) for path in sorted((run / part).glob("*/manifest.json"))]
    found = [one for one in found if one.manifest.kind == kind]
    if not found:
        raise UserError(f"{run / part}: has no finished {kind}; run the experiment to its end with `distillery run`")
    return found


def the_teacher(runs: Sequence[Path], sets: Sequence[Finished]) -> Path:
    """The only teacher that the sets were made with.

    Raises:
        UserError: they were made with several; lists their folders.
    """
    used = {print_ for one in sets for name, print_ in one.manifest.inputs.items() if name.startswith("teacher-")}
    every = [one for run in runs for one in finished(run, "2-teachers", "teacher")]
    found = {one.manifest.fingerprint: one.folder for one in every if one.manifest.fingerprint in used}
    if len(found) != 1:
        raise UserError(
            f"the sets were made with {len(used)} teachers, and one must judge them all; choose it with --teacher: "
            f"{choices(sorted(found.values())) or 'its folder (it is not in these runs)'}"
        )
    return next(iter(found.values()))


def features(teacher: Frozen, images_u8: Tensor) -> Tensor:
    """Input of the last linear layer [N, F], float64 on the CPU, for uint8 images [N, 3, R, R]."""
    found = []
    for x_norm in views(teacher, images_u8):
        with torch.no_grad(), teacher.compute.autocast():
            found.append(head.features(teacher.net, x_norm).double().cpu())
    return torch.cat(found)


def views(judge: Frozen, images_u8: Tensor, batch: int = BATCH) -> Iterator[Tensor]:
    """The images as accuracy is measured on them, a batch at a time."""
    for part in images_u8.split(batch):
        yield augment.evaluation_view(judge.compute.images(part), judge.size, judge.mean, judge.std)


def recognised(judges: Sequence[Frozen], images_u8: Tensor, labels: Tensor) -> Row:
    """The share of images that each net puts into their class; "recognised" is what the first does."""
    shares = []
    for judge in judges:
        logits = torch.cat([judge.logits(view) for view in views(judge, images_u8)])
        shares.append(float((logits.argmax(1).cpu() == labels).double().mean()))
    return {"recognised": shares[0]} | {f"recognised_{place}": share for place, share in enumerate(shares) if place}


def likeness(found: Tensor) -> tuple[float, float | None]:
    """Cosine similarities of the features [K, F] of one class.

    Returns:
        The mean to the centroid (the mean feature), and the mean over pairs, None where there is no pair.
    """
    units, count = functional.normalize(found, dim=1), len(found)
    to_centroid = float((units @ functional.normalize(found.mean(0), dim=0)).mean())
    if count < 2:
        return to_centroid, None
    itself = units.square().sum()  # an image with itself: 1, or 0 for a feature of zeros
    return to_centroid, float((units.sum(0).square().sum() - itself) / (count * (count - 1)))


def measured(found: Tensor, labels: Tensor) -> Row:
    """Both similarities of a set's features [N, F], mean over classes, and the first of each class."""
    each = [likeness(found[labels == cls]) for cls in labels.unique()]  # sorted
    pairs = [pair for _, pair in each if pair is not None]
    return {
        "centroid": statistics.fmean(centroid for centroid, _ in each),
        "pairwise": statistics.fmean(pairs) if pairs else None,
        "per_class": [round(centroid, 6) for centroid, _ in each],
    }


def grain(images_u8: Tensor) -> float:
    """Root mean square of differences between neighbouring pixels, over that of any two pixels of an image's channel.

    0 for images of one colour, near 0 for smooth ones, 1 for white noise, more for a checkerboard; contrast and
    brightness do not matter. Any two pixels, drawn independently, differ by twice the variance in the mean of squares.
    """
    pixels = images_u8.double()
    steps = (pixels.diff(dim=dim).square().mean() for dim in (2, 3))
    apart = 2 * pixels.var((2, 3), correction=0).mean()
    return float((sum(steps) / 2 / apart).sqrt()) if apart else 0.0


def baseline(judges: Sequence[Frozen], images: Real, ipc: int, draws: int) -> list[Row]:
    """Random real training images, IPC of each class: a row for each draw, none where a class has too few images."""
    counts = images.counts("train")
    if min(counts) < ipc:
        return []
    pixels, labels = images.pixels("train")
    starts = [sum(counts[:cls]) for cls in range(len(counts))]
    rows = []
    for draw in range(draws):
        picked = torch.cat(
            [
                start + torch.randperm(count, generator=generator(draw, "diversity", ipc, cls))[:ipc]
                for cls, (start, count) in enumerate(zip(starts, counts, strict=True))
            ]
        )
        facts = {"method": REAL, "options": "{}", "ipc": ipc, "seed": draw, "dataset": images.name}
        rows.append(facts | seen(judges, pixels[picked], labels[picked]))
    return rows


def seen(judges: Sequence[Frozen], images_u8: Tensor, labels: Tensor) -> Row:
    """What the nets say of a set: the first gives the features, all of them recognise or not; and its grain."""
    alike = measured(features(judges[0], images_u8), labels)
    return alike | {"grain": grain(images_u8)} | recognised(judges, images_u8, labels)


def one_set(judges: Sequence[Frozen], images: Real, one: Finished) -> Row:
    """How alike a synthetic set's images are, and what they cost."""
    config, found = one.manifest.config, synthetic.load(one.folder)
    method, ipc = config["method"], config["ipc"]
    options = methods.config_of(method, config["options"], images.name, ipc)
    said = methods.find(method).estimate(
        options, ipc=ipc, classes=len(images.classes), size=images.size, train=sum(images.counts("train"))
    )
    return {
        "method": method,
        "options": json.dumps(config["options"], sort_keys=True),
        "ipc": ipc,
        "seed": config["seed"],
        **seen(judges, found.images_u8, found.labels),
        "iterations": getattr(options, "iterations", None),
        "forwards": said["forwards"],
        "image_steps": said.get("backwards", 0),
        "seconds": one.manifest.run["seconds"],
        "hardware": one.manifest.run["hardware"],
        "dataset": images.name,
        "set": one.folder.name,
        "fingerprint": one.manifest.fingerprint,
    }


def measure(
    runs: Sequence[Path], teacher: Path | None, draws: int, device: str, precision: str, also: Sequence[Path] = ()
) -> Row:
    """Everything that metrics.json holds.

    Args:
        runs: folders of finished runs.
        teacher: folder of a `teacher` artifact; None for the one that made the sets.
        draws: of real images.
        device, precision: of the nets, see `distillery.device.choose`.
        also: folders of more `teacher` artifacts, which say what they recognise.

    Raises:
        UserError: a folder that is not a finished run's, several teachers and none chosen, or one for other images.
        CorruptArtifact: files that are not what their manifest says.
    """
    sets: dict[str, tuple[Path, Finished]] = {}
    for run in runs:
        for one in finished(run, "3-synthetic", "synthetic"):
            sets.setdefault(one.manifest.fingerprint, (run, one))
    folders = [teacher or the_teacher(runs, [one for _, one in sets.values()]), *also]
    manifests = [_teachers(folder) for folder in folders]
    judges = [load_teacher(folder, choose(device, precision)) for folder in folders]
    data = {run: {one.manifest.fingerprint: one for one in finished(run, "1-data", "dataset")} for run in runs}
    loaded: dict[str, Real] = {}
    rows: list[Row] = []
    drawn: set[tuple[str, int]] = set()
    for run, one in sets.values():
        source = one.manifest.inputs["data"]
        if source not in data[run]:
            raise UserError(f"{one.folder}: was made from data that is not in {run / '1-data'}; put it back there")
        if source not in loaded:
            loaded[source] = real.load(data[run][source].folder)
            for judge, folder in zip(judges, folders, strict=True):
                _check(judge, folder, loaded[source])
        ipc = one.manifest.config["ipc"]
        if (source, ipc) not in drawn:
            drawn.add((source, ipc))
            rows += [row | {"data": source} for row in baseline(judges, loaded[source], ipc, draws)]
        rows.append(one_set(judges, loaded[source], one) | {"data": source})
        print(f"{one.folder.name}: centroid {rows[-1]['centroid']:.4f}", flush=True)
    rows.sort(key=lambda row: (row["dataset"], row["data"], row["ipc"], row["method"] != REAL, *_name(row)))
    first, *others = [
        {"net": judge.card.net, "accuracy": judge.card.accuracy, "fingerprint": about.fingerprint}
        for judge, about in zip(judges, manifests, strict=True)
    ]
    return {"teacher": first, "also": others, "draws": draws, "groups": grouped(rows), "sets": rows}


def _teachers(folder: Path) -> Manifest:
    about = artifact.read(folder)
    if about.kind != "teacher":
        raise UserError(f"{folder}: holds a {about.kind} artifact; give the folder of one teacher")
    return about


def _name(row: Row) -> tuple[str, str, int]:
    return row["method"], row["options"], row["seed"]


def _check(judge: Frozen, folder: Path, images: Real) -> None:
    """Refuse a teacher for other images."""
    for what, theirs, ours in (
        ("size", judge.size, images.size),
        ("number of classes", len(judge.card.classes), len(images.classes)),
    ):
        if theirs != ours:
            raise UserError(
                f"teacher {folder}: its {what} is {theirs}, that of the images {ours}; give a teacher of {images.name}"
            )


def grouped(rows: Sequence[Row]) -> list[Row]:
    """Seeds of the same method, options and IPC together, with their cost beside CDA's."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault((row["data"], row["ipc"], row["method"], row["options"]), []).append(row)
    groups = [_group(own) for own in found.values()]
    for group in groups:
        group["name"] = _told_apart(group, groups)
        beside = [other for other in groups if other["method"] == "cda" and _same(group, other)]
        if beside and group["image_steps"]:
            cda = beside[0]
            group["image_steps_of_cda"] = group["image_steps"] / cda["image_steps"]
            if len(group["hardware"]) == 1 and group["hardware"] == cda["hardware"]:
                group["seconds_of_cda"] = group["seconds"] / cda["seconds"]
    return groups


def _told_apart(group: Row, groups: Sequence[Row]) -> str:
    """The method with those of its options that differ at this IPC."""
    alike = [one for one in groups if all(one[key] == group[key] for key in ("data", "ipc", "method"))]
    variants = [json.loads(one["options"]) for one in alike]
    own = json.loads(group["options"])
    differing = [key for key in sorted(own) if any(options.get(key) != own[key] for options in variants)]
    return " ".join([group["method"], *(f"{key}={own[key]}" for key in differing)])


def _same(group: Row, other: Row) -> bool:
    return all(group[key] == other[key] for key in ("data", "ipc", "iterations"))


def _group(own: Sequence[Row]) -> Row:
    first = own[0]
    kept = ("method", "options", "ipc", "dataset", "data", "iterations", "forwards", "image_steps")
    group = {key: first.get(key) for key in kept} | {"sets": len(own)}
    for key in ("centroid", "pairwise", "grain", "seconds", *(key for key in first if key.startswith("recognised"))):
        values = [row[key] for row in own if row.get(key) is not None]
        group[key] = statistics.fmean(values) if values else None
        group[f"{key}_std"] = statistics.stdev(values) if len(values) > 1 else None
    return group | {"hardware": sorted({row["hardware"] for row in own if "hardware" in row})}


def report(found: Row) -> str:
    """The numbers as Markdown."""
    teacher = found["teacher"]
    lines = [
        "# How alike the images of a class are",
        "",
        f"Features of {_judge(teacher)}. Cosine "
        "similarity to the class centroid and between pairs, mean over classes; lower is more diverse. Mean and sample "
        f"deviation over sets, of real images over {found['draws']} draws. Image-steps are images that go forth and "
        "back through a teacher, by the method's estimate; seconds are of the synthesis of a set. Shares are of CDA at "
        "the same IPC and iterations, of seconds on the same hardware only. Grain is how much of the contrast lies "
        "between neighbouring pixels: 1 for white noise. Recognised is the share of images that a "
        f"net puts into their class: {', '.join(_judge(one) for one in (teacher, *found['also']))}.",
        "",
    ]
    keys = ["recognised", *(f"recognised_{place}" for place in range(1, len(found["also"]) + 1))]
    head = (*FEATURES, *(f"by {one['net']}" for one in (teacher, *found["also"])), *COSTS)
    titles = {group["data"]: group["dataset"] for group in found["groups"]}
    for data, name in titles.items():
        own = [group for group in found["groups"] if group["data"] == data]
        machines = sorted({machine for group in own for machine in group["hardware"]})
        lines += [f"## {name} ({data[:16]})", "", f"Made on {'; '.join(machines)}.", ""]
        lines += [line(head), line([":--", *["--:"] * (len(head) - 1)]), *(_shown(group, keys) for group in own), ""]
    return "\n".join(lines)


def _judge(one: Row) -> str:
    return f"{one['net']} ({100 * one['accuracy']:.2f} %, {one['fingerprint'][:16]})"


def _shown(group: Row, judged: Sequence[str]) -> str:
    return line(
        [
            *(group["name"], str(group["ipc"]), str(group["sets"])),
            *(_number(group, key, "{:.4f}") for key in ("centroid", "pairwise")),
            *(_number(group, key, "{:.2f}") for key in ("grain", *judged)),
            *("-" if group[key] is None else f"{group[key]:,}" for key in ("iterations", "image_steps")),
            _number(group, "seconds", "{:.1f}"),
            *(_share(group.get(key)) for key in ("image_steps_of_cda", "seconds_of_cda")),
        ]
    )


def _number(group: Row, key: str, form: str) -> str:
    mean, spread = group[key], group[f"{key}_std"]
    if mean is None:
        return "-"
    return form.format(mean) if spread is None else f"{form.format(mean)} \u00b1 {form.format(spread)}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f} %"


def line(cells: Iterable[str]) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def write(found: Row, out: Path) -> None:
    """Leave the numbers as JSON, CSV and Markdown."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "metrics.json").write_text(json.dumps(found, indent=1) + "\n")
    with (out / "sets.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(found["sets"])
    (out / "report.md").write_text(report(found), encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and leave a result folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a finished distillery run")
    parser.add_argument("--teacher", type=Path, help="folder of the teacher that judges (default: the runs' only one)")
    parser.add_argument("--also", type=Path, nargs="+", default=[], help="folders of more nets that look at the images")
    parser.add_argument("--draws", type=int, default=DRAWS, help="of real images (default: %(default)s)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the features")
    parser.add_argument("--threads", type=int, default=0, help="torch's threads; 0 = its default")
    parser.add_argument("--out", type=Path, required=True, help="the result folder to write")
    given = parser.parse_args(arguments)
    if given.draws < 1:
        raise UserError(f"--draws {given.draws}: at least 1, real images are what the sets are held against")
    if given.threads:
        torch.set_num_threads(given.threads)
    found = measure(given.runs, given.teacher, given.draws, given.device, given.precision, given.also)
    write(found, given.out)
    about = environment(choose(given.device, given.precision))
    (given.out / "environment.json").write_text(json.dumps(about, indent=1, sort_keys=True) + "\n")
    print((given.out / "report.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
