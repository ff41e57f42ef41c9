"""What an experiment will cost on this machine: images through nets, seconds, memory, bytes; printed by `plan`.

Speeds are measured: a few small batches of each net on the chosen device, about a second each. For a machine that is
not this one they are worked out instead, from the operations of each net and the rate that the caller assumes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from distillery import console, experiment, labels, methods, nets, profiles
from distillery import student as student_module
from distillery.config import Cell, Experiment, Student, TeacherConfig
from distillery.data import DATASETS, TENSOR_SIDE, limits
from distillery.device import Compute, choose, hardware

PROBE = 32  # images per measured batch


@dataclass(frozen=True)
class Speed:
    """Images per second of one net: forward only, and forward with backward."""

    forward: float
    training: float


def table(source: str, tflops: float = 0.0) -> str:
    """The cells with seconds, label bytes and image bytes, and the totals.

    Args:
        source: as `experiment.load` takes it.
        tflops: sustained TFLOP/s of some other machine; 0 measures this one.
    """
    wanted = experiment.load(source)
    cells = experiment.cells(wanted)
    info = DATASETS[wanted.dataset.name]
    size, classes = wanted.dataset.size or info.size, experiment.classes_of(wanted.dataset)
    speeds, where = _speeds(wanted, cells, classes, size, tflops)
    images = wanted.dataset.per_class * classes or info.train
    taught = {one.name: _teacher_seconds(one, images, speeds) for one in wanted.every_teacher}
    forward = {one.name: speeds[_kind(one)].forward for one in wanted.every_teacher}
    lines = [
        f"{wanted.name}: {len(cells)} cells on {where}",
        *(f"  {line}" for line in (limits.said(images, info.val, size) if size > TENSOR_SIDE else ())),
        *(f"  teacher {name}: {console.duration(seconds)}" for name, seconds in taught.items()),
        f"  {'cell':34s} {'synthesize':>11s} {'students':>11s} {'memory':>10s} {'images':>10s} {'labels':>10s}",
    ]
    total = sum(taught.values())
    for cell in cells:
        teacher = 1 / sum(1 / forward[name] for name in cell.teachers)
        made, trained = _seconds(cell, classes, size, images, teacher, speeds)
        total += made + trained
        pixels, labels_ = console.size(classes * cell.ipc * 3 * size**2), console.size(_label_bytes(cell, classes))
        memory = console.size(_peak(cell, classes, size, images))
        times = f"{console.duration(made):>11s} {console.duration(trained):>11s}"
        lines.append(f"  {cell.id:34s} {times} {memory:>10s} {pixels:>10s} {labels_:>10s}")
    kept = "" if size > TENSOR_SIDE else f"; training images in memory {console.size(images * 3 * size**2)}"
    lines.append(f"  together about {console.duration(total)}{kept}")
    return "\n".join(lines)


def pods(source: str) -> str:
    """What the pod of each step would ask for on a cluster."""
    wanted = experiment.load(source)
    gathering = bool(experiment.statistics_of(wanted)["kinds"])
    return profiles.table(wanted, experiment.cells(wanted, wish=profiles.Wish()), gathering=gathering)


def _teacher_seconds(one: TeacherConfig, images: int, speeds: dict[str, Speed]) -> float:
    return 0.0 if one.weights else one.epochs * images / speeds[_kind(one)].training


def _seconds(
    cell: Cell, classes: int, size: int, images: int, teacher: float, speeds: dict[str, Speed]
) -> tuple[float, float]:
    """Seconds of synthesis and of the students; `teacher` is how many images a second the cell's teachers label."""
    val = DATASETS[cell.dataset.name].val
    method = methods.find(cell.method)
    options = methods.config_of(cell.method, cell.options, cell.dataset.name, cell.ipc)
    said = method.estimate(options, ipc=cell.ipc, classes=classes, size=size, train=images)
    passes = said["forwards"] + said.get("backwards", 0)  # frozen weights: back costs about what forth does
    trained = 0.0
    for student in cell.students:
        views = student.recipe.epochs * cell.ipc * classes
        exams = student_module.evaluation_epochs(student.recipe.epochs, student.recipe.evaluate_every).values()
        shown = sum(val if full else min(val, student_module.SAMPLE) for full in exams)
        trained += shown / speeds[_kind(student)].forward
        trained += views / speeds[_kind(student)].training
        trained += views / teacher if student.recipe.regime == "soft" else 0.0
    return passes / teacher, trained


def _peak(cell: Cell, classes: int, size: int, images: int) -> int:
    """Bytes of memory synthesis needs beside the training images."""
    options = methods.config_of(cell.method, cell.options, cell.dataset.name, cell.ipc)
    found = methods.find(cell.method).estimate(options, ipc=cell.ipc, classes=classes, size=size, train=images)
    return int(found["peak_bytes"])


def _label_bytes(cell: Cell, classes: int) -> int:
    if cell.labels.mode != "stored":
        return 0
    soft = [s.recipe.epochs for s in cell.students if s.recipe.regime == "soft"]
    return sum(labels.stored_bytes(classes * cell.ipc, epochs, classes, cell.labels.top_k) for epochs in soft)


def _speeds(
    wanted: Experiment, cells: list[Cell], classes: int, size: int, tflops: float
) -> tuple[dict[str, Speed], str]:
    """The speed of each net, and on what."""
    nets_: dict[str, TeacherConfig | Student] = {_kind(one): one for one in wanted.every_teacher}
    for cell in cells:
        nets_ |= {_kind(student): student for student in cell.students}
    if tflops:
        assumed = {k: _assumed(one.net, one.net_options, classes, size, tflops) for k, one in nets_.items()}
        return assumed, f"a machine that sustains {tflops:g} TFLOP/s (assumed)"
    compute = choose(wanted.device, wanted.precision)
    measured = {k: _speed(one.net, one.net_options, classes, size, compute) for k, one in nets_.items()}
    return measured, hardware(compute)


def _kind(one: TeacherConfig | Student) -> str:
    """One net with its options, as a key."""
    return json.dumps([one.net, dict(one.net_options)], sort_keys=True)


def _assumed(name: str, options: Mapping[str, object], classes: int, size: int, tflops: float) -> Speed:
    with torch.device("meta"), torch.no_grad():
        net, one = nets.build(name, classes, size, **options).eval(), torch.zeros(1, 3, size, size)
        with FlopCounterMode(display=False) as counter:
            net(one)
    forward = tflops * 1e12 / counter.get_total_flops()
    return Speed(forward, forward / 3)  # back costs about twice what forth does


def _speed(name: str, options: Mapping[str, object], classes: int, size: int, compute: Compute) -> Speed:
    net = compute.place(nets.build(name, classes, size, **options))
    x_norm = compute.images(torch.zeros(PROBE, 3, size, size))
    wanted = torch.zeros(PROBE, dtype=torch.int64, device=compute.device)

    def forward() -> None:
        with torch.no_grad(), compute.autocast():
            net.eval()(x_norm)

    def training() -> None:
        with compute.autocast():
            logits = net.train()(x_norm)
        functional.cross_entropy(logits.float(), wanted).backward()

    return Speed(_rate(forward, compute), _rate(training, compute))


def _rate(work: object, compute: Compute, seconds: float = 0.4) -> float:
    """Images per second of a batch of PROBE, after one warm-up."""
    assert callable(work)
    work()
    began, rounds = time.perf_counter(), 0
    while rounds == 0 or time.perf_counter() - began < seconds:
        work()
        rounds += 1
        if compute.device.type == "cuda":
            torch.cuda.synchronize(compute.device)
    return rounds * PROBE / (time.perf_counter() - began)
