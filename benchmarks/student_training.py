"""Student training: ours against the textbook loop, same mathematics, same run.

    python benchmarks/student_training.py --root data/cifar10 --out docs/results/2026-11-21_student_training_cpu

Both train the same net on the same real images with RDED's recipe and measure it on the same validation images, after
the same epochs. The textbook loop is written as the official code is: PIL images, per-image torchvision transforms, a
DataLoader, fp32, `.item()` at every step, an extra train-mode forward for a logged accuracy, and validation through the
same kind of pipeline. The extra forward moves the BatchNorm statistics twice with momentum 0.1; ours moves them once
with 0.19.

Random draws come from different streams, so accuracies agree up to the spread over seeds, which is printed beside them.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from distillery import labels, nets, recipes, student, teacher
from distillery.config import DatasetConfig, Recipe, TeacherConfig
from distillery.data import prepare, real
from distillery.data.augment import centre_crop
from distillery.data.synthetic import Synthetic
from distillery.device import Compute, choose, hardware
from distillery.rng import generator
from distillery.track import Track


@dataclass(frozen=True)
class Run:
    """One training: seconds in the loop, seconds in validation, accuracy of the last epoch."""

    training: float
    validation: float
    accuracy: float


@dataclass(frozen=True)
class Task:
    """What both loops are given."""

    net: str
    recipe: Recipe
    synthetic: Synthetic
    teacher: teacher.Frozen
    val_u8: Tensor
    val_labels: Tensor
    compute: Compute
    workers: int


class Pictures(Dataset[tuple[Tensor, int]]):
    """Decoded PIL images and a per-image transform."""

    def __init__(self, images_u8: Tensor, targets: Tensor, transform: transforms.Compose) -> None:
        self.pictures = [Image.fromarray(i.permute(1, 2, 0).numpy()) for i in images_u8]
        self.targets, self.transform = targets.tolist(), transform

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.pictures[index]), self.targets[index]


def textbook(task: Task, seed: int) -> Run:
    """The official way, step by step."""
    torch.manual_seed(seed)
    device, recipe, warm = task.compute.device, task.recipe, task.recipe.temperature
    net = nets.build(task.net, len(task.teacher.card.classes), task.teacher.size).to(device)
    decayed = [p for n, p in net.named_parameters() if "weight" in n and p.ndim > 1]
    free = [p for n, p in net.named_parameters() if not ("weight" in n and p.ndim > 1)]
    groups = [{"params": decayed}, {"params": free, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr, weight_decay=recipe.weight_decay, betas=recipe.betas)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda e: 0.5 * (1 + math.cos(math.pi * e / recipe.epochs / recipe.zeta))
    )
    train, val = loaders(task)
    due, training, validation, accuracy = student.evaluation_epochs(recipe.epochs, recipe.evaluate_every), 0.0, 0.0, 0.0
    logged = {"loss": 0.0, "right": 0.0}
    for epoch in range(recipe.epochs):
        began = time.perf_counter()
        net.train()
        for images, targets in train:
            images, targets = cutmix(images.to(device)), targets.to(device)
            with torch.no_grad():
                soft = F.softmax(task.teacher.net(images) / warm, dim=1)
                logged["right"] += (net(images).argmax(1) == targets).sum().item()
            loss = F.kl_div(F.log_softmax(net(images) / warm, dim=1), soft, reduction="batchmean")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            logged["loss"] += loss.item()
        schedule.step()
        training += time.perf_counter() - began
        if epoch + 1 in due:
            began = time.perf_counter()
            accuracy = validate(net, val, device)
            validation += time.perf_counter() - began
    return Run(training, validation, accuracy)


def loaders(task: Task) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Training and validation loaders with per-image transforms."""
    views, size = task.recipe.views, task.teacher.size
    norm = transforms.Normalize(task.teacher.mean, task.teacher.std)
    scale = views.crop_scale if views.crop == "rrc" else (1.0, 1.0)  # the official code always crops
    steps = [transforms.ToTensor(), transforms.RandomResizedCrop(size, scale, antialias=True)]
    augment = transforms.Compose([*steps, transforms.RandomHorizontalFlip(views.flip), norm])
    look = transforms.Compose([transforms.CenterCrop(size), transforms.ToTensor(), norm])
    kept: dict[str, Any] = {"num_workers": task.workers, "persistent_workers": task.workers > 0}
    kept["pin_memory"] = task.compute.device.type == "cuda"
    synthetic = Pictures(task.synthetic.images_u8, task.synthetic.labels, augment)
    batch = min(task.recipe.batch, len(synthetic))
    train = DataLoader(synthetic, batch_size=batch, shuffle=True, **kept)
    return train, DataLoader(Pictures(task.val_u8, task.val_labels, look), batch_size=500, **kept)


def cutmix(images: Tensor) -> Tensor:
    """One box of a random partner pasted into every image of the batch."""
    side, lam = images.shape[2], float(torch.rand(()))  # Beta(1, 1)
    half = int(side * math.sqrt(1 - lam)) // 2
    y, x = (int(v) for v in torch.randint(0, side, (2,)))
    box = (slice(max(y - half, 0), min(y + half, side)), slice(max(x - half, 0), min(x + half, side)))
    images[:, :, box[0], box[1]] = images[torch.randperm(len(images))][:, :, box[0], box[1]]
    return images


@torch.no_grad()
def validate(net: nn.Module, loader: DataLoader[Any], device: torch.device) -> float:
    """Top-1 accuracy."""
    net.eval()
    right = sum((net(x.to(device)).argmax(1) == y.to(device)).sum().item() for x, y in loader)
    return right / len(loader.dataset)


def ours(task: Task, seed: int) -> Run:
    """The library's loop, with its validation timed apart."""
    spent, measure, sample = [0.0], student.predictions, student.SAMPLE

    def timed(*given: Any, **named: Any) -> Any:
        began = time.perf_counter()
        found = measure(*given, **named)
        spent[0] += time.perf_counter() - began
        return found

    student.predictions, student.SAMPLE = timed, len(task.val_labels)  # early points on all images, as the other loop
    began = time.perf_counter()
    found = student.train(
        task.net,
        {},
        task.recipe,
        task.synthetic,
        labels.on_the_fly(task.teacher, task.recipe.teacher_mode),
        task.teacher,
        (task.val_u8, task.val_labels),
        seed=seed,
        compute=task.compute,
        track=Track.quiet(),
    )
    student.predictions, student.SAMPLE = measure, sample
    return Run(time.perf_counter() - began - spent[0], spent[0], found.acc_last)


def prepared(asked: argparse.Namespace, folder: Path, compute: Compute) -> Task:
    """Data, teacher and the random real images that both loops train on."""
    track = Track(lambda event: print(event, flush=True))
    prepare.prepare(DatasetConfig(name=asked.dataset, root=str(asked.root)), folder, track)
    images = real.load(folder)
    if asked.teacher:
        eye = teacher.load(asked.teacher, compute)
    else:
        eye = teacher.Frozen(*teacher.make(TeacherConfig(epochs=asked.teacher_epochs), images, compute, track), compute)
    pixels_u8, targets = images.pixels("train")
    rows = torch.cat(
        [
            (targets == c).nonzero().flatten()[torch.randperm(n, generator=generator(0, "pick", c))[: asked.ipc]]
            for c, n in enumerate(images.counts("train"))
        ]
    )
    chosen = Synthetic(centre_crop(pixels_u8[rows], images.size).contiguous(), targets[rows])
    changes = {"epochs": asked.epochs, "evaluate_every": asked.evaluate_every}
    recipe = recipes.resolve(
        "rded", changes, asked.dataset, len(images.classes), asked.ipc, min(images.size, 64), asked.net
    )
    val_u8, val_labels = (t[:: asked.val_every].contiguous() for t in images.pixels("val"))
    return Task(asked.net, recipe, chosen, eye, val_u8, val_labels, compute, asked.workers)


def summary(runs: dict[str, list[Run]], views: int) -> dict[str, Any]:
    """Medians, ratios, and both accuracies with their spread."""
    median = {
        name: {part: statistics.median(getattr(r, part) for r in found) for part in ("training", "validation")}
        for name, found in runs.items()
    }
    accuracy = {name: [r.accuracy for r in found] for name, found in runs.items()}
    mean = {name: statistics.mean(values) for name, values in accuracy.items()}
    whole = {name: sum(parts.values()) for name, parts in median.items()}
    return {
        "seconds": median,
        "views_per_second": {name: views / parts["training"] for name, parts in median.items()},
        "ratio_training": median["textbook"]["training"] / median["ours"]["training"],
        "ratio_validation": median["textbook"]["validation"] / median["ours"]["validation"],
        "ratio_total": whole["textbook"] / whole["ours"],
        "accuracy": {name: {"mean": mean[name], "std": statistics.pstdev(accuracy[name])} for name in runs},
        "accuracy_difference": mean["ours"] - mean["textbook"],
    }


def table(found: dict[str, Any]) -> str:
    """The numbers as Markdown."""
    lines = ["| loop | training s | validation s | views/s | accuracy % |", "|---|---|---|---|---|"]
    for name in ("textbook", "ours"):
        seconds, acc = found["seconds"][name], found["accuracy"][name]
        said = f"{100 * acc['mean']:.2f} +- {100 * acc['std']:.2f}"
        rate = found["views_per_second"][name]
        lines.append(f"| {name} | {seconds['training']:.1f} | {seconds['validation']:.1f} | {rate:.0f} | {said} |")
    ratios = ", ".join(f"{part} {found[f'ratio_{part}']:.2f}" for part in ("training", "validation", "total"))
    lines += [
        "",
        f"Textbook / ours: {ratios}. Accuracy, ours - textbook: {100 * found['accuracy_difference']:+.2f} points.",
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Run both loops, seed by seed in turn, and write the result folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="the data set in torchvision's layout")
    parser.add_argument("--out", type=Path, required=True, help="result folder to write")
    parser.add_argument("--dataset", default="cifar10")
    parser.add_argument("--teacher", type=Path, help="a finished teacher artifact; default: train a ConvNet-3 here")
    parser.add_argument("--teacher-epochs", type=int, default=2)
    parser.add_argument("--net", default="convnet3")
    parser.add_argument("--ipc", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=300)
    parser.add_argument("--evaluate-every", type=int, default=50)
    parser.add_argument("--val-every", type=int, default=1, help="use every n-th validation image")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=0, help="of the textbook DataLoader (kept between epochs)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto", help="of ours; the textbook loop is fp32")
    asked = parser.parse_args(arguments)
    compute = choose(asked.device, asked.precision)
    runs: dict[str, list[Run]] = {"textbook": [], "ours": []}
    with tempfile.TemporaryDirectory() as folder:
        task = prepared(asked, Path(folder), compute)
        for seed in range(asked.seeds):
            for name, loop in (("textbook", textbook), ("ours", ours)):
                runs[name].append(loop(task, seed))
                print(f"seed {seed} {name}: {runs[name][-1]}", flush=True)
    found = summary(runs, task.recipe.epochs * len(task.synthetic.labels))
    print(table(found))
    asked.out.mkdir(parents=True, exist_ok=True)
    versions = {"torch": torch.__version__, "torchvision": torchvision.__version__}
    config = {
        k: str(v) if isinstance(v, Path) else v for k, v in vars(asked).items() if k not in ("root", "out", "teacher")
    }
    config |= {"teacher_net": task.teacher.card.net, "teacher_accuracy": task.teacher.card.accuracy}
    facts = {"config": config, "recipe": task.recipe.model_dump(mode="json"), "versions": versions}
    facts |= {"hardware": hardware(compute), **found, "runs": {n: [asdict(r) for r in rs] for n, rs in runs.items()}}
    (asked.out / "result.json").write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n")
    head = f"# Student training: ours and the textbook loop\n\n{hardware(compute)}, torch {torch.__version__}, "
    head += (
        f"{asked.net}, {asked.dataset} IPC {asked.ipc}, {asked.epochs} epochs, {asked.seeds} seeds, median seconds.\n\n"
    )
    (asked.out / "README.md").write_text(head + table(found) + "\n")


if __name__ == "__main__":
    main()
