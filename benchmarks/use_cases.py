"""What a distilled set is good for, measured on digits: three uses, each against random real images, over seeds.

    python benchmarks/use_cases.py architectures --work runs/use_cases --out RESULT
    python benchmarks/use_cases.py continual --work runs/use_cases --out RESULT
    python benchmarks/use_cases.py sharing --work runs/use_cases --out RESULT

`--work` holds the run whose sets are exported; the first command makes it, the others find it. RESULT gets report.md,
metrics.json, experiment.yaml (of that run) and environment.json. docs/use_cases.md says what each one asks.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.accuracy import environment
from benchmarks.tables import markdown
from distillery import artifact, distilled, export, methods, nets, run, teacher
from distillery.config import TeacherConfig
from distillery.data import DATASETS, augment, real
from distillery.data.real import Real
from distillery.device import choose
from distillery.errors import UserError
from distillery.export import Wanted
from distillery.nets import head
from distillery.rng import derived_seed, generator, seeded
from distillery.track import Track
from distillery.train import accuracy

IPC, SEEDS = 10, (0, 1, 2)
TAUGHT = "net: convnet2, net_options: {width: 32}, epochs: 8, batch: 64, lr: 0.1, flip: 0.0, crop_pad: 1"
TEXT = f"""name: use_cases
dataset: {{name: digits}}
teacher: {{{TAUGHT}}}
methods:
  - {{method: random, ipc: [{IPC}], seeds: {list(SEEDS)}}}
  - {{method: rded, ipc: [{IPC}], seeds: {list(SEEDS)}}}
  - {{method: sre2lpp, ipc: [{IPC}], seeds: {list(SEEDS)}, options: {{iterations: 200}}}}
students:
  - {{net: convnet2, net_options: {{width: 32}}, recipe: {{preset: fair-soft, epochs: 100}}}}
"""
METHODS = ("random", "rded", "sre2lpp")
CPU = choose("cpu", "fp32")
Metrics = dict[str, Any]

# Eight nets of very different strength, so that there is an order to be found.
SEARCHED: tuple[tuple[str, dict[str, Any]], ...] = (
    ("convnet1", {"width": 2}),
    ("convnet1", {"width": 8}),
    ("convnet2", {"width": 4}),
    ("convnet2", {"width": 16}),
    ("convnet3", {"width": 4}),
    ("convnet3", {"width": 32}),
    ("convnet4", {"width": 4}),
    ("convnet4", {"width": 16}),
)
EPOCHS = 15  # on everything
STEPS = 5  # of continual learning, two classes each
BUFFER = 5  # images per class that the learner may keep
REPLAY = 400  # optimiser steps on the buffer


@dataclass(frozen=True)
class Place:
    """Where the run and its exported sets are."""

    work: Path

    @property
    def run(self) -> Path:
        return self.work / "run"

    def real(self) -> Real:
        """The real images of the run."""
        return real.load(next((self.run / "1-data").glob("digits-*")))

    def set(self, method: str, seed: int) -> distilled.DistilledSet:
        """An exported cell, with validation images for the plain script; exported when it is first asked for."""
        out = self.work / "sets" / f"{method}-{seed}"
        if not artifact.is_finished(out):
            export.export(str(self.run), str(out), Wanted(cell=f"{method}-ipc{IPC}-seed{seed}", with_test=True))
        return distilled.load(out)


def fit(net: nn.Module, batches: Iterable[Callable[[nn.Module], Tensor]], total: int, lr: float = 2e-3) -> nn.Module:
    """AdamW under a cosine over `total` steps; each batch is a function from the net to its loss."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    net.train()
    for loss in batches:
        optimizer.zero_grad()
        loss(net).backward()
        optimizer.step()
        schedule.step()
    return net


def hard(images_u8: Tensor, labels: Tensor, total: int, seed: int, batch: int = 64) -> Iterable[Any]:
    """`total` batches of real labels, normalised, in a new order each epoch; no augmentation."""
    x_norm, done, epoch = normalised(images_u8), 0, 0
    while done < total:
        order = torch.randperm(len(labels), generator=generator(seed, "use case", epoch))
        for part in order.split(batch):
            if done < total:
                yield lambda net, part=part: F.cross_entropy(net(x_norm[part]), labels[part])
                done += 1
        epoch += 1


def normalised(images_u8: Tensor) -> Tensor:
    """uint8 -> what digits' networks see."""
    return augment.normalise(images_u8, DATASETS["digits"].mean, DATASETS["digits"].std)


def fresh(name: str, options: dict[str, Any], seed: int, size: int = 16) -> nn.Module:
    """A net whose weights depend on its name, options and the seed."""
    with seeded(seed, name, json.dumps(options, sort_keys=True)):
        return nets.build(name, 10, size, **options)


def score(net: nn.Module, images_u8: Tensor, labels: Tensor) -> float:
    """Accuracy, a fraction."""
    return accuracy(net, images_u8, labels, normalised, CPU)[0]


def on_set(name: str, options: dict[str, Any], found: distilled.DistilledSet, seed: int) -> nn.Module:
    """A net trained on the recorded views and soft labels of a set, as long as its own student was."""
    loader, epochs = found.loader(), found.facts["recipe"]["epochs"]
    steps = (batch for _ in range(epochs) for batch in loader)
    losses = (lambda net, x=x, target=target: found.loss(net(x), target) for x, target in steps)
    return fit(fresh(name, options, seed), losses, epochs * len(loader))


def ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 1, ties shared."""
    return [sum(o < v for o in values) + (sum(o == v for o in values) + 1) / 2 for v in values]


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """Rank correlation; 0 where one side is all the same."""
    a, b = ranks(one), ranks(other)
    return statistics.correlation(a, b) if len(set(a)) > 1 and len(set(b)) > 1 else 0.0


def architectures(place: Place) -> tuple[Metrics, str]:
    """Fast architecture search: does a set put eight nets in the order that training on everything puts them in?"""
    images, val = place.real(), place.real().pixels("val")
    train_u8, train_labels = images.pixels("train")
    total = EPOCHS * -(-len(train_labels) // 64)
    ways: dict[str, Callable[[str, dict[str, Any], int], nn.Module]] = {
        "everything": lambda n, o, s: fit(fresh(n, o, s), hard(train_u8, train_labels, total, s), total),
        **{m: lambda n, o, s, m=m: on_set(n, o, place.set(m, s), s) for m in METHODS},
        "random, hard labels": lambda n, o, s: _hard_set(n, o, place.set("random", s), s),
    }
    reached: dict[str, list[list[float]]] = {}
    seconds = dict.fromkeys(ways, 0.0)
    for way, train in ways.items():
        reached[way] = []
        for name, options in SEARCHED:
            began = time.process_time()
            fitted = [train(name, options, seed) for seed in SEEDS]
            seconds[way] += time.process_time() - began
            reached[way].append([score(net, *val) for net in fitted])
            print(f"{way}: {name} {options} {[round(100 * r, 1) for r in reached[way][-1]]}", flush=True)
    means = {way: [statistics.fmean(own) for own in found] for way, found in reached.items()}
    found = {way: _search(reached["everything"], own) for way, own in reached.items()}
    rows = []
    for way, own in found.items():
        each = "-" if way == "everything" else spread(own["spearman_each"], 2)
        top = means["everything"][max(range(len(SEARCHED)), key=means[way].__getitem__)]
        together = "1" if way == "everything" else f"{own['spearman']:.2f}"
        rows.append([way, together, each, f"{100 * top:.1f}", f"{seconds[way] / seconds['everything']:.2f}"])
    head_ = (
        "trained on",
        "Spearman, means",
        "Spearman, single seeds",
        "chosen net on everything",
        "CPU seconds, share",
    )
    table = [
        [_named(*net), *(spread([100 * r for r in reached[w][i]]) for w in ways)] for i, net in enumerate(SEARCHED)
    ]
    said = markdown(head_, rows) + "\n\n" + markdown(("net", *ways), table)
    return {"accuracy": reached, "search": found, "seconds": seconds, "nets": [_named(*n) for n in SEARCHED]}, said


def _hard_set(name: str, options: dict[str, Any], found: distilled.DistilledSet, seed: int) -> nn.Module:
    total = found.facts["recipe"]["epochs"] * len(found.facts["steps"])
    return fit(fresh(name, options, seed), hard(found.images_u8, found.labels, total, seed), total)


def _search(truth: list[list[float]], own: list[list[float]]) -> Metrics:
    """How well one way orders the nets: means against means, and each seed alone against the truth's means."""
    means = [statistics.fmean(each) for each in truth]
    alone = [spearman(means, [each[seed] for each in own]) for seed in range(len(SEEDS))]
    return {"spearman": spearman(means, [statistics.fmean(each) for each in own]), "spearman_each": alone}


def _named(name: str, options: dict[str, Any]) -> str:
    return f"{name}, width {options['width']}"


def continual(place: Place) -> tuple[Metrics, str]:
    """Continual learning: classes come two at a time, and of the past only a buffer of five images per class is left.

    As in GDumb, a net is trained from scratch on the buffer after each step and tested on all classes so far. Whoever
    fills the buffer sees the classes of the step alone, and has a teacher of those alone.
    """
    images = place.real()
    train, val = images.pixels("train"), images.pixels("val")
    reached: dict[str, list[list[float]]] = {way: [] for way in ("random", "herding", "median", "rded", "sre2lpp")}
    for seed in SEEDS:
        order = torch.randperm(10, generator=generator(seed, "class order")).tolist()
        kept: dict[str, list[tuple[Tensor, Tensor]]] = {way: [] for way in reached}
        for way in reached:
            reached[way].append([])
        for step in range(STEPS):
            classes = sorted(order[2 * step : 2 * step + 2])
            part = [_only(split, classes) for split in (train, val)]
            stage = Real.of(*part[0], val=part[1], mean=images.mean, std=images.std)
            config = TeacherConfig(net="convnet2", net_options={"width": 32}, epochs=8, batch=64, lr=0.1, flip=0.0)
            net, card = teacher.make(config, stage, CPU, Track.quiet())
            taught = teacher.Frozen(net, card, CPU)
            seen = torch.isin(val[1], torch.tensor(order[: 2 * step + 2]))
            for way, buffer in kept.items():
                chosen, local = _fill(way, stage, taught, seed + 100 * step)
                buffer.append((chosen, torch.tensor(classes)[local]))
                pixels, labels = (torch.cat(each) for each in zip(*buffer, strict=True))
                learner = fresh("convnet2", {"width": 32}, derived_seed(seed, step) % 2**31)
                fit(learner, hard(pixels, labels, REPLAY, seed, 32), REPLAY)
                reached[way][-1].append(score(learner, val[0][seen], val[1][seen]))
        print(
            f"seed {seed}: " + ", ".join(f"{way} {100 * own[-1][-1]:.1f}" for way, own in reached.items()), flush=True
        )
    rows = [
        [way, *(spread([100 * own[step] for own in found]) for step in range(STEPS))] for way, found in reached.items()
    ]
    return {"accuracy": reached}, markdown(("buffer", *(f"after {2 * s + 2} classes" for s in range(STEPS))), rows)


def _only(split: tuple[Tensor, Tensor], classes: list[int]) -> tuple[Tensor, Tensor]:
    """The images of some classes, which are numbered anew."""
    mine = torch.isin(split[1], torch.tensor(classes))
    return split[0][mine], torch.bucketize(split[1][mine], torch.tensor(classes))


def _fill(way: str, stage: Real, taught: teacher.Frozen, seed: int) -> tuple[Tensor, Tensor]:
    if way == "herding":
        return herd(stage, taught)
    options = methods.config_of(way, {"iterations": 200} if way == "sre2lpp" else {}, "digits", BUFFER)
    method = methods.find(way)
    groups = method.groups(options, ipc=BUFFER, classes=2)
    found = method.synthesize(options, stage, taught, ipc=BUFFER, seed=seed, part=groups, track=Track.quiet())
    return found.images_u8, found.labels


def herd(stage: Real, taught: teacher.Frozen) -> tuple[Tensor, Tensor]:
    """iCaRL's choice: one after the other the image that brings the mean of the chosen features to the class's."""
    images_u8, labels = stage.pixels("train")
    chosen: list[int] = []
    with torch.no_grad():
        features = F.normalize(head.features(taught.net, normalised(images_u8)), dim=1)
    for cls in (0, 1):
        places = (labels == cls).nonzero().flatten()
        own, total, left = features[places], torch.zeros(features.shape[1]), torch.ones(len(places), dtype=torch.bool)
        for count in range(1, BUFFER + 1):
            distance = ((own + total) / count - own.mean(0)).norm(dim=1).where(left, torch.tensor(torch.inf))
            best = int(distance.argmin())
            left[best], total = False, total + own[best]
            chosen.append(int(places[best]))
    return images_u8[chosen], labels[chosen]


def sharing(place: Place) -> tuple[Metrics, str]:
    """Data-free sharing: what leaves the house, how it trains there without Distillery, how near the data it is."""
    train_u8, _ = place.real().pixels("train")
    flat = train_u8.flatten(1).float() / 255
    usual = _nearest(flat, flat, skip_self=True)
    script = Path(__file__).resolve().parent.parent / "docs" / "train_on_it.py"
    found: Metrics = {"everything": {"bytes": train_u8.numel(), "images": len(train_u8)}, "sets": {}}
    rows = []
    for method in METHODS:
        own: dict[str, list[float]] = {
            name: [] for name in ("script", "report", "copies", "distance", "bytes", "views")
        }
        for seed in SEEDS:
            shared = place.set(method, seed)
            asked = [sys.executable, "-I", str(script), str(shared.folder), str(shared.folder / "test.npz")]
            said = subprocess.run(asked, capture_output=True, text=True, check=True, cwd=place.work).stdout
            away = _nearest(shared.images_u8.flatten(1).float() / 255, flat)
            manifest = artifact.read(shared.folder)
            sizes = {name: facts["bytes"] for name, facts in manifest.files.items() if name != "test.npz"}
            own["script"].append(float(said.split()[1]))
            own["report"].append(100 * shared.facts["student"]["acc_last"])
            own["copies"].append(100 * float((away == 0).float().mean()))
            own["distance"].append(float(away.mean() / usual.mean()))
            own["bytes"].append(sum(sizes[name] for name in ("images.npy", "labels.npy", "soft.npy")))
            own["views"].append(sum(size for name, size in sizes.items() if name.startswith("views/")))
        print(f"{method}: {own}", flush=True)
        found["sets"][method] = own
        kib = [f"{statistics.fmean(own[name]) / 1024:.0f}" for name in ("bytes", "views")]
        said = [spread(own["report"]), spread(own["script"]), spread(own["copies"]), spread(own["distance"], 2)]
        rows.append([method, *kib, *said])
    head_ = ("set", "images and labels, KiB", "views, KiB", "reported %", "plain script %", "copies of real images, %")
    table = markdown((*head_, "distance to the nearest real image"), rows)
    real_kib = train_u8.numel() / 1024
    return found, f"{table}\n\nAll {len(train_u8)} real images are {real_kib:.0f} KiB of pixels."


def _nearest(queries: Tensor, base: Tensor, skip_self: bool = False) -> Tensor:
    """Distance of each query to the nearest of the base, which may hold the queries themselves."""
    distances = torch.cdist(queries, base, compute_mode="donot_use_mm_for_euclid_dist")
    return (distances.fill_diagonal_(torch.inf) if skip_self else distances).min(1).values


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Mean and sample deviation."""
    return f"{statistics.fmean(values):.{digits}f} +- {statistics.stdev(values):.{digits}f}"


CASES = {"architectures": architectures, "continual": continual, "sharing": sharing}


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the run where it is missing, measure, and leave a result folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--work", type=Path, required=True, help="where the run and its exported sets are, or go")
    parser.add_argument("--out", type=Path, required=True, help="the result folder to write")
    asked = parser.parse_args(arguments)
    place, began = Place(asked.work), time.monotonic()
    if run.run(TEXT, str(place.run)).failures:
        raise UserError(f"{place.run}: a cell failed; see its report")
    metrics, said = CASES[asked.case](place)
    asked.out.mkdir(parents=True, exist_ok=True)
    (asked.out / "metrics.json").write_text(json.dumps(metrics, indent=1, sort_keys=True) + "\n")
    (asked.out / "experiment.yaml").write_text(TEXT)
    about = environment(CPU) | {"seconds": round(time.monotonic() - began), "command": f"use_cases.py {asked.case}"}
    (asked.out / "environment.json").write_text(json.dumps(about, indent=1, sort_keys=True) + "\n")
    title = " ".join((CASES[asked.case].__doc__ or "").split())
    (asked.out / "report.md").write_text(f"# {asked.case}\n\n{title}\n\n{said}\n")
    print((asked.out / "report.md").read_text())


if __name__ == "__main__":
    main()
