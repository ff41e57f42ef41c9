"""What can be wrong with a data source: each error names the thing, shows the value and says what to do."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from _pictures import folder, noise
from torchvision import datasets

from distillery.config import DatasetConfig
from distillery.data import DATASETS
from distillery.data.prepare import prepare
from distillery.errors import DistilleryError, UserError
from distillery.track import Track


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTILLERY_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A sound folder of three classes."""
    return folder(tmp_path / "in", {"ant": 2, "bee": 2, "cow": 2})


def run(tmp_path: Path, name: str, root: Path | str = "", **options: Any) -> dict[str, Any]:
    """The meta of a preparation; notes go to `meta["notes"]`."""
    notes: list[str] = []
    track = Track(say=lambda event: notes.append(str(event.get("text", ""))))
    meta = prepare(DatasetConfig(name=name, root=str(root), **options), tmp_path / "out", track)
    return meta | {"notes": "\n".join(notes)}


def fails(tmp_path: Path, message: str, name: str, root: Path | str = "", **options: Any) -> None:
    """Preparing fails as a user's mistake with this message, and leaves no index behind."""
    with pytest.raises(UserError, match=message) as caught:
        run(tmp_path, name, root, **options)
    assert caught.value.exit_code == 2
    assert not (tmp_path / "out" / "data.json").exists()


def test_unknown_name_shows_the_nearest(tmp_path: Path) -> None:
    fails(tmp_path, "'cifar_10' is not one of digits, cifar10, .*did you mean 'cifar10'", "cifar_10")


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("digits", 65, "digits: size 65 is out of range; use 8 to 64 pixels, or 0 for the data set's own 16"),
        ("cifar10", 4, "cifar10: size 4 is out of range; use 8 to 64"),
        ("tiny_imagenet", 224, "tiny_imagenet: size 224 is out of range; use 8 to 64"),
        ("imagefolder", 7, "imagefolder: size 7 is out of range; use 8 to 1024"),
    ],
)
def test_size_out_of_range(tmp_path: Path, name: str, size: int, message: str) -> None:
    fails(tmp_path, message, name, tmp_path, size=size)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "fashion_mnist", "imagenette"])
def test_missing_root_of_a_known_set_offers_the_download(tmp_path: Path, name: str) -> None:
    layout = DATASETS[name].note.split("{")[0].split("*")[0]
    fails(tmp_path, rf"{name}: root '.*nowhere' does not exist; .*{layout}.*download: true", name, tmp_path / "nowhere")


def test_no_root_looks_into_the_cache(tmp_path: Path) -> None:
    fails(tmp_path, r"cifar10: .*cache/downloads/cifar10 lacks cifar-10-batches-py/data_batch_1 .*download", "cifar10")
    fails(tmp_path, r"root '.*cache/downloads/imagenette' does not exist; .*download: true", "imagenette")


@pytest.mark.parametrize("name", ["imagefolder", "tiny_imagenet"])
def test_missing_root_of_own_images(tmp_path: Path, name: str) -> None:
    fails(tmp_path, rf"{name}: root is ''; set it to a folder or URI with ROOT/train/", name)
    fails(
        tmp_path, rf"{name}: root '.*nowhere' does not exist; expected layout: ROOT/train/", name, tmp_path / "nowhere"
    )
    fails(tmp_path, rf"{name}: nothing at .*nowhere/train/", name, (tmp_path / "nowhere").as_uri())
    fails(tmp_path, "download: True is not possible, torchvision has no downloader", name, tmp_path, download=True)


def test_wrong_layout_names_what_lacks(tmp_path: Path, images: Path) -> None:
    fails(tmp_path, r"cifar10: .* lacks cifar-10-batches-py/data_batch_1 and 6 more; .*ROOT is the folder above",
          "cifar10", images)  # fmt: skip
    fails(tmp_path, r"fashion_mnist: .* lacks FashionMNIST/raw/train-images-idx3-ubyte", "fashion_mnist", images)
    fails(tmp_path, r"lacks cifar-100-python/train", "cifar100", images.as_uri())
    fails(tmp_path, r"imagefolder: root .* has no folder train/; expected layout", "imagefolder", images / "train")
    for path in sorted((images / "val").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    (images / "val").rmdir()
    fails(tmp_path, r"imagefolder: .* has no folder val/; expected layout", "imagefolder", images)


def test_a_folder_of_other_classes_is_not_a_known_set(tmp_path: Path, images: Path) -> None:
    fails(
        tmp_path, r"train has 3 classes, imagenette has 10; not in both: ant, bee, .*imagefolder", "imagenette", images
    )


def test_download_needs_a_local_root(tmp_path: Path, images: Path) -> None:
    for name in ("cifar10", "imagenette"):
        fails(tmp_path, f"{name}: download: true needs a local root, not file", name, images.as_uri(), download=True)


@pytest.mark.parametrize("name", ["cifar10", "fashion_mnist", "imagenette"])
def test_failed_download_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    nobody = "http://127.0.0.1:9/"
    monkeypatch.setattr(datasets.CIFAR10, "url", nobody)
    monkeypatch.setattr(datasets.FashionMNIST, "mirrors", [nobody])
    monkeypatch.setattr(datasets.Imagenette, "_ARCHIVES", {"320px": (f"{nobody}imagenette2-320.tgz", "")})
    with pytest.raises(DistilleryError, match=r"could not fetch .*; check the network and the disk"):
        run(tmp_path, name, tmp_path / "new", download=True)


def test_damaged_cifar_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tmp_path / "c" / datasets.CIFAR10.base_folder
    base.mkdir(parents=True)
    for name, _ in [*datasets.CIFAR10.train_list, *datasets.CIFAR10.test_list]:
        (base / name).write_bytes(b"not what the checksum says")
    fails(
        tmp_path, r"data_batch_1 is damaged: its MD5 is not c99c.*; delete it and set download", "cifar10", base.parent
    )
    fails(tmp_path, r"is damaged: .*; copy it to file:.* again", "cifar10", base.parent.as_uri())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda data: data[:-1], r"train-images-idx3-ubyte is damaged: 15695 bytes instead of 15696; delete it"),
        (lambda data: b"\x1f\x8b" + data[2:], r"raw: no IDX file of images or labels"),
    ],
)
def test_damaged_fashion_file_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[bytes], bytes], message: str
) -> None:
    raw = tmp_path / "f" / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    head = b"".join(n.to_bytes(4, "big") for n in (0x803, 20, 28, 28))
    for split in ("train", "t10k"):
        (raw / f"{split}-images-idx3-ubyte").write_bytes(spoil(head + bytes(20 * 28 * 28)))
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01\0\0\0\x14" + bytes(20))
    monkeypatch.setitem(DATASETS, "fashion_mnist", dataclasses.replace(DATASETS["fashion_mnist"], train=20, val=20))
    fails(tmp_path, message, "fashion_mnist", tmp_path / "f")


def test_wrong_fashion_label_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = tmp_path / "f" / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for split in ("train", "t10k"):
        head = b"".join(n.to_bytes(4, "big") for n in (0x803, 1, 28, 28))
        (raw / f"{split}-images-idx3-ubyte").write_bytes(head + bytes(28 * 28))
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01\0\0\0\x01" + bytes([10]))
    monkeypatch.setitem(DATASETS, "fashion_mnist", dataclasses.replace(DATASETS["fashion_mnist"], train=1, val=1))
    fails(tmp_path, r"train-labels-idx1-ubyte is damaged: it holds the label 10", "fashion_mnist", tmp_path / "f")


@pytest.mark.parametrize("uri", [False, True])
def test_class_only_in_validation(tmp_path: Path, images: Path, uri: bool) -> None:
    (images / "val" / "ants").mkdir()
    noise(1).save(images / "val" / "ants" / "0.png")
    message = r"val has the class 'ants', which train lacks; did you mean 'ant'\?; rename or remove val/ants"
    fails(tmp_path, message, "imagefolder", images.as_uri() if uri else images)


def test_empty_class(tmp_path: Path, images: Path) -> None:
    (images / "train" / "dog").mkdir()
    (images / "train" / "dog" / "photo.heic").write_bytes(b"x")
    fails(
        tmp_path, r"train/dog is an empty class: it has no file that ends in one of .*\.avif, ", "imagefolder", images
    )


def test_class_without_validation_images_is_noted(tmp_path: Path, images: Path) -> None:
    (images / "val" / "bee" / "0.png").unlink()
    (images / "train" / "ant" / "clip.mp4").write_bytes(b"x")
    meta = run(tmp_path, "imagefolder", images, size=8)
    assert meta["counts"]["val"] == [1, 0, 1]
    assert "1 classes have no validation image: bee" in meta["notes"]
    assert "1 files are no images and were left out (.mp4), first train/ant/clip.mp4" in meta["notes"]


def test_no_classes_and_no_validation_images(tmp_path: Path, images: Path) -> None:
    for cls in ("ant", "bee", "cow"):
        (images / "val" / cls / "0.png").unlink()
    fails(tmp_path, r"val has no image; expected layout", "imagefolder", images)
    (tmp_path / "none" / "train").mkdir(parents=True)
    (tmp_path / "none" / "val").mkdir()
    (tmp_path / "none" / "train" / "x.png").touch()
    (tmp_path / "none" / "val" / "x.png").touch()
    fails(tmp_path, r"train has 0 class folders, at least 2 are needed", "imagefolder", tmp_path / "none")


def test_tiny_imagenet_annotations(tmp_path: Path) -> None:
    root = tmp_path / "tiny"
    for wnid in DATASETS["tiny_imagenet"].classes:
        (root / "train" / wnid).mkdir(parents=True)
        (root / "train" / wnid / "0.JPEG").touch()
    (root / "val" / "images").mkdir(parents=True)
    (root / "val" / "images" / "a.JPEG").touch()
    fails(tmp_path, r"val/val_annotations\.txt does not exist; expected layout", "tiny_imagenet", root)
    notes = root / "val" / "val_annotations.txt"
    notes.write_text("a.JPEG n01443537\n")
    fails(
        tmp_path, r"val_annotations\.txt line 1: expected FILE<tab>WNID..., found 'a\.JPEG n0144", "tiny_imagenet", root
    )
    notes.write_text("b.JPEG\tn01443537\n")
    fails(tmp_path, r"line 1 names b\.JPEG, but val/images/b\.JPEG does not exist", "tiny_imagenet", root)
    notes.write_text("a.JPEG\tn00000000\n")
    fails(tmp_path, r"val has the class 'n00000000', which train lacks", "tiny_imagenet", root)


@pytest.mark.parametrize("size", [8, 100])
@pytest.mark.parametrize("broken", [b"", b"<html>", None])
def test_unreadable_image_stops_or_is_left_out(tmp_path: Path, images: Path, size: int, broken: bytes | None) -> None:
    path = images / "train" / "bee" / "1.png"
    path.write_bytes(path.read_bytes()[:400] if broken is None else broken)
    why = "truncated" if broken is None else "no image of a known format"
    fails(
        tmp_path,
        rf"unreadable image .*train/bee/1\.png: .*{why}.*on_unreadable: skip",
        "imagefolder",
        images,
        size=size,
    )
    meta = run(tmp_path, "imagefolder", images, size=size, on_unreadable="skip")
    assert (meta["unreadable"], meta["skipped"]) == (1, ["train/bee/1.png"])
    assert meta["counts"]["train"] == [2, 1, 2]
    assert "left out unreadable image" in meta["notes"]


def test_too_many_unreadable_images(tmp_path: Path, images: Path) -> None:
    for cls in ("ant", "bee", "cow"):
        (images / "train" / cls / "0.png").write_bytes(b"x")
    message = r"3 unreadable images, more than max_unreadable: 2; first train/ant/0\.png, last .*/train/cow/0\.png"
    fails(tmp_path, message, "imagefolder", images, size=8, on_unreadable="skip", max_unreadable=2)


def test_class_of_unreadable_images_only(tmp_path: Path, images: Path) -> None:
    for i in range(2):
        (images / "train" / "cow" / f"{i}.png").write_bytes(b"x")
    fails(tmp_path, r"no readable training image in the classes cow; unreadable: train/cow/0\.png",
          "imagefolder", images, size=8, on_unreadable="skip")  # fmt: skip


def test_settings_without_effect_are_said(tmp_path: Path) -> None:
    meta = run(tmp_path, "digits", tmp_path, store=str(tmp_path / "s"))
    assert "store: " in meta["notes"]
    assert "root and download have no effect" in meta["notes"]
    assert not (tmp_path / "s").exists()


def test_output_that_is_a_file(tmp_path: Path, images: Path) -> None:
    (tmp_path / "out").write_text("in the way")
    with pytest.raises(UserError, match=r"out cannot be written .*choose a folder"):
        run(tmp_path, "imagefolder", images, size=8)
