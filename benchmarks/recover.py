"""The recover loop: ours against the official way (`_plain_recover`), same mathematics, same starts, same views.

    python benchmarks/recover.py --out RESULT --threads 2
    python benchmarks/recover.py --out RESULT --nets resnet20 --weights resnet20.safetensors --classes 10
    python benchmarks/recover.py --out RESULT --device cuda --precision bf16 --nets resnet18_modified --steps 400 \\
        --cases sre2l:10x100 sre2l:50x10 dwa:1x100 delt:5x100 --ipc 50 --profile

A case is method:GxN, G groups of N images. sre2l and dwa: one image of each class in a group. delt: all `--ipc` images
of N / ipc classes in a group. Every way runs whole loops (lr from full to zero, every crop of the curriculum, every
round of DELT) of `--steps` iterations, in turn, `--repeats` times; DWA's K is scaled with them. What takes one group
at a time is timed on one: the reference, with all threads, and ours where a group fills the machine. On a CPU ours
works on small groups side by side, a thread each, and is timed on all of them; what sharing calls would be worth there,
which would change last bits, shows the line "packed as on a GPU". A rate is steps of a group per second; TFLOP/s count
a forward and a backward to the images, 4 * MAC, for every image that is optimised.

Then both run `--compared` iterations in fp32 (on CUDA without TF32), and their images are compared. Adam's first steps
have the length lr whatever the gradient's: where it is about zero, its sign, and so the pixel, depends on rounding, and
what follows on that pixel. How much that is worth, the reference says against itself in channels-last layout, printed
beside. That the mathematics are the same, a small case says in float64, once for each net and method.

Ours in bf16 is other arithmetic; it stands in lines of its own. Without --weights nets are random, with BatchNorm
statistics of smooth noise. RESULT gets config.json, metrics.json, log.txt and, with --profile, tables of kernels.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import functools
import hashlib
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.profiler import ProfilerActivity

from benchmarks import _plain_recover as plain
from distillery import nets
from distillery.code_version import code_version
from distillery.data import DATASETS
from distillery.data.real import Real
from distillery.device import Compute, choose, hardware
from distillery.errors import UserError
from distillery.methods import Group, _packs, _recover
from distillery.methods._views import ViewLaw, curriculum
from distillery.nets import pretrained
from distillery.rng import generator, seeded
from distillery.teacher import Card, Frozen
from distillery.track import Track

MEAN, STD = list(DATASETS["cifar10"].mean), list(DATASETS["cifar10"].std)
LR, R_BN, FIRST_BN = 0.25, 0.01, 10.0  # SRe2L's and DELT's settings for CIFAR
R_VAR, RHO, ASCENT, ASCENT_OF = 11.0, 0.015, 12, 1000  # DWA's: K steps of ascent for M iterations
ROUNDS = 8  # DELT's: 4000 iterations, 500 a round
CASES = ("sre2l:1x100", "sre2l:10x10", "dwa:1x100", "dwa:1x10", "delt:1x100", "delt:5x20")
SEED = 0
PROFILED = 10  # iterations under the profiler


@dataclass(frozen=True)
class Case:
    """G groups of N images of a method, and how many images a class has (DELT)."""

    method: str
    groups: int
    images: int
    ipc: int

    @staticmethod
    def parse(text: str, ipc: int) -> Case:
        """`method:GxN`.

        Raises:
            UserError: not of that form.
        """
        method, _, shape = text.partition(":")
        groups, _, images = shape.partition("x")
        if method not in ("sre2l", "dwa", "delt") or not (groups.isdigit() and images.isdigit()):
            raise UserError(f"case {text!r}: write sre2l, dwa or delt, then :GxN, as in sre2l:10x10")
        if method == "delt" and int(images) % ipc:
            raise UserError(f"case {text!r}: groups of {images} images hold no whole classes of --ipc {ipc} images")
        return Case(method, int(groups), int(images), ipc if method == "delt" else 1)

    @property
    def classes(self) -> int:
        """The fewest classes that have such groups."""
        return self.groups * (self.images // self.ipc) if self.method == "delt" else self.images

    def parts(self, classes: int) -> list[Group]:
        """The groups; more images than classes make a group of several images of each class.

        Raises:
            UserError: the classes do not have such groups.
        """
        if self.method == "delt":
            found = _recover.class_major(classes, self.ipc, self.images)[: self.groups]
        else:
            each = -(-self.images // classes)
            own = tuple(range(self.images // each))
            found = [Group(own, range(g * each, (g + 1) * each)) for g in range(self.groups)]
        if len(found) < self.groups or any(len(group.images) != self.images for group in found):
            raise UserError(
                f"{classes} classes do not give {self.groups} groups of {self.images} images; leave --classes out, or "
                "choose another case"
            )
        return found


@dataclass(frozen=True)
class Setting:
    """One case with one net, in both forms.

    Attributes:
        case: what is made.
        groups: its groups.
        teacher: the net for ours.
        net: the same net for the reference, NCHW.
        real: stands for a data set of that size and so many classes.
        macs: multiplications and additions of one image's forward.
    """

    case: Case
    groups: list[Group]
    teacher: Frozen
    net: nn.Module
    real: Real
    macs: int

    def recovery(self, iterations: int, ascent: int) -> _recover.Recovery:
        """What ours is asked to do, with K = `ascent` for DWA."""
        delt, size = self.case.method == "delt", self.teacher.size
        law = ViewLaw(
            "rrc",
            curriculum(iterations, "cosine" if delt else "constant"),
            flip=0.5,
            jitter=0 if delt else 4 if size < 128 else 32,
        )
        sizes = [self.case.ipc // ROUNDS + (r < self.case.ipc % ROUNDS) for r in range(ROUNDS)]
        starts = tuple(r * (iterations // ROUNDS) for r, count in enumerate(sizes) for _ in range(count))
        return _recover.Recovery(
            name=self.case.method,
            iterations=iterations,
            lr=LR,
            law=law,
            init=_recover.noise("sre2l", SEED, size) if self.case.method == "sre2l" else self.pictures,
            r_bn=R_BN,
            r_var=R_VAR if self.case.method == "dwa" else 1.0,
            first_bn=FIRST_BN,
            starts=starts if delt else (),
            ascent=(RHO, ascent) if self.case.method == "dwa" else None,
        )

    def plan(self, iterations: int, ascent: int, frozen: bool = False) -> plain.Plan:
        """What the reference is asked to do."""
        found = plain.Plan(iterations, lr=LR, r_bn=R_BN, first_bn=FIRST_BN, ipc=self.case.ipc)
        if self.case.method == "dwa":
            return dataclasses.replace(found, lambda_var=R_VAR, ascent=ascent, rho=RHO, frozen=frozen)
        if self.case.method == "delt":
            return dataclasses.replace(found, rounds=ROUNDS)
        return dataclasses.replace(found, priors=True)

    def pictures(self, group: Group) -> Tensor:
        """Smooth noise [c, s, 3, S, S] in the place of real images, normalised."""
        found = smooth(len(group.images), self.teacher.size, "init", group.name)
        return found.view(len(group.classes), len(group.slots), *found.shape[1:])

    def doubled(self) -> Setting:
        """The same in float64, where rounding does not hide whether the mathematics are."""
        teacher = Frozen(copy.deepcopy(self.teacher.net).double(), self.teacher.card, self.teacher.compute)
        return dataclasses.replace(self, teacher=teacher, net=copy.deepcopy(self.net).double())

    def image_steps(self, iterations: int) -> int:
        """How many images are optimised in all iterations of a group together."""
        plan, count = self.plan(iterations, 1), self.case.images
        return sum(len(plain.active(plan, count, step) or range(count)) for step in range(iterations))


def setting(
    case: Case, name: str, compute: Compute, size: int = 32, weights: str = "", classes: int = 0, **options: Any
) -> Setting:
    """Build a net twice from the same weights.

    Args:
        case: what will be made.
        name: the net's; `options` are its options.
        compute: device and precision of ours; the reference is fp32 on the same device.
        size: side of the images.
        weights: safetensors file; "" for random weights.
        classes: the net's outputs; 0: as many as the case needs, 10 at least.

    Raises:
        UserError: the net has too few outputs for the case, or the weights do not fit.
    """
    classes = classes or max(10, case.classes)
    with seeded(SEED, "recover", name):
        net = nets.build(name, classes, size, **options)
        if not weights:
            plausible(net, size)
    if weights:
        pretrained.load(net, weights, name)
    net.eval().requires_grad_(False)
    card = Card(name, options, [str(c) for c in range(classes)], size, MEAN, STD, 0.0, 0.0, [], [])
    images = torch.zeros(classes, 3, size, size, dtype=torch.uint8)
    real = Real.of(images, torch.arange(classes), val=(images, torch.arange(classes)))
    ours = Frozen(copy.deepcopy(net), card, compute)
    return Setting(case, case.parts(classes), ours, net.to(compute.device), real, multiplications(net, size, compute))


@torch.no_grad()
def plausible(net: nn.Module, size: int) -> None:
    """Give a fresh net varied BatchNorm weights, and the statistics that smooth noise has in it."""
    layers = [layer for layer in net.modules() if isinstance(layer, nn.BatchNorm2d)]
    for layer in layers:
        layer.weight.uniform_(0.5, 1.5)
        layer.bias.normal_(0.0, 0.2)
        layer.momentum = None  # an average over all that it sees
    net.train()
    for images in smooth(256, size, "statistics").split(64):
        net(images)
    for layer in layers:
        layer.momentum = 0.1


def smooth(count: int, size: int, *address: str) -> Tensor:
    """Smooth colour noise [count, 3, size, size], normalised; the same for the same address."""
    coarse = torch.rand(count, 3, 5, 5, generator=generator(SEED, "smooth", *address))
    x01 = functional.interpolate(coarse, size=(size, size), mode="bilinear")
    return (x01 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


@torch.no_grad()
def multiplications(net: nn.Module, size: int, compute: Compute) -> int:
    """Multiply-accumulates of the convolutions and linear layers for one image."""
    found: list[int] = []

    def count(layer: nn.Module, _: Any, output: Tensor) -> None:
        found.append(output.numel() * layer.weight[0].numel())  # type: ignore[operator, index, union-attr]

    layers = [layer for layer in net.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    handles = [layer.register_forward_hook(count) for layer in layers]
    net(torch.zeros(1, 3, size, size, device=compute.device))
    for handle in handles:
        handle.remove()
    return sum(found)


def ours(asked: Setting, groups: Sequence[Group], iterations: int, ascent: int) -> Tensor:
    """The library's loop: finished images."""
    recovery = asked.recovery(iterations, ascent)
    return _recover.recover(recovery, asked.real, asked.teacher, groups, SEED, Track.quiet())


@dataclass(frozen=True)
class Start:
    """What the reference is given of a group: images [N, 3, S, S], labels [N], and the views of all iterations."""

    images: Tensor
    labels: Tensor
    views: list[plain.View]


def starts(run: _recover._Pack) -> list[Start]:
    """The first images and the views that a pack of ours was made with, group by group."""
    found = []
    for group, images, drawn in zip(run.groups, run.first, run.views, strict=True):
        columns = (drawn.boxes.tolist(), drawn.flip.tolist(), drawn.roll.tolist())
        views = [plain.View(tuple(box), flip, tuple(roll)) for box, flip, roll in zip(*columns, strict=True)]
        labels = torch.tensor([cls for cls, _ in group.images], device=images.device)
        found.append(Start(images.flatten(0, 1).contiguous(), labels, views))
    return found


def start(asked: Setting, group: Group, iterations: int) -> Start:
    """What the reference is given of one group."""
    return starts(_recover._Pack(asked.recovery(iterations, 1), asked.teacher, [group], SEED))[0]


def reference(asked: Setting, given: Start, plan: plain.Plan) -> Tensor:
    """The official way: normalised images of one group."""
    return plain.recover(asked.net, given.images, given.labels, given.views, plan, MEAN, STD)


def compare(asked: Setting, iterations: int, ascent: int = ASCENT) -> tuple[dict[str, float], dict[str, float]]:
    """Both loops from the same starts through the same views: how far their images are apart.

    Ours runs all groups, packed; the reference the first and the last of them.

    Returns:
        Ours against the reference, and the reference in channels-last layout against itself.
    """
    recovery, plan = asked.recovery(iterations, ascent), asked.plan(iterations, ascent)
    packs = [asked.groups] if recovery.ascent is None else [[group] for group in asked.groups]
    given: list[Start] = []
    found: list[Tensor] = []
    for groups in packs:
        run = _recover._Pack(recovery, asked.teacher, groups, SEED)
        with run.ready():
            while run.step < iterations:
                run.advance()
        given += starts(run)
        found += list(run.x.flatten(1, 2))
    picked = sorted({0, len(given) - 1})
    theirs = torch.cat([reference(asked, given[g], plan) for g in picked])
    other = dataclasses.replace(asked, net=copy.deepcopy(asked.net).to(memory_format=torch.channels_last))
    again = torch.cat([reference(other, given[g], plan) for g in picked])
    return apart(torch.cat([found[g] for g in picked]), theirs), apart(again, theirs)


def apart(left: Tensor, right: Tensor) -> dict[str, float]:
    """How far two sets of normalised images [B, 3, S, S] are apart."""
    far = (left - right).abs()
    levels = [(x * x.new_tensor(STD).view(3, 1, 1) + x.new_tensor(MEAN).view(3, 1, 1)).mul(255) for x in (left, right)]
    grey = (levels[0].round() - levels[1].round()).abs()
    return {
        "max": float(far.max()),  # in normalised pixels
        "mean": float(far.mean()),
        "share_over_0.001": float((far > 1e-3).double().mean()),
        "grey_levels_max": float(grey.max()),
        "grey_levels_differ": float((grey > 0).double().mean()),
    }


def exact(method: str, ipc: int, steps: int, build: Callable[[Case], Setting]) -> dict[str, float]:
    """How far two small groups of a method are apart in float64."""
    return compare(build(Case.parse(f"{method}:2x{ipc if method == 'delt' else 10}", ipc)).doubled(), steps)[0]


@dataclass(frozen=True)
class Way:
    """One way to run a case, so many groups in a call."""

    work: Callable[[int], object]  # given the iterations
    groups: int


def ways(asked: Setting, others: dict[str, Setting], steps: int) -> dict[str, Way]:
    """All ways to run a case; `others` are the setting in other precisions."""

    def ascent(iterations: int) -> int:
        return max(1, round(ASCENT * iterations / ASCENT_OF))

    def theirs(frozen: bool) -> Callable[[int], object]:
        given = start(asked, asked.groups[0], steps)  # views of the whole schedule; a warm-up sees its first ones
        return lambda m: reference(asked, given, asked.plan(m, ascent(m), frozen))

    def own(one: Setting, packed: bool) -> Way:
        groups = asked.groups if packed or beside else asked.groups[:1]

        def work(iterations: int) -> None:
            with packing(packed):
                ours(one, groups, iterations, ascent(iterations))

        return Way(work, len(groups))

    beside = _packs.is_small(asked.teacher, asked.groups)
    several = asked.case.method != "dwa" and len(asked.groups) > 1  # DWA's groups have weights of their own each
    usual = several and asked.teacher.compute.device.type == "cuda"
    found = {"reference": Way(theirs(False), 1)}
    if asked.case.method == "dwa":
        found["reference, weights frozen"] = Way(theirs(True), 1)
    for name, one in {"ours": asked, **others}.items():
        found[name] = own(one, usual)
    if several:
        found["ours, group by group" if usual else "ours, packed as on a GPU"] = own(asked, not usual)
    return found


@contextlib.contextmanager
def packing(wanted: bool) -> Iterator[None]:
    """Let groups share calls on a CPU too, where the library makes each alone so that its bytes are always the same."""
    before = _packs.CPU_IMAGES
    _packs.CPU_IMAGES = 10**9 if wanted else before
    try:
        yield
    finally:
        _packs.CPU_IMAGES = before


def clocked(way: Way, steps: int, device: torch.device) -> dict[str, float]:
    """One whole run by the clock, the device's queue included; on CUDA with its peak memory."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    way.work(steps)
    if device.type == "cuda":
        torch.cuda.synchronize()
        return {"seconds": time.perf_counter() - began, "peak_bytes": torch.cuda.max_memory_allocated()}
    return {"seconds": time.perf_counter() - began}


def measure(asked: Setting, others: dict[str, Setting], steps: int, repeats: int) -> dict[str, Any]:
    """All ways in turn; medians, rates and ratios."""
    device, found = asked.teacher.compute.device, ways(asked, others, steps)
    for way in found.values():
        way.work(ROUNDS)  # libraries choose their algorithms, allocators grow
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in found}
    for _ in range(repeats):
        for name, way in found.items():
            runs[name].append(clocked(way, steps, device))
    flops = 4 * asked.macs * asked.image_steps(steps)
    table: dict[str, dict[str, float]] = {}
    for name, way in found.items():
        seconds = statistics.median(run["seconds"] for run in runs[name]) / way.groups
        table[name] = {"steps_per_second": steps / seconds, "tflops": flops / seconds / 1e12}
        if device.type == "cuda":
            table[name]["peak_gib"] = max(run["peak_bytes"] for run in runs[name]) / 2**30
    for row in table.values():
        row["times_reference"] = row["steps_per_second"] / table["reference"]["steps_per_second"]
    return {"ways": table, "runs": runs, "groups": {name: way.groups for name, way in found.items()}}


def profiled(asked: Setting, others: dict[str, Setting]) -> dict[str, str]:
    """Where the time of each way goes: torch's profiler over a few iterations."""
    cuda = asked.teacher.compute.device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    found = {}
    for name, way in ways(asked, others, PROFILED).items():
        with torch.profiler.profile(activities=activities) as profiler:
            way.work(PROFILED)
            if cuda:
                torch.cuda.synchronize()
        order = "self_cuda_time_total" if cuda else "self_cpu_time_total"
        found[name] = profiler.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=90)
    return found


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--nets", nargs="+", default=["resnet20", "resnet18_modified", "convnet3"])
    found.add_argument("--cases", nargs="+", default=list(CASES), help="method:GxN (default: %(default)s)")
    found.add_argument("--weights", default="", help="safetensors weights of the one net; without, random ones")
    found.add_argument("--classes", type=int, default=0, help="outputs of the net; 0 = as many as a case needs")
    found.add_argument("--ipc", type=int, default=10, help="images of each class in DELT's groups")
    found.add_argument("--size", type=int, default=32, help="side of the images in pixels")
    found.add_argument("--steps", type=int, default=40, help="iterations of a timed run")
    found.add_argument("--repeats", type=int, default=3)
    found.add_argument("--compared", type=int, default=20, help="iterations before the images are compared; 0 = not")
    found.add_argument("--exact", type=int, default=20, help="iterations of the check in float64; 0 = not")
    found.add_argument("--threads", type=int, default=0, help="torch's threads; 0 = its default")
    found.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    found.add_argument("--precision", nargs="+", choices=("fp32", "bf16"), default=["fp32"], help="of ours")
    found.add_argument("--profile", action="store_true", help="also write where the time goes")
    found.add_argument("--out", type=Path, required=True, help="the result folder to write")
    return found


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and leave a result folder."""
    given = parser().parse_args(arguments)
    if given.weights and len(given.nets) > 1:
        raise UserError(f"--weights {given.weights}: they are for one net, and --nets are {' '.join(given.nets)}")
    for option in ("steps", "compared", "exact"):
        if getattr(given, option) < ROUNDS and (option == "steps" or getattr(given, option)):
            raise UserError(f"--{option} {getattr(given, option)}: at least {ROUNDS}, the rounds of DELT")
    if given.threads:
        torch.set_num_threads(given.threads)
    given.out.mkdir(parents=True, exist_ok=True)
    compute = {name: choose(given.device, name) for name in ("fp32", *given.precision)}
    lines: list[str] = []
    results: list[dict[str, Any]] = []

    def say(text: str) -> None:
        print(text, flush=True)
        lines.append(text)
        (given.out / "log.txt").write_text("\n".join(lines) + "\n")  # at once: a machine may be taken away

    tf32 = f"TF32 convolutions {torch.backends.cudnn.allow_tf32}, products {torch.backends.cuda.matmul.allow_tf32}"
    said = {"hardware": hardware(compute["fp32"]).removesuffix(", fp32"), "platform": platform.platform()}
    said |= {"python": platform.python_version(), "torch": torch.__version__, "code": code_version()}
    said |= {"tf32": tf32} if compute["fp32"].device.type == "cuda" else {}
    say("; ".join(f"{key} {value}" for key, value in said.items()))
    config = {key: value for key, value in vars(given).items() if key not in ("out", "weights")}
    config |= {"weights": "random", **said}
    if given.weights:
        digest = hashlib.sha256(Path(given.weights).read_bytes()).hexdigest()
        config["weights"] = f"{Path(given.weights).name} sha256:{digest}"
    (given.out / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    for name in given.nets:
        build = functools.partial(setting, name=name, size=given.size, weights=given.weights, classes=given.classes)
        cases = {text: Case.parse(text, given.ipc) for text in given.cases}
        for method in dict.fromkeys(case.method for case in cases.values()) if given.exact else ():
            row = exact(method, given.ipc, given.exact, functools.partial(build, compute=compute["fp32"]))
            results.append({"net": name, "exact": method} | row)
            say(f"{name} {method}: after {given.exact} steps in float64, ours against the reference: {listed(row)}")
        for text, case in cases.items():
            asked, *rest = (build(case, compute=each) for each in compute.values())
            others = {f"ours, {one.teacher.compute.precision}, other arithmetic": one for one in rest}
            results.append({"net": name, "case": text} | one_case(asked, others, given, f"{name} {text}", say))
            (given.out / "metrics.json").write_text(json.dumps(results, indent=1) + "\n")


def listed(row: dict[str, float]) -> str:
    """The numbers of a row as text."""
    return ", ".join(f"{key} {value:.3g}" for key, value in row.items())


def one_case(
    asked: Setting, others: dict[str, Setting], given: argparse.Namespace, title: str, say: Callable[[str], None]
) -> dict[str, Any]:
    """Measure and compare one case, and say what was found."""
    found = measure(asked, others, given.steps, given.repeats)
    for name, row in found["ways"].items():
        memory = f", peak {row['peak_gib']:.2f} GiB" if "peak_gib" in row else ""
        say(
            f"{title}: {name}: {row['steps_per_second']:.2f} steps/s of a group, {row['tflops']:.3f} TFLOP/s{memory}, "
            f"{row['times_reference']:.2f}x the reference"
        )
    if given.compared:
        found["images"] = {}
        kept = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        for name, one in {"ours": asked, **others}.items():
            found["images"][name], found["images"]["the reference in channels-last layout"] = compare(
                one, given.compared
            )
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = kept
        for name, row in found["images"].items():
            say(f"{title}: after {given.compared} steps, {name} against the reference: {listed(row)}")
    if given.profile:
        for name, table in profiled(asked, others).items():
            file = "profile_" + "_".join(f"{title} {name}".replace(":", " ").replace(",", "").split()) + ".txt"
            (given.out / file).write_text(table + "\n")
    return found


if __name__ == "__main__":
    main()
