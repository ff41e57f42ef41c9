"""Photos and shards: original bytes in tars, decoded once; killed work continues; published shards are verified."""

import gc
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from _pictures import config, contents, encoded, folder, made, noise
from PIL import Image
from torchvision import transforms

from distillery.data import _decode, _photos, _shards
from distillery.data.prepare import prepare
from distillery.data.real import load
from distillery.errors import CorruptArtifact, StoreError
from distillery.track import Track


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv("DISTILLERY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Seven photos of odd sizes and kinds in three classes."""
    root = folder(tmp_path / "photos", {"a": 2, "b": 3, "c": 1}, side=(90, 75))
    noise(50, 70, 120).save(root / "train" / "b" / "1.jpg", quality=90)
    noise(51, 75, 75).convert("L").save(root / "train" / "b" / "wrong.jpg", "PNG")
    return root


def files_of(root: Path, split: str = "train") -> list[Path]:
    return sorted(path for path in (root / split).rglob("*") if path.is_file())


def test_photos_keep_their_bytes_in_tars_anyone_can_read(tmp_path: Path, photos: Path) -> None:
    real = made(tmp_path / "out", config("imagefolder", photos, size=77))
    with tarfile.open(tmp_path / "out" / "train-00000.tar") as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}
        places = [member.offset_data for member in tar if not member.name.endswith(".cls")]
        assert {(m.mtime, m.uid, m.gid, m.uname, m.mode) for m in tar} == {(0, 0, 0, "", 0o644)}
    stored = [data for name, data in members.items() if not name.endswith(".cls")]
    assert stored == [path.read_bytes() for path in files_of(photos)]
    assert [int(data) for name, data in members.items() if name.endswith(".cls")] == [0, 0, 1, 1, 1, 1, 1, 2]
    assert {"train-00000003.jpg", "train-00000006.png"} < set(members)  # the real kind, not the file's ending
    shard = json.loads((tmp_path / "out" / "data.json").read_text())["splits"]["train"]["shards"][0]
    assert (shard["offsets"], shard["sizes"]) == (places, [len(data) for data in stored])
    assert (real.kind, real.counts("train"), real.counts("val")) == ("photos", [2, 5, 1], [1, 1, 1])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves its file open
def test_webdataset_reads_the_tars(tmp_path: Path, photos: Path) -> None:
    prepare(config("imagefolder", photos, size=77), tmp_path / "out", Track.quiet())
    url = str(tmp_path / "out" / "train-00000.tar")
    samples = list(webdataset.WebDataset(url, shardshuffle=False).decode("pilrgb").to_tuple("jpg;png", "cls"))
    assert [label for _, label in samples] == [0, 0, 1, 1, 1, 1, 1, 2]
    for (image, _), path in zip(samples, files_of(photos), strict=True):
        assert np.array_equal(image, Image.open(path).convert("RGB"))
    gc.collect()


def test_photo_pixels_are_the_resized_centre_and_made_once(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = made(tmp_path / "out", config("imagefolder", photos, size=77))
    images, labels = real.pixels("train")
    wanted = transforms.Compose([transforms.Resize(88), transforms.CenterCrop(88), transforms.PILToTensor()])
    assert torch.equal(images, torch.stack([wanted(Image.open(path).convert("RGB")) for path in files_of(photos)]))
    assert labels.tolist() == [0, 0, 1, 1, 1, 1, 1, 2]
    originals = real.read("train", 1, [4, 1])
    assert [tuple(image.shape) for image in originals] == [(3, 75, 75), (3, 120, 70)]
    assert torch.equal(originals[1], transforms.PILToTensor()(Image.open(photos / "train" / "b" / "1.jpg")))
    monkeypatch.setattr(_photos._decode, "picture", pytest.fail)
    assert torch.equal(load(tmp_path / "out").pixels("train")[0], images)


def test_decoding_continues_after_a_kill(tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(config("imagefolder", photos, size=77), tmp_path / "out", Track.quiet())
    whole, calls = _decode.fit, []

    def dying(image: Image.Image, side: int) -> Image.Image:
        calls.append(side)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return whole(image, side)

    monkeypatch.setattr(_decode, "fit", dying)
    with pytest.raises(KeyboardInterrupt):
        load(tmp_path / "out").pixels("train")
    before = len(calls)
    images = load(tmp_path / "out").pixels("train")[0]
    assert len(calls) - before < 8
    assert torch.equal(images[5], _decode.tensor(whole(Image.open(files_of(photos)[5]).convert("RGB"), 88)))


def test_no_room_for_decoded_photos_is_said_beforehand(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, plenty = made(tmp_path / "out", config("imagefolder", photos, size=77)), os.statvfs(tmp_path)
    fields = [0 if i == 4 else value for i, value in enumerate(plenty)]  # f_bavail
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result(fields))
    with pytest.raises(StoreError, match=r"0\.0 GiB are free; .*DISTILLERY_CACHE"):
        real.pixels("train")


def test_same_source_same_bytes(tmp_path: Path, photos: Path) -> None:
    shutil.copytree(photos, tmp_path / "copy")
    for path in files_of(tmp_path / "copy"):
        os.utime(path, (1, 1))
    for size in (12, 77):
        prepare(config("imagefolder", photos, size=size), tmp_path / f"a{size}", Track.quiet())
        prepare(config("imagefolder", tmp_path / "copy", size=size), tmp_path / f"b{size}", Track.quiet())
        assert contents(tmp_path / f"a{size}") == contents(tmp_path / f"b{size}")
    prepare(config("digits"), tmp_path / "d1", Track.quiet())
    prepare(config("digits"), tmp_path / "d2", Track.quiet())
    assert contents(tmp_path / "d1") == contents(tmp_path / "d2")


@pytest.mark.parametrize("size", [12, 77])
def test_many_shards_hold_the_same_images(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    whole = made(tmp_path / "one", config("imagefolder", photos, size=size)).pixels("train")[0]
    monkeypatch.setattr(_shards, "PHOTO_SHARD", 40_000)
    monkeypatch.setattr(_shards, "PIXEL_SHARD", 3 * 3 * 12 * 12)
    (tmp_path / "many").mkdir()
    (tmp_path / "many" / "train-00077.tar").write_bytes(b"of an earlier attempt")
    real = made(tmp_path / "many", config("imagefolder", photos, size=size))
    assert torch.equal(real.pixels("train")[0], whole)
    shards = [path.name for path in (tmp_path / "many").glob("train-*")]
    assert len(shards) >= 3
    assert "train-00077.tar" not in shards


@pytest.mark.parametrize("size", [12, 77])
def test_a_killed_preparation_continues_at_its_last_shard(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(_shards, "PHOTO_SHARD", 40_000)
    monkeypatch.setattr(_shards, "PIXEL_SHARD", 2 * 3 * 12 * 12)
    (photos / "train" / "a" / "0.png").write_bytes(b"broken")
    cfg = config("imagefolder", photos, size=size, on_unreadable="skip", max_unreadable=1)
    meta = prepare(cfg, tmp_path / "whole", Track.quiet())
    out, read = tmp_path / "out", Path.read_bytes
    names: list[str] = []

    def reading(path: Path) -> bytes:
        if path.suffix in (".png", ".jpg"):
            names.append(path.name)
            if path.parent.name == "c":
                raise KeyboardInterrupt
        return read(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", reading)
        with pytest.raises(KeyboardInterrupt):
            prepare(cfg, out, Track(folder=tmp_path / "check", every=0))
    assert not (out / "data.json").exists()
    names.clear()
    monkeypatch.setattr(Path, "read_bytes", lambda path: (names.append(path.name), read(path))[1])
    again = prepare(cfg, out, Track(folder=tmp_path / "check", every=0))
    assert len([name for name in names if name.endswith(("png", "jpg"))]) < 8 + 3
    assert again == meta
    assert contents(out) == contents(tmp_path / "whole")


def test_a_store_as_source_gives_the_same_bytes(tmp_path: Path, photos: Path) -> None:
    for size in (12, 77):
        prepare(config("imagefolder", photos, size=size), tmp_path / f"a{size}", Track.quiet())
        prepare(config("imagefolder", photos.as_uri(), size=size), tmp_path / f"b{size}", Track.quiet())
        assert contents(tmp_path / f"a{size}") == contents(tmp_path / f"b{size}")


def test_published_shards_are_fetched_when_needed_and_verified(tmp_path: Path, photos: Path, cache: Path) -> None:
    bucket = tmp_path / "bucket"
    inside = made(tmp_path / "in", config("imagefolder", photos, size=77))
    outside = made(tmp_path / "out", config("imagefolder", photos, size=77, store=bucket.as_uri()))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["data.json"]
    assert not (cache / "shards").exists()
    assert torch.equal(outside.read("val", 2, [0])[0], inside.read("val", 2, [0])[0])
    (kept,) = (path for path in (cache / "shards").rglob("*") if path.is_file())
    assert torch.equal(outside.pixels("train")[0], inside.pixels("train")[0])
    kept.write_bytes(kept.read_bytes()[:-1] + b"x")
    assert torch.equal(load(tmp_path / "out").read("val", 0, [0])[0], inside.read("val", 0, [0])[0])
    shutil.rmtree(cache / "shards")
    source = next(bucket.rglob("val-*.tar"))
    bytes_ = source.read_bytes()
    source.write_bytes(bytes_[:700] + b"x" + bytes_[701:])
    with pytest.raises(CorruptArtifact, match="sha256"):
        load(tmp_path / "out").read("val", 0, [0])


def test_damaged_shards_are_named(tmp_path: Path, photos: Path) -> None:
    real = made(tmp_path / "out", config("imagefolder", photos, size=77))
    shard = tmp_path / "out" / "train-00000.tar"
    shard.write_bytes(b"\0" * shard.stat().st_size)
    with pytest.raises(CorruptArtifact, match=r"train-00000\.tar: the image at byte 512 "):
        real.read("train", 0, [0])
    made(tmp_path / "px", config("digits"))
    (tmp_path / "px" / "val-00000.safetensors").write_bytes(b"short")
    with pytest.raises(CorruptArtifact, match=r"val-00000\.safetensors cannot be read"):
        load(tmp_path / "px").pixels("val")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("size", [64, 224])
def test_memory_is_flat_in_the_number_of_images(tmp_path: Path, size: int) -> None:
    for cls in range(10):
        for split, count in (("train", 9_900), ("val", 100)):
            place = tmp_path / "in" / split / f"{cls}"
            place.mkdir(parents=True)
            first = place / "0.jpg"
            first.write_bytes(encoded(noise(cls, 160, 120), "JPEG"))
            for i in range(1, count):
                os.link(first, place / f"{i}.jpg")
    code = (
        "import resource, sys; from pathlib import Path; from distillery.config import DatasetConfig\n"
        "from distillery.data.prepare import prepare; from distillery.track import Track\n"
        "cfg = DatasetConfig(name='imagefolder', root=sys.argv[1], size=int(sys.argv[2]))\n"
        "meta = prepare(cfg, Path(sys.argv[3]), Track.quiet())\n"
        "print(sum(meta['images'].values()), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "in"), str(size), str(tmp_path / "out")]
    images, peak = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    assert images == "100000"
    assert int(peak) < 1.5 * 2**20, f"{int(peak) / 2**20:.2f} GiB"
