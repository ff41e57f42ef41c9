"""What students carry over from synthetic to real images, and what BatchNorm's statistics have to do with it.

    python benchmarks/carry_over.py RUN --out RESULT
    python benchmarks/carry_over.py RUN --methods sre2l random --net convnet3 --epochs 200 --out RESULT

A student with BatchNorm is measured with the statistics of the images that it was trained on. Where those of real
images are others, it fails on them for that reason alone, whatever its weights have learnt. So each set of a finished
run trains two students, alike but for the norm, and one of them is measured twice:

    as trained    BatchNorm, as in every table: its running statistics come from the synthetic images
    real          the same weights, with the statistics of `--images` real training images in the evaluation view
    instance      InstanceNorm, which keeps no statistics

The distance from the first to the others is BatchNorm's; what is still missing to random real images is the set's own.
RESULT gets metrics.json, report.md and environment.json.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.accuracy import environment
from benchmarks.diversity import Finished, finished, line, the_teacher, views
from distillery import labels, recipes, student
from distillery.data import real, synthetic
from distillery.data.augment import evaluation_view
from distillery.data.real import Real
from distillery.device import choose
from distillery.errors import UserError, choices
from distillery.rng import generator
from distillery.teacher import Frozen
from distillery.teacher import load as load_teacher
from distillery.track import Track
from distillery.train import accuracy

BATCH = 250  # images per forward of the new statistics
WAYS = ("as trained", "real", "instance")
Row = dict[str, Any]


def with_statistics(net: nn.Module, teacher: Frozen, images_u8: torch.Tensor) -> nn.Module:
    """A copy whose BatchNorm statistics are the mean over these images [N, 3, R, R], seen in the evaluation view."""
    found = copy.deepcopy(net)
    for module in found.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
            module.momentum = None  # a plain mean over the batches
    found.train()
    for view in views(teacher, images_u8, BATCH):
        with torch.no_grad(), teacher.compute.autocast():
            found(view)
    return found.eval()


def students(one: Finished, images: Real, teacher: Frozen, net: str, recipe: str, epochs: int, real_images: int) -> Row:
    """The three accuracies (fractions, last epoch) of one set."""
    config, found = one.manifest.config, synthetic.load(one.folder)
    case = (images.name, len(images.classes), config["ipc"], images.size, net)
    wanted = recipes.resolve(recipe, {"epochs": epochs} if epochs else {}, *case)
    validation, seed = images.images("val"), config["seed"]
    trained: list[nn.Module] = []
    row: Row = {"method": config["method"], "ipc": config["ipc"], "seed": seed, "epochs": wanted.epochs}
    for way, norm in (("as trained", "batch"), ("instance", "instance")):
        outcome = student.train(
            net,
            {"norm": norm},
            wanted,
            found,
            labels.on_the_fly(teacher, wanted.teacher_mode),
            teacher,
            validation,
            seed=seed,
            compute=teacher.compute,
            track=Track.quiet(),
            keep=trained.append,
        )
        row[way] = outcome.acc_last
    pixels, _ = images.pixels("train")
    picked = torch.randperm(len(pixels), generator=generator(seed, "carry_over"))[:real_images]
    adapted = with_statistics(trained[0], teacher, pixels[picked])
    view = functools.partial(evaluation_view, size=teacher.size, mean=teacher.mean, std=teacher.std)
    row["real"] = accuracy(adapted, *validation, view, teacher.compute)[0]
    return row


def measure(
    run: Path,
    methods: Sequence[str],
    ipc: int,
    net: str,
    recipe: str,
    epochs: int,
    real_images: int,
    device: str,
    precision: str,
) -> list[Row]:
    """A row for each set of the run with that IPC, in the order of their names; `methods` () = all.

    Raises:
        UserError: not a finished run's folder, several teachers, a net without the option norm, hard labels, or no set.
    """
    if not net.startswith("convnet"):
        raise UserError(f"--net {net}: has no option norm; give a ConvNet, such as convnet3")
    if recipe == "fair-hard":
        raise UserError("--recipe fair-hard: has InstanceNorm students already; give one with soft labels")
    sets = [one for one in finished(run, "3-synthetic", "synthetic") if one.manifest.config["ipc"] == ipc]
    chosen = [one for one in sets if not methods or one.manifest.config["method"] in methods]
    if not chosen:
        there = sorted({one.manifest.config["method"] for one in sets})
        raise UserError(f"{run}: no set of {', '.join(methods)} at IPC {ipc}; there are {choices(there)}")
    teacher = load_teacher(the_teacher([run], chosen), choose(device, precision))
    images = real.load(finished(run, "1-data", "dataset")[0].folder)
    rows = []
    for one in chosen:
        rows.append(students(one, images, teacher, net, recipe, epochs, real_images))
        print(line(_cells(rows[-1])), flush=True)
    return rows


def report(rows: Sequence[Row], net: str, recipe: str, real_images: int) -> str:
    """The accuracies as Markdown, best first."""
    head = ["method", "IPC", "seed", *WAYS, "statistics", "norm"]
    ordered = sorted(rows, key=lambda row: -float(row["as trained"]))
    return "\n".join(
        [
            "# What students carry over to real images",
            "",
            f"{net}, {recipe} recipe, {rows[0]['epochs']} epochs; accuracy on all validation images in percent, last "
            "epoch. As trained: BatchNorm with the statistics of the synthetic images. Real: the same weights with the "
            f"statistics of {real_images:,} real training images. Instance: InstanceNorm instead. The last two columns "
            "are points gained on the first.",
            "",
            line(head),
            line([":--", *["--:"] * (len(head) - 1)]),
            *(line(_cells(row)) for row in ordered),
            "",
        ]
    )


def _cells(row: Row) -> list[str]:
    gained = (row[way] - row["as trained"] for way in WAYS[1:])
    points = (*(f"{100 * row[way]:.1f}" for way in WAYS), *(f"{100 * value:+.1f}" for value in gained))
    return [row["method"], str(row["ipc"]), str(row["seed"]), *points]


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and leave a result folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a finished distillery run")
    parser.add_argument("--methods", nargs="+", default=[], help="only these (default: all)")
    parser.add_argument("--ipc", type=int, default=10)
    parser.add_argument("--net", default="convnet3")
    parser.add_argument("--recipe", default="fair-soft", help="a preset with soft labels")
    parser.add_argument("--epochs", type=int, default=0, help="0 = the recipe's")
    parser.add_argument("--images", type=int, default=2000, help="real images behind the other statistics")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--out", type=Path, required=True, help="the result folder to write")
    given = parser.parse_args(arguments)
    asked = (given.methods, given.ipc, given.net, given.recipe, given.epochs, given.images)
    rows = measure(given.run, *asked, given.device, given.precision)
    given.out.mkdir(parents=True, exist_ok=True)
    said = {name: value for name, value in vars(given).items() if name not in ("run", "out")}
    (given.out / "metrics.json").write_text(json.dumps({"asked": said, "sets": rows}, indent=1) + "\n")
    (given.out / "report.md").write_text(report(rows, given.net, given.recipe, given.images), encoding="utf-8")
    about = environment(choose(given.device, given.precision))
    (given.out / "environment.json").write_text(json.dumps(about, indent=1, sort_keys=True) + "\n")
    print((given.out / "report.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
