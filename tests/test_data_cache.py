"""Photo shards by reference, on a real S3 server: published once, read through a bounded cache that others share."""

import errno
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock
import pytest
import torch
from _pictures import config, contents, folder, made, noise
from _servers import Server, available, running
from PIL import Image

from distillery import artifact, run
from distillery.config import DatasetConfig
from distillery.data import _cache, _items, _photos, _published, _shards, limits, prepare
from distillery.data import images as data_images
from distillery.data._cache import Cache
from distillery.data.images import batches
from distillery.data.real import Real, load
from distillery.errors import CorruptArtifact, StoreError, UserError
from distillery.store import open_store
from distillery.track import Track

KIND = available()[-1]  # MinIO where it is
BLOCK, SHARD = 60_000, 150_000  # about three and seven of these photos
# A process of its own, as another pod: small blocks, its reads of the store noted in a file.
CHILD = """
import os, sys, time, torch
from pathlib import Path
from distillery.data import _photos, _published, _shards
from distillery.config import DatasetConfig
from distillery.data.prepare import prepare
from distillery.data.real import load
from distillery.store.s3 import S3Store
from distillery.track import Track
for module in (_photos, _published, _shards):
    module.BLOCK = {block}
_shards.PHOTO_SHARD = _published.PHOTO_SHARD = {shard}
whole = S3Store.read_part
def read_part(self, key, start, nbytes):
    with open(os.environ["NOTED"], "a") as file:
        file.write(f"{{key}} {{start}}\\n")
    time.sleep(float(os.environ.get("SLOW", "0")))
    return whole(self, key, start, nbytes)
S3Store.read_part = read_part
"""
PIXELS = "print(int(load(Path(sys.argv[1])).images('train')[0][:].double().sum()))"
PREPARE = """
cfg = DatasetConfig(name='imagefolder', root=sys.argv[1], size=77, store=sys.argv[2])
prepare(cfg, Path(sys.argv[3]), Track.quiet())
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A real S3 server."""
    with running(KIND, tmp_path_factory.mktemp(KIND)) as found:
        yield found


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own; nothing is kept decoded; shards and blocks are small."""
    monkeypatch.setenv("DISTILLERY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("DISTILLERY_MEMORY_BYTES", "1K")
    for module in (_photos, _published, _shards):
        monkeypatch.setattr(module, "BLOCK", BLOCK)
    for module in (_published, _shards):
        monkeypatch.setattr(module, "PHOTO_SHARD", SHARD)
    return tmp_path / "cache"


@pytest.fixture
def place(server: Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """A prefix in a new bucket."""
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    bucket = f"b-{uuid.uuid4().hex}"
    server.make_bucket(bucket)
    return f"s3://{bucket}/data"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """27 photos of three classes, 0.5 MB."""
    return folder(tmp_path / "in", {"a": 9, "b": 11, "c": 7}, side=(90, 75))


def published(source: Path, place: str) -> DatasetConfig:
    return config("imagefolder", source, size=77, store=place)


def fetches(monkeypatch: pytest.MonkeyPatch, real: Real) -> list[tuple[str, int, int]]:
    """Reads of the store by a data set from now on."""
    found: list[tuple[str, int, int]] = []
    own = real._splits["train"]._source
    whole = own._store.read_part

    def noted(key: str, start: int, nbytes: int) -> bytes:
        found.append((key, start, nbytes))
        return whole(key, start, nbytes)

    monkeypatch.setattr(own._store, "read_part", noted)
    return found


def blocks(cache: Path) -> list[Path]:
    return [path for path in (cache / "shards").rglob("*") if path.is_file()]


def size_of(cache: Path) -> int:
    """Bytes at one moment: without the lock, what goes and what comes during the look would both count."""
    with filelock.FileLock(cache / "used.lock"):
        return sum(size for _, size, _ in _cache._entries(cache))


def child(task: str, *arguments: object, **variables: str) -> subprocess.Popen[str]:
    code = CHILD.format(block=BLOCK, shard=SHARD) + task
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, env=os.environ | variables, stdout=subprocess.PIPE, text=True)


def wait_until(is_so: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < until
        time.sleep(0.02)


# Publishing


def test_an_artifact_carries_references_and_a_second_run_writes_nothing(
    tmp_path: Path, source: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare.prepare(published(source, place), tmp_path / "one", Track.quiet())
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["data.json"]
    index = json.loads((tmp_path / "one" / "data.json").read_text())
    shards = [record for split in index["splits"].values() for record in split["shards"]]
    assert (index["store"], len(shards) >= 4) == (place, True)
    store = open_store(place)
    before = store.list()
    assert {r["key"]: r["bytes"] for r in shards}.items() <= {entry.key: entry.bytes for entry in before}.items()
    monkeypatch.setattr(_items, "_photo", pytest.fail)  # no image is read
    monkeypatch.setattr(type(store), "put", pytest.fail)
    monkeypatch.setattr(type(store), "write", pytest.fail)
    assert prepare.prepare(published(source, place), tmp_path / "two", Track.quiet()) == first
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    assert store.list() == before


def test_other_settings_or_files_are_other_content(tmp_path: Path, source: Path, place: str) -> None:
    made(tmp_path / "one", published(source, place))
    fewer = published(source, place).model_copy(update={"per_class": 5})
    assert made(tmp_path / "few", fewer).counts("train") == [5, 5, 5]
    noise(99, 90, 75).save(source / "train" / "c" / "new.png")
    assert made(tmp_path / "more", published(source, place)).counts("train") == [9, 11, 8]
    assert len([e for e in open_store(place).list() if e.key.startswith("prepared/")]) == 3


def test_a_publication_is_believed_only_when_it_is_whole(tmp_path: Path, source: Path, place: str) -> None:
    cfg, store = published(source, place), open_store(place)
    images = made(tmp_path / "one", cfg).images("train")[0][:]
    index = next(entry.key for entry in store.list("prepared/"))
    shard = next(entry.key for entry in store.list() if "train-00001" in entry.key)
    said: list[str] = []
    track = Track(lambda event: said.append(str(event.get("text", ""))))

    def again(name: str) -> None:
        said.clear()
        assert torch.equal(made(tmp_path / name, cfg, track).images("train")[0][:], images)
        assert not any("already" in line for line in said)
        assert contents(tmp_path / name) == contents(tmp_path / "one")

    store.delete(shard)
    again("lost")
    assert store.exists(shard)
    store.write(shard, store.read(shard)[:1000])
    again("cut")
    store.write(index, store.read(index)[:100])
    again("broken index")
    whole = store.read(shard)
    store.write(shard, whole[:-1] + b"x")  # as long, but not what was published
    store.delete(index)
    again("other bytes")
    assert store.read(shard) == whole


def test_a_killed_publication_leaves_nothing_to_believe_and_continues(
    tmp_path: Path, source: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, whole = open_store(place), _published.move
    cfg, moved = published(source, place), list[str]()

    def dying(uri: str, path: Path, record: dict[str, Any]) -> dict[str, Any]:
        moved.append(path.name)
        if len(moved) == 3:
            raise KeyboardInterrupt
        return whole(uri, path, record)

    with monkeypatch.context() as patch:
        patch.setattr(_published, "move", dying)
        with pytest.raises(KeyboardInterrupt):
            prepare.prepare(cfg, tmp_path / "one", Track(folder=tmp_path / "check", every=0))
    assert len(store.list()) == 2
    assert not store.list("prepared/")
    moved[:] = ["", "", "", ""]
    monkeypatch.setattr(_published, "move", dying)
    prepare.prepare(cfg, tmp_path / "one", Track(folder=tmp_path / "check", every=0))
    assert moved[4] == "train-00002.tar"
    store.delete(store.list("prepared/")[0].key)
    prepare.prepare(cfg, tmp_path / "two", Track.quiet())
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.timeout(300)  # processes of their own, which import torch
def test_two_writers_at_once_leave_one_set(tmp_path: Path, source: Path, place: str) -> None:
    noted = {"NOTED": str(tmp_path / "noted")}
    both = [child(PREPARE, source, place, tmp_path / name, **noted) for name in ("one", "two")]
    assert [process.communicate(timeout=200)[0] for process in both] == ["", ""]
    assert [process.returncode for process in both] == [0, 0]
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    made(tmp_path / "inside", config("imagefolder", source, size=77))
    assert torch.equal(load(tmp_path / "one").images("train")[0][:], load(tmp_path / "inside").images("train")[0][:])


# Reading


def test_a_small_cache_holds_its_limit_and_gives_the_same_images(
    tmp_path: Path, source: Path, place: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = made(tmp_path / "inside", config("imagefolder", source, size=77)).images("train")[0][:]
    real = made(tmp_path / "one", published(source, place))
    for module in (data_images, _photos):  # as a large set
        monkeypatch.setattr(module, "WHOLE", 20)
        monkeypatch.setattr(module, "REACH", 4)
    monkeypatch.setattr(_cache, "WRITING", 60.0)  # seconds: a writer that is slow is not dead
    limit = 3 * BLOCK  # a third of the set
    monkeypatch.setenv("DISTILLERY_CACHE_BYTES", str(limit))
    found = fetches(monkeypatch, real)
    sizes, take = [0], _cache._Room.take

    def taken(room: _cache._Room, nbytes: int, part: Path | None) -> None:
        take(room, nbytes, part)  # nothing else lets the cache grow
        sizes.append(size_of(cache))

    monkeypatch.setattr(_cache._Room, "take", taken)
    for cls in range(3):  # as a method reads, class by class
        corners = torch.stack([image[:, 1, 1] for image in real.read("train", cls, [0, 5])])
        assert torch.equal(corners, _corners(source, cls, [0, 5]))
    for epoch in range(3):
        order = real.order("train", torch.Generator().manual_seed(epoch))
        for part, images in batches(real.images("train")[0], order.split(4)):
            assert torch.equal(images, wanted[part])
    assert limit / 2 < max(sizes) <= limit
    assert not list(cache.rglob("*.part"))
    total = sum(record["bytes"] for record in real._splits["train"]._shards)
    assert total < sum(nbytes for _, _, nbytes in found) < 6 * total, "blocks were evicted and came again"


def _corners(source: Path, cls: int, rows: list[int]) -> torch.Tensor:
    """The pixel (1, 1) of some photos."""
    names = sorted((source / "train" / "abc"[cls]).iterdir())
    return torch.tensor([Image.open(names[i]).convert("RGB").getpixel((1, 1)) for i in rows], dtype=torch.uint8)


def test_the_first_images_come_before_the_last_shard_is_read(
    tmp_path: Path, source: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = made(tmp_path / "one", published(source, place))
    found, last = fetches(monkeypatch, real), threading.Event()
    shards = [record["key"] for record in real._splits["train"]._shards]
    whole = real._splits["train"]._source._store.read_part

    def read_part(key: str, start: int, nbytes: int) -> bytes:
        if key == shards[-1]:
            assert last.wait(30)
        return whole(key, start, nbytes)

    monkeypatch.setattr(real._splits["train"]._source._store, "read_part", read_part)
    feed = batches(real.images("train")[0], torch.arange(27).split(3))
    _, images = next(feed)  # while the last shard is not to be had
    assert images.shape == (3, 3, 88, 88)
    wait_until(lambda: len({key for key, _, _ in found}) >= len(shards) - 1)  # the next ones are fetched ahead
    last.set()
    assert sum(len(part) for part, _ in feed) == 24


def test_each_block_is_fetched_once_while_there_is_room(
    tmp_path: Path, source: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = made(tmp_path / "one", published(source, place))
    found = fetches(monkeypatch, real)
    for epoch in range(2):
        order = torch.randperm(27, generator=torch.Generator().manual_seed(epoch))
        assert sum(len(part) for part, _ in batches(real.images("train")[0], order.split(5))) == 27
    count = sum(len(record["blocks"]) for record in real._splits["train"]._shards)
    assert len(found) == len(set(found)) == count
    list(batches(load(tmp_path / "one").images("train")[0], torch.arange(27).split(5)))
    assert len(found) == count


def test_a_random_order_over_more_than_the_cache_holds_reads_no_more_than_the_images(
    tmp_path: Path, source: Path, place: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = made(tmp_path / "inside", config("imagefolder", source, size=77)).images("train")[0][:]
    real = made(tmp_path / "one", published(source, place))
    monkeypatch.setenv("DISTILLERY_CACHE_BYTES", str(2 * BLOCK))
    found = fetches(monkeypatch, real)
    seen = list(batches(real.images("train")[0], torch.randperm(27).split(4)))
    assert all(torch.equal(images, wanted[part]) for part, images in seen)
    total = sum(size for record in real._splits["train"]._shards for size in record["sizes"])
    assert sum(nbytes for _, _, nbytes in found) == total


def test_what_others_evict_or_spoil_is_fetched_again(
    tmp_path: Path, source: Path, place: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = made(tmp_path / "one", published(source, place))
    found = fetches(monkeypatch, real)
    wanted = real.images("train")[0][:]
    count = len(found)
    monkeypatch.setattr(limits, "AHEAD", 4 * 3 * 88 * 88)
    for number, (part, images) in enumerate(batches(real.images("train")[0], torch.arange(27).split(3))):
        assert torch.equal(images, wanted[part])
        for path in blocks(cache)[number % 2 :: 2]:
            path.unlink(missing_ok=True)
    assert len(found) > count
    for spoil in (lambda data: data[:-1], lambda data: b"\0" * len(data), lambda data: b""):
        assert torch.equal(real.images("train")[0][:], wanted)
        found.clear()
        time.sleep(0.06)  # file times advance in ticks
        for path in blocks(cache):
            path.write_bytes(spoil(path.read_bytes()))
        assert torch.equal(real.images("train")[0][:], wanted)
        assert len(found) == count
        assert torch.equal(load(tmp_path / "one").images("train")[0][:], wanted)
        assert len(found) == count


def test_a_shard_that_changed_in_the_store_is_refused(tmp_path: Path, source: Path, place: str) -> None:
    real, store = made(tmp_path / "one", published(source, place)), open_store(place)
    shard = next(entry.key for entry in store.list() if "train-00001" in entry.key)
    whole = store.read(shard)
    store.write(shard, b"".join((whole[:700], bytes([whole[700] ^ 1]), whole[701:])))
    with pytest.raises(CorruptArtifact, match=rf"{shard}, bytes 512 to \d+: .*sha256"):
        real.images("train")[0][:]


def test_a_store_that_is_killed_and_restarted_only_delays(
    tmp_path: Path, source: Path, place: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = made(tmp_path / "one", published(source, place))
    wanted = made(tmp_path / "inside", config("imagefolder", source, size=77)).images("train")[0][:]
    monkeypatch.setattr(limits, "AHEAD", 2 * 3 * 88 * 88)
    feed = batches(real.images("train")[0], torch.arange(27).split(3))
    _, first = next(feed)
    server.kill()
    back = threading.Timer(1.0, server.start)
    back.start()
    rest = list(feed)
    back.join()
    assert torch.equal(torch.cat([first, *(found for _, found in rest)]), wanted)


@pytest.mark.timeout(300)  # processes of their own, which import torch
def test_two_pods_of_a_node_fetch_each_block_once(tmp_path: Path, source: Path, place: str, cache: Path) -> None:
    real = made(tmp_path / "one", published(source, place))
    noted = tmp_path / "noted"
    both = [child(PIXELS, tmp_path / "one", NOTED=str(noted), SLOW="0.1") for _ in range(2)]
    sums = [process.communicate(timeout=200)[0] for process in both]
    assert sums[0] == sums[1] == f"{int(real.images('train')[0][:].double().sum())}\n"
    lines = noted.read_text().splitlines()
    assert len(lines) == len(set(lines)) == len(blocks(cache))


@pytest.mark.timeout(300)  # processes of their own, which import torch
def test_a_pod_killed_while_it_fetches_holds_nobody_up(tmp_path: Path, source: Path, place: str, cache: Path) -> None:
    real = made(tmp_path / "one", published(source, place))
    noted = tmp_path / "noted"
    dying = child(PIXELS, tmp_path / "one", NOTED=str(noted), SLOW="600")
    wait_until(lambda: noted.exists() and bool(noted.read_text()))
    dying.send_signal(signal.SIGKILL)
    dying.communicate()
    began = time.monotonic()
    assert len(real.images("train")[0][:]) == 27
    assert time.monotonic() - began < 30
    assert len(blocks(cache)) == sum(len(record["blocks"]) for record in real._splits["train"]._shards)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_whole_run_gives_the_same_artifacts_however_little_fits(
    tmp_path: Path, source: Path, place: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISTILLERY_LOG", "quiet")
    text = f"""
name: toy
dataset: {{name: imagefolder, root: {source}, size: 70, store: "{place}"}}
teacher: {{net: convnet2, net_options: {{width: 4}}, epochs: 2, batch: 9, lr: 0.02}}
methods:
  - {{method: median, ipc: [1]}}
  - {{method: rded, ipc: [1], options: {{mipc: 4}}}}
  - {{method: wmdd, ipc: [1], options: {{iterations: 2}}}}
students:
  - {{net: convnet2, net_options: {{width: 4}}, recipe: {{preset: rded, epochs: 2}}}}
"""

    def made_in(out: Path) -> dict[str, str]:
        assert run.run(text, str(out)).failures == []
        found = sorted(out.rglob("[1-5]-*/*/manifest.json"))
        return {"/".join(path.parts[-3:-1]): artifact.read(path.parent).fingerprint for path in found}

    monkeypatch.setenv("DISTILLERY_MEMORY_BYTES", "1G")
    held = made_in(tmp_path / "held")
    assert list((cache / "decoded").glob("*.u8"))
    shutil.rmtree(cache)
    monkeypatch.setenv("DISTILLERY_MEMORY_BYTES", "1K")
    monkeypatch.setenv("DISTILLERY_CACHE_BYTES", str(3 * BLOCK))
    assert made_in(tmp_path / "streamed") == held
    assert len(held) == 1 + 1 + 1 + 3 * 3
    assert not (cache / "decoded").exists()
    assert size_of(cache) <= 3 * BLOCK


# The cache itself


def entry(cache: Cache, data: bytes) -> bytes:
    return cache.read(hashlib.sha256(data).hexdigest(), len(data), slice(0, 4), lambda: data)


def test_what_was_not_used_for_longest_goes_first(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTILLERY_CACHE_BYTES", "1000")
    own = Cache()
    data = [bytes([i]) * 200 for i in range(8)]
    for block in data[:5]:
        entry(own, block)
        time.sleep(0.02)
        entry(own, block)  # most disks note the first look at a file by themselves, and no other
    time.sleep(0.02)
    entry(Cache(), data[0])  # used again, by another process
    for block in data[5:]:
        entry(own, block)
    left = {path.read_bytes() for path in blocks(cache)}
    assert data[0] in left
    assert data[1] not in left
    assert set(data[5:]) < left
    assert sum(map(len, left)) <= 1000


def test_unfinished_files_count_and_go_only_when_old(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTILLERY_CACHE_BYTES", "1000")
    for name, age in (("young.part", 10), ("old.part", 7200)):
        (cache / "shards" / "aa").mkdir(parents=True, exist_ok=True)
        path = cache / "shards" / "aa" / name
        path.write_bytes(bytes(300))
        os.utime(path, (time.time() - age,) * 2)
    own = Cache()
    for i in range(4):
        entry(own, bytes([i]) * 200)
        assert size_of(cache) <= 1000
    assert (cache / "shards" / "aa" / "young.part").exists()
    assert not (cache / "shards" / "aa" / "old.part").exists()


def test_an_unfinished_block_counts_whole_and_keeps_its_name_while_somebody_counts(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else others see too little, and the cache grows beyond its limit."""
    written, go_on, sizes = threading.Event(), threading.Event(), list[int]()

    class Slow(io.FileIO):
        def write(self, data: Any) -> int:
            sizes.append(size_of(cache))
            return super().write(data)

    def slowly(path: Path, block: bytes) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(Path, "open", lambda path, mode: Slow(path, mode))
            fill(path, block)
        written.set()
        assert go_on.wait(60)

    fill = _cache._fill
    monkeypatch.setattr(_cache, "_fill", slowly)
    reader = threading.Thread(target=entry, args=(Cache(), bytes(200)))
    reader.start()
    assert written.wait(60)
    assert sizes == [200]
    with filelock.FileLock(cache / "used.lock"):
        seen = list(_cache._entries(cache))
        go_on.set()
        time.sleep(0.3)
        assert [path.stat().st_size for _, _, path in seen] == [200]
    reader.join()
    assert [path.stat().st_size for path in blocks(cache)] == [200]


def test_blocks_that_are_being_written_are_waited_for(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTILLERY_CACHE_BYTES", "1000")
    monkeypatch.setattr(_cache, "WRITING", 60.0)
    fill, writing, go_on, sizes = _cache._fill, threading.Barrier(3), threading.Semaphore(0), list[int]()

    def slowly(path: Path, block: bytes) -> None:
        if block[0] < 2:
            writing.wait(60)
            assert go_on.acquire(timeout=60)
        sizes.append(size_of(cache))
        fill(path, block)

    monkeypatch.setattr(_cache, "_fill", slowly)
    readers = [threading.Thread(target=entry, args=(Cache(), bytes([i]) * 400)) for i in range(3)]
    for reader in readers[:2]:
        reader.start()
    writing.wait(60)
    readers[2].start()
    time.sleep(0.3)
    assert sizes == []
    go_on.release()
    readers[2].join(60)
    assert len(sizes) == 2
    go_on.release()
    for reader in readers:
        reader.join(60)
    assert len(sizes) == 3
    assert max(sizes) <= 1000
    assert len(blocks(cache)) == 2


def test_a_killed_writers_block_is_not_waited_for_long(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTILLERY_CACHE_BYTES", "1000")
    monkeypatch.setattr(_cache, "WRITING", 0.5)
    (cache / "shards" / "aa").mkdir(parents=True)
    (cache / "shards" / "aa" / "left.part").write_bytes(bytes(900))
    entry(Cache(), bytes(200))
    assert size_of(cache) == 1100


def test_decoded_photos_make_room_and_are_evicted_as_shards_are(
    tmp_path: Path, source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = 27 * 3 * 88 * 88
    monkeypatch.setenv("DISTILLERY_MEMORY_BYTES", "1G")
    monkeypatch.setenv("DISTILLERY_CACHE_BYTES", str(decoded + 5000))
    own = Cache()
    for i in range(4):
        entry(own, bytes([i]) * 4000)
    real = made(tmp_path / "inside", config("imagefolder", source, size=77))
    wanted = real.pixels("train")[0].clone()
    assert len(blocks(cache)) == 1
    assert size_of(cache) <= decoded + 5000
    for i in range(4):
        entry(own, bytes([i]) * 4000)
    assert not list((cache / "decoded").glob("*.u8"))
    assert torch.equal(real.pixels("train")[0], wanted)


def test_a_block_larger_than_the_cache_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTILLERY_CACHE_BYTES", "100")
    with pytest.raises(UserError, match="DISTILLERY_CACHE_BYTES is 100 bytes, and one piece of data has 200"):
        entry(Cache(), bytes(200))


def test_a_full_disk_says_which_setting_to_lower(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, block: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(_cache, "_fill", full)
    with pytest.raises(StoreError, match="disk of .* is full .*DISTILLERY_CACHE_BYTES; lower that"):
        entry(Cache(), bytes(200))
    assert size_of(cache) == 0


def test_an_index_cannot_name_files_outside(tmp_path: Path, source: Path, place: str, cache: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    with pytest.raises(CorruptArtifact, match="is no sha256"):
        Cache().read(f"../../../{victim.name}", 8, slice(0, 4), lambda: b"")
    assert victim.read_bytes() == b"precious"
    made(tmp_path / "one", published(source, place))
    text = (tmp_path / "one" / "data.json").read_text()
    (tmp_path / "one" / "data.json").write_text(text.replace('"train-00000.tar"', '"../train-00000.tar"'))
    with pytest.raises(CorruptArtifact, match="'../train-00000.tar', which is no plain file name"):
        load(tmp_path / "one")
