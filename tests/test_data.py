"""The data step: from sources in their own layouts to shards, and from shards back to the same pixels."""

import dataclasses
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from _pictures import config, folder, made, noise
from PIL import Image
from safetensors.torch import load_file
from torchvision import datasets, transforms

from distillery.data import DATASETS
from distillery.data.prepare import prepare
from distillery.data.real import Real, load
from distillery.errors import CorruptArtifact
from distillery.track import Track


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv("DISTILLERY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def cifar(root: Path, monkeypatch: pytest.MonkeyPatch, images: int = 10) -> np.ndarray:
    """CIFAR-10's files with few images (labels 9, 8, ...); the checksums torchvision expects are set to theirs."""
    base, rows = root / "cifar-10-batches-py", np.random.default_rng(1).integers(0, 256, (images, 3072), dtype=np.uint8)
    base.mkdir(parents=True)
    batch = {"data": rows, "labels": [(9 - i) % 10 for i in range(images)]}
    sums = {}
    for name, content in {"train_a": batch, "test_a": batch, "batches.meta": {"label_names": list("abc")}}.items():
        (base / name).write_bytes(pickle.dumps(content))
        sums[name] = datasets.utils.calculate_md5(str(base / name))
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [("train_a", sums["train_a"])])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [("test_a", sums["test_a"])])
    monkeypatch.setattr(datasets.CIFAR10, "meta", datasets.CIFAR10.meta | {"md5": sums["batches.meta"]})
    return rows.reshape(images, 3, 32, 32)


def fashion(root: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """Fashion-MNIST's files with eleven images, of classes 9, 8, ..., 0 and 9."""
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    images = np.random.default_rng(2).integers(0, 256, (11, 28, 28), dtype=np.uint8)
    for split in ("train", "t10k"):
        head = b"".join(n.to_bytes(4, "big") for n in (0x803, 11, 28, 28))
        (raw / f"{split}-images-idx3-ubyte").write_bytes(head + images.tobytes())
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01\0\0\0\x0b" + bytes([*range(9, -1, -1), 9]))
    small = dataclasses.replace(DATASETS["fashion_mnist"], train=11, val=11)
    monkeypatch.setitem(DATASETS, "fashion_mnist", small)
    return images


def test_every_set_is_described() -> None:
    for name, info in DATASETS.items():
        assert info.name == name
        assert len(set(info.classes)) == len(info.classes)
        assert all(0 < value < 1 for value in (*info.mean, *info.std))
        assert (info.kind == "pixels") == (info.size <= 64)
    assert {name: len(info.classes) for name, info in DATASETS.items()} == {
        "digits": 10, "cifar10": 10, "cifar100": 100, "fashion_mnist": 10, "tiny_imagenet": 200, "imagenette": 10,
        "imagefolder": 0,
    }  # fmt: skip
    assert list(DATASETS["tiny_imagenet"].classes) == sorted(DATASETS["tiny_imagenet"].classes)


def test_digits_are_scaled_split_and_described(tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    meta = prepare(config("digits", size=8), tmp_path / "d", Track.quiet())
    real, source = load(tmp_path / "d"), load_digits()
    zeros = source.images[source.target == 0]
    wanted = [np.round(image * 255 / 16).astype(np.uint8) for i, image in enumerate(zeros) if i % 5 != 4]
    images, labels = real.pixels("train")
    assert np.array_equal(images[labels == 0], np.stack([wanted] * 3, axis=1))
    assert int(images.max()) == 255
    assert meta["counts"] == {split: real.counts(split) for split in ("train", "val")}
    assert meta["images"] == {"train": 1442, "val": 355} == {"train": len(images), "val": len(real.pixels("val")[0])}
    assert (real.name, real.kind, real.classes, real.size) == ("digits", "pixels", tuple("0123456789"), 8)


def test_digits_have_the_documented_statistics(tmp_path: Path) -> None:
    info, real = DATASETS["digits"], made(tmp_path / "d", config("digits"))
    values = real.pixels("train")[0].double() / 255
    assert values.shape[1:] == (3, 16, 16)
    assert torch.allclose(values.mean((0, 2, 3)), torch.tensor(info.mean).double(), atol=1e-4)
    assert torch.allclose(values.std((0, 2, 3)), torch.tensor(info.std).double(), atol=1e-4)
    assert (real.mean, real.std) == (info.mean, info.std)


def test_cifar_is_sorted_by_class_and_untouched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = cifar(tmp_path / "c", monkeypatch, images=13)
    real = made(tmp_path / "out", config("cifar10", tmp_path / "c"))
    images, labels = real.pixels("train")
    assert labels.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 7, 8, 8, 9, 9]
    assert np.array_equal(images, rows[[9, 8, 7, 6, 5, 4, 3, 2, 12, 1, 11, 0, 10]])  # file order inside a class
    assert torch.equal(real.read("train", 9, [1])[0], images[12])
    assert real.classes == DATASETS["cifar10"].classes
    first = made(tmp_path / "one", config("cifar10", tmp_path / "c", per_class=1))
    assert first.counts("train") == [1] * 10
    assert first.counts("val") == real.counts("val")
    assert made(tmp_path / "small", config("cifar10", tmp_path / "c", size=16)).pixels("val")[0].shape == (
        13,
        3,
        16,
        16,
    )


def test_fashion_is_padded_to_32_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grey = fashion(tmp_path / "f", monkeypatch)
    images, labels = made(tmp_path / "out", config("fashion_mnist", tmp_path / "f")).pixels("train")
    wanted = np.pad(grey[[9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 10]], ((0, 0), (2, 2), (2, 2)))
    assert np.array_equal(images, np.stack([wanted] * 3, axis=1))
    assert labels.tolist() == [*range(10), 9]
    plain = made(tmp_path / "28", config("fashion_mnist", tmp_path / "f", size=28)).pixels("val")[0]
    assert np.array_equal(plain[:, 0], grey[[9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 10]])


def test_arrays_come_from_a_store_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = cifar(tmp_path / "c", monkeypatch)
    real = made(tmp_path / "out", config("cifar10", (tmp_path / "c").as_uri()))
    assert np.array_equal(real.pixels("train")[0], rows[::-1])


def test_download_unpacks_what_torchvision_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, name = cifar(tmp_path / "c", monkeypatch), datasets.CIFAR10.filename
    (tmp_path / "root").mkdir()
    with tarfile.open(tmp_path / "root" / name, "w:gz") as tar:
        tar.add(tmp_path / "c" / "cifar-10-batches-py", "cifar-10-batches-py")
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", datasets.utils.calculate_md5(str(tmp_path / "root" / name)))
    real = made(tmp_path / "out", config("cifar10", tmp_path / "root", download=True))
    assert np.array_equal(real.pixels("train")[0], rows[::-1])


def test_imagenette_downloads_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder(tmp_path / "src" / "imagenette2-320", dict.fromkeys(DATASETS["imagenette"].classes, 1), side=(90, 75))
    for path in (tmp_path / "src").rglob("*.png"):
        path.rename(path.with_suffix(".JPEG"))
    with tarfile.open(tmp_path / "imagenette2-320.tgz", "w:gz") as tar:
        tar.add(tmp_path / "src" / "imagenette2-320", "imagenette2-320")
    archive = tmp_path / "imagenette2-320.tgz"
    source = {"320px": (f"http://127.0.0.1:9/{archive.name}", datasets.utils.calculate_md5(str(archive)))}
    monkeypatch.setattr(datasets.Imagenette, "_ARCHIVES", source)
    root = tmp_path / "root"
    (root / "unfinished" / "imagenette2-320" / "train").mkdir(parents=True)  # killed while it unpacked
    archive.replace(root / "unfinished" / archive.name)
    notes: list[str] = []
    track = Track(say=lambda event: notes.append(str(event.get("text"))))
    real = made(tmp_path / "out", config("imagenette", root, download=True, size=80), track)
    assert (real.counts("train"), real.classes, real.kind) == ([1] * 10, DATASETS["imagenette"].classes, "photos")
    assert [path.name for path in root.iterdir()] == ["imagenette2-320"]
    assert any("has 10 + 10 images, imagenette has 9469 + 3925" in note for note in notes)


def test_tiny_imagenet_regroups_validation(tmp_path: Path) -> None:
    root, classes = tmp_path / "in" / "tiny-imagenet-200", DATASETS["tiny_imagenet"].classes
    (root / "val" / "images").mkdir(parents=True)
    lines = []
    for i, wnid in enumerate(classes):
        (root / "train" / wnid / "images").mkdir(parents=True)
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text("0\t0\t62\t62\n")
        Image.new("RGB", (64, 64), (i, 0, 0)).save(root / "train" / wnid / "images" / f"{wnid}_0.JPEG", quality=100)
        Image.new("L", (64, 64), 255 - i).save(root / "val" / "images" / f"val_{i}.JPEG", quality=100)
        lines.append(f"val_{i}.JPEG\t{wnid}\t0\t0\t62\t62\n")
    (root / "val" / "val_annotations.txt").write_text("".join(reversed(lines)))
    real = made(tmp_path / "out", config("tiny_imagenet", tmp_path / "in"))
    assert real.classes == classes
    assert (real.size, real.kind) == (64, "pixels")
    train, val = real.pixels("train")[0].int(), real.pixels("val")[0].int()
    assert (train[:, 0, 0, 0] - torch.arange(200)).abs().max() <= 2
    assert (val[:, 0, 0, 0] - (255 - torch.arange(200))).abs().max() <= 2


def test_small_image_folder_becomes_tensors(tmp_path: Path) -> None:
    root = folder(tmp_path / "in", {"zebra": 2, "ant": 3})
    (root / "train" / "ant" / "deeper").mkdir()
    noise(77).save(root / "train" / "ant" / "deeper" / "x.PNG")
    (root / "train" / ".hidden").mkdir()
    (root / "train" / "ant" / ".DS_Store").write_bytes(b"no image")
    real = made(tmp_path / "out", config("imagefolder", root, size=12))
    images, labels = real.pixels("train")
    wanted = transforms.Compose([transforms.Resize(12), transforms.CenterCrop(12), transforms.PILToTensor()])
    names = ["ant/0.png", "ant/1.png", "ant/2.png", "ant/deeper/x.PNG", "zebra/0.png", "zebra/1.png"]
    assert torch.equal(images, torch.stack([wanted(Image.open(root / "train" / name)) for name in names]))
    assert (real.classes, real.counts("train"), labels.tolist()) == (("ant", "zebra"), [4, 2], [0, 0, 0, 0, 1, 1])
    assert load_file(tmp_path / "out" / "train-00000.safetensors").keys() == {"images", "labels"}


def test_index_must_be_readable_and_known(tmp_path: Path) -> None:
    with pytest.raises(CorruptArtifact, match=r"data\.json cannot be read"):
        load(tmp_path)
    (tmp_path / "data.json").write_text('{"schema": 99}')
    with pytest.raises(CorruptArtifact, match="schema 99, .* upgrade distillery"):
        load(tmp_path)


def test_real_of_tensors() -> None:
    images, labels = torch.arange(12, dtype=torch.uint8).view(12, 1, 1, 1).expand(12, 3, 4, 4), torch.arange(12) % 2
    real = Real.of(images, labels, classes=("even", "odd"))
    assert real.pixels("train")[0][:, 0, 0, 0].tolist() == [0, 2, 4, 6, 10, 1, 3, 5, 7, 11]
    assert real.pixels("val")[0][:, 0, 0, 0].tolist() == [8, 9]
    assert (real.counts("train"), real.size, real.classes) == ([5, 5], 4, ("even", "odd"))
    given = Real.of(images, labels, val=(images[:1], labels[:1]))
    assert (given.counts("train"), given.counts("val"), given.classes) == ([6, 6], [1, 0], ("0", "1"))
