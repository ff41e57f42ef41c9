"""RDED's selection, ours against the textbook way, with the same mathematics on the same images in one run.

    python benchmarks/rded_selection.py --root data/cifar10 --net resnet20 --teacher resnet20.safetensors --out RESULT
    python benchmarks/rded_selection.py --dataset imagenette --root data/imagenette --classes 2 --mipc 60 --out RESULT

The reference does what the official code does: a DataLoader per class; per image PIL, ToTensor and `num_crop` times
RandomResizedCrop and Normalize; the teacher over the whole class, crop by crop, in float32 and torch's default layout.
Both are timed end to end (from real images at rest to the finished uint8 images), in turn, `--repeats` times. Then ours
is given the reference's boxes: scores, chosen patches and images are compared.

RESULT gets config.json, metrics.json and log.txt. Without --teacher the net has random weights.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets, transforms
from torchvision.transforms import functional as pictures

from distillery import nets
from distillery.code_version import code_version
from distillery.config import DatasetConfig
from distillery.data import prepare, real
from distillery.device import Compute, choose, hardware
from distillery.methods import Group, _crops, _patches, _selection, rded
from distillery.nets import pretrained
from distillery.teacher import Card, Frozen
from distillery.track import Track

Boxes = list[tuple[int, int, int, int]]


@dataclass(frozen=True)
class Selected:
    """What one way chose of a class: scores [P, m], boxes [P, m, 4], image and crop of each patch, images_u8."""

    scores: Tensor
    boxes: Tensor
    image: Tensor
    crop: Tensor
    images_u8: Tensor


@dataclass(frozen=True)
class Setting:
    """What both ways are asked to do."""

    real: real.Real
    source: Dataset[Any]  # PIL image, label: torchvision's data set
    net: nn.Module
    teacher: Frozen
    cfg: rded.Config
    ipc: int
    classes: list[int]

    def order(self, cls: int) -> Tensor:
        """The real images of a class that are looked at (the same for both ways)."""
        return _patches.draw(self.cfg, 0, cls, self.real.counts("train")[cls]).order


class MultiCrop(Dataset[tuple[Tensor, Tensor]]):
    """One class, one image at a time: PIL -> tensor -> m random resized crops -> normalised."""

    def __init__(self, asked: Setting, cls: int, side: int) -> None:
        self.images, self.num_crop, self.side = asked.source, asked.cfg.num_crop, side
        own = [i for i, label in enumerate(asked.source.targets) if label == cls]  # type: ignore[attr-defined]
        self.indices = [own[i] for i in asked.order(cls).tolist()]
        self.normalise = transforms.Normalize(asked.real.mean, asked.real.std)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = pictures.to_tensor(self.images[self.indices[index]][0].convert("RGB"))
        boxes: Boxes = []
        crops = []
        for _ in range(self.num_crop):
            boxes.append(transforms.RandomResizedCrop.get_params(image, [0.08, 1.0], [1.0, 1.0]))
            crop = pictures.resized_crop(image, *boxes[-1], [self.side, self.side], antialias=True)
            crops.append(self.normalise(crop))
        return torch.stack(crops), torch.tensor(boxes)


@torch.no_grad()
def reference(asked: Setting, cls: int, workers: int) -> Selected:
    """The textbook way for one class."""
    size, device = asked.real.size, asked.teacher.compute.device
    factor = _patches.tiles_along(asked.cfg, size)
    side = size // factor
    dataset = MultiCrop(asked, cls, side)
    crops, boxes = next(iter(DataLoader(dataset, batch_size=len(dataset), num_workers=workers)))
    labels = torch.full((len(dataset),), cls, device=device)
    losses = []
    for j in range(asked.cfg.num_crop):
        padded = functional.pad(crops[:, j], [(size - side) // 2] * 4)
        losses.append(functional.cross_entropy(asked.net(padded.to(device)), labels, reduction="none").cpu())
    scores = torch.stack(losses, dim=1)
    best, which = scores.min(dim=1)
    image = torch.argsort(best, stable=True)[: asked.ipc * factor**2]
    patches = crops[image, which[image]]
    images = torch.zeros(asked.ipc, 3, size, size)
    for i in range(asked.ipc):
        for tile in range(factor**2):
            top, left = tile // factor * side, tile % factor * side
            images[i, :, top : top + side, left : left + side] = patches[tile * asked.ipc + i]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (asked.real.mean, asked.real.std))
    images_u8 = ((images * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
    return Selected(scores, boxes, image, which[image], images_u8)


def ours(asked: Setting) -> Tensor:
    """The library's way, for all classes."""
    part = [Group((cls,), range(asked.ipc)) for cls in asked.classes]
    found = rded.synthesize(asked.cfg, asked.real, asked.teacher, ipc=asked.ipc, seed=0, part=part, track=Track.quiet())
    return found.images_u8


def ours_given(asked: Setting, cls: int, boxes: Tensor) -> Selected:
    """The library's way for one class, with given boxes."""
    size, device = asked.real.size, asked.teacher.compute.device
    factor = _patches.tiles_along(asked.cfg, size)
    scorer = _selection.scorer(asked.teacher, asked.real)
    images: Tensor | list[Tensor] = asked.real.read("train", cls, asked.order(cls).tolist())
    if asked.real.kind == "pixels":
        images = torch.stack(list(images))
    cut = _crops.crops(images, boxes, size // factor, device)
    scores = _patches.score(scorer, cut, cls, size).view(boxes.shape[:2])
    image, crop, _ = _patches.choose(scores, asked.ipc * factor**2, 1)
    patches = cut.unflatten(0, boxes.shape[:2])[image, crop].cpu()
    images_u8 = _patches.mosaic(patches, asked.ipc, factor).round().clamp(0, 255).to(torch.uint8)
    return Selected(scores, boxes, image, crop, images_u8)


def compare(left: Selected, right: Selected) -> dict[str, float]:
    """How far two selections from the same boxes differ."""
    same = (left.image == right.image) & (left.crop == right.crop)
    chosen = [set(zip(s.image.tolist(), s.crop.tolist(), strict=True)) for s in (left, right)]
    pixels = (left.images_u8.int() - right.images_u8.int()).abs()
    return {
        "score_difference_max": float((left.scores - right.scores).abs().max()),
        "score_spread": float(left.scores.std()),
        "patches": len(same),
        "patches_same": len(chosen[0] & chosen[1]),
        "patches_same_at_the_same_rank": int(same.sum()),
        "pixel_difference_max": int(pixels.max()) if bool(same.all()) else -1,  # levels; -1: other images
    }


def timed(work: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Seconds of one call by the clock (the device's queue included), and seconds of CPU, workers included."""
    began, clock = _cpu_seconds(), time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - clock, _cpu_seconds() - began


def _cpu_seconds() -> float:
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


def setting(given: argparse.Namespace, compute: Compute, folder: Path) -> Setting:
    """Real images in both forms, and one teacher in both forms."""
    prepare.prepare(DatasetConfig(name=given.dataset, root=str(given.root)), folder, Track.quiet())
    images = real.load(folder)
    plain: Any = datasets.ImageFolder(str(given.root / "train")) if images.kind == "photos" else None
    known = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}
    if images.kind == "pixels":
        plain = known[given.dataset](str(given.root), train=True)
        images.pixels("train")
    built = []
    for _ in range(2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            built.append(nets.build(given.net, len(images.classes), images.size))
        if given.teacher:
            pretrained.load(built[-1], str(given.teacher), given.net)
    mean, std = list(images.mean), list(images.std)
    card = Card(given.net, {}, list(images.classes), images.size, mean, std, 0.0, 0.0, [], [])
    net = built[0].to(compute.device).eval().requires_grad_(False)
    cfg = rded.Config(mipc=given.mipc, num_crop=given.num_crop)
    classes = list(range(given.classes or len(images.classes)))
    return Setting(images, plain, net, Frozen(built[1], card, compute), cfg, given.ipc, classes)


def measure(asked: Setting, repeats: int, workers: list[int], say: Callable[[str], None]) -> dict[str, Any]:
    """Both ways in turn; then both on the same boxes."""
    device = asked.teacher.compute.device
    ways: dict[str, Callable[[], object]] = {"ours": lambda: ours(asked)}
    for n in workers:
        ways[f"reference, {n} workers"] = lambda n=n: [reference(asked, cls, n) for cls in asked.classes]
    turns: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for turn in range(repeats):
        for name, way in ways.items():
            turns[name].append(timed(way, device))
            say(f"turn {turn + 1}/{repeats}: {name}: {turns[name][-1][0]:.2f} s, {turns[name][-1][1]:.2f} s of CPU")
    crops = sum(len(asked.order(cls)) for cls in asked.classes) * asked.cfg.num_crop
    found: dict[str, Any] = {"crops": crops, "turns_seconds_and_cpu_seconds": turns}
    for key, column in (("seconds", 0), ("cpu_seconds", 1)):
        middle = {name: statistics.median(turn[column] for turn in done) for name, done in turns.items()}
        fastest = min((name for name in middle if name != "ours"), key=lambda name: middle[name])
        found[key] = middle | {"fastest_reference": fastest, "ratio": middle[fastest] / middle["ours"]}
        for name, value in middle.items():
            say(f"{name}: median {value:.2f} {key}, {crops / value:.0f} crops/s")
        say(f"ratio of {key} to the fastest reference ({fastest}): {found[key]['ratio']:.2f}")
    found["same_boxes"] = []
    for cls in asked.classes:
        theirs = reference(asked, cls, 0)
        found["same_boxes"].append(compare(theirs, ours_given(asked, cls, theirs.boxes)))
        say(f"class {cls}, same boxes: " + ", ".join(f"{k} {v:.3g}" for k, v in found["same_boxes"][-1].items()))
    return found


def main() -> None:
    """Measure, print, and leave a result folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", choices=("cifar10", "cifar100", "imagenette"), default="cifar10")
    parser.add_argument("--root", type=Path, required=True, help="the data set in torchvision's layout")
    parser.add_argument("--net", default="", help="default: convnet3, for photos resnet18")
    parser.add_argument("--teacher", type=Path, help="safetensors weights; without, random ones")
    parser.add_argument("--mipc", type=int, default=300)
    parser.add_argument("--num-crop", type=int, default=5)
    parser.add_argument("--ipc", type=int, default=10)
    parser.add_argument("--classes", type=int, default=0, help="the first N classes; 0 = all")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="+", default=sorted({0, min(4, os.cpu_count() or 1)}))
    parser.add_argument("--threads", type=int, default=0, help="torch's threads; 0 = its default")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="of ours")
    parser.add_argument("--out", type=Path, required=True, help="the result folder to write")
    given = parser.parse_args()
    given.net = given.net or ("resnet18" if given.dataset == "imagenette" else "convnet3")
    if given.threads:
        torch.set_num_threads(given.threads)
    compute = choose(given.device, given.precision)
    lines: list[str] = []

    def say(text: str) -> None:
        print(text, flush=True)
        lines.append(text)

    versions = {name: metadata.version(name) for name in ("torch", "torchvision", "pillow", "numpy")}
    say(f"{hardware(compute)}; {platform.platform()}; python {platform.python_version()}; {versions}; {code_version()}")
    with tempfile.TemporaryDirectory() as folder:
        asked = setting(given, compute, Path(folder))
        found = measure(asked, given.repeats, given.workers, say)
    config = {"dataset": given.dataset, "net": given.net, "teacher": "random weights", "ipc": given.ipc}
    if given.teacher:
        config["teacher"] = f"{given.teacher.name} sha256:{hashlib.sha256(given.teacher.read_bytes()).hexdigest()}"
    config |= {"classes": len(asked.classes), "method": asked.cfg.model_dump(), "compute": hardware(compute)}
    given.out.mkdir(parents=True, exist_ok=True)
    for name, content in (("config.json", config), ("metrics.json", found)):
        (given.out / name).write_text(json.dumps(content, indent=1) + "\n")
    (given.out / "log.txt").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
