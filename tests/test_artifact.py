"""An artifact is believed only when it is finished and every byte is what its manifest says."""

import dataclasses
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from distillery import artifact
from distillery.artifact import MANIFEST, Manifest
from distillery.code_version import code_version
from distillery.errors import CorruptArtifact, DistilleryError, StoreError, UserError
from distillery.files import sha256_of, write_atomic

HOUR_AGO = 3_000_000_000_000_000_00  # ns since 1970: any time long past


def write_files(folder: Path) -> None:
    """What a step leaves: two files that count and two that do not."""
    (folder / "sub").mkdir(parents=True, exist_ok=True)
    (folder / "checkpoint").mkdir(exist_ok=True)
    (folder / "data.bin").write_bytes(bytes(range(256)))
    (folder / "sub" / "empty.json").write_bytes(b"")
    (folder / "data.bin.1-2.part").write_bytes(b"half")
    (folder / "checkpoint" / "state.safetensors").write_bytes(b"later")


def make(folder: Path, seconds: float = 1.5, **changes: object) -> Manifest:
    """A finished artifact."""
    write_files(folder)
    facts = {"kind": "teacher", "step": "train_teacher", "config": {"lr": 0.1, "widths": (1, 2)}, "inputs": {}}
    return artifact.finish(
        folder, **(facts | {"meta": {"accuracy": 0.5}, "hardware": "cpu"} | changes), seconds=seconds
    )


def test_a_finished_artifact_reads_back_the_same(tmp_path: Path) -> None:
    written = make(tmp_path / "a")
    found = artifact.read(tmp_path / "a", kind="teacher")
    assert sorted(found.files) == ["data.bin", "sub/empty.json"]
    assert found.files["data.bin"]["bytes"] == 256
    assert found.fingerprint == written.fingerprint
    assert found.run["versions"]["torch"]
    assert artifact.is_finished(tmp_path / "a")


def test_fingerprint_is_of_the_content_only(tmp_path: Path) -> None:
    one = make(tmp_path / "a")
    assert make(tmp_path / "b", seconds=99.0, hardware="a fast one").fingerprint == one.fingerprint
    assert make(tmp_path / "c", meta={"accuracy": 0.6}).fingerprint != one.fingerprint
    assert make(tmp_path / "d", inputs={"data": one}).fingerprint != one.fingerprint
    write_files(tmp_path / "e")
    (tmp_path / "e" / "more.txt").write_text("more")
    assert make(tmp_path / "e").fingerprint != one.fingerprint


def test_keys_that_json_sorts_otherwise_do_not_change_the_fingerprint(tmp_path: Path) -> None:
    written = make(tmp_path, meta={"counts": {10: 1, 9: 2}})
    assert artifact.read(tmp_path).fingerprint == written.fingerprint


def test_seconds_of_the_steps_before_are_collected(tmp_path: Path) -> None:
    data = make(tmp_path / "data", kind="dataset", step="prepare_data", seconds=3.0)
    teacher = make(tmp_path / "teacher", inputs={"data": tmp_path / "data"}, seconds=4.0)
    assert teacher.inputs == {"data": data.fingerprint}
    assert teacher.run["steps"] == {"prepare_data": 3.0, "train_teacher": 4.0}


def test_peaks_of_memory_are_collected_and_are_no_content(tmp_path: Path) -> None:
    make(tmp_path / "data", kind="dataset", step="prepare_data", peak={"ram": 7})
    teacher = make(tmp_path / "teacher", inputs={"data": tmp_path / "data"}, peak={"ram": 9, "gpu": 2})
    assert teacher.run["peaks"] == {"prepare_data": {"ram": 7}, "train_teacher": {"ram": 9, "gpu": 2}}
    other = make(tmp_path / "other", inputs={"data": tmp_path / "data"}, peak={"ram": 1})
    assert other.fingerprint == teacher.fingerprint


def test_seconds_of_several_artifacts_of_one_step_add_up(tmp_path: Path) -> None:
    first, second = make(tmp_path / "a", seconds=1.0), make(tmp_path / "b", seconds=2.5, meta={"accuracy": 0.7})
    again = make(tmp_path / "a2", seconds=1.0)
    found = make(tmp_path / "c", step="gather_teachers", inputs={"a": first, "b": second, "again": again})
    assert found.run["steps"] == {"train_teacher": 3.5, "gather_teachers": 1.5}


def test_an_artifact_inside_counts_by_its_content(tmp_path: Path) -> None:
    prints = []
    for name, seconds, accuracy in (("a", 1.0, 0.5), ("b", 2.0, 0.5), ("c", 1.0, 0.6)):
        make(tmp_path / name / "inner", seconds=seconds, meta={"accuracy": accuracy})
        (tmp_path / name / "inner" / "data.bin").write_bytes(b"1" if accuracy == 0.5 else b"2")
        prints.append(make(tmp_path / name).fingerprint)
    assert prints[0] == prints[1] != prints[2]


def test_the_code_version_is_noted_but_not_content(tmp_path: Path) -> None:
    written = make(tmp_path)
    assert written.code_version == code_version()
    assert dataclasses.replace(written, code_version="another").fingerprint == written.fingerprint


def flip(folder: Path) -> None:
    data = bytearray((folder / "data.bin").read_bytes())
    data[100] ^= 1
    (folder / "data.bin").write_bytes(data)


def edit(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / MANIFEST
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


OUTSIDE = {"../secret": {"bytes": 1, "sha256": "0" * 64}}
CORRUPTIONS: dict[str, tuple[Callable[[Path], object], str, str]] = {  # what is done, the file named, the reason
    "flipped byte": (flip, "data.bin", "sha256"),
    "truncated file": (lambda a: os.truncate(a / "data.bin", 10), "data.bin", "has 10 bytes"),
    "missing file": (lambda a: (a / "sub" / "empty.json").unlink(), "empty.json", "is missing"),
    "file turned folder": (lambda a: ((a / "data.bin").unlink(), (a / "data.bin").mkdir()), "data.bin", "bytes"),
    "newer schema": (edit(schema=99), MANIFEST, "upgrade distillery"),
    "wrong kind": (edit(kind="labels"), MANIFEST, "'labels'"),
    "no manifest": (lambda a: (a / MANIFEST).unlink(), MANIFEST, "has not finished"),
    "no folder": (lambda a: a.rename(a.with_name("gone")), MANIFEST, "has not finished"),
    "cut manifest": (lambda a: os.truncate(a / MANIFEST, 100), MANIFEST, "not readable JSON"),
    "binary manifest": (lambda a: (a / MANIFEST).write_bytes(b"\xff\xfe\x00"), MANIFEST, "not readable JSON"),
    "a list": (lambda a: (a / MANIFEST).write_text("[]"), MANIFEST, "object"),
    "deep manifest": (lambda a: (a / MANIFEST).write_text("[" * 100_000), MANIFEST, "not readable JSON"),
    "not a number": (edit(meta={"accuracy": float("nan")}), MANIFEST, "NaN"),
    "field of a wrong type": (edit(files=3), MANIFEST, "files"),
    "file outside": (edit(files=OUTSIDE), MANIFEST, "../secret"),
}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corrupt_artifact_is_refused_with_the_file_named(name: str, tmp_path: Path) -> None:
    damage, file, reason = CORRUPTIONS[name]
    make(tmp_path / "a")
    artifact.read(tmp_path / "a")
    damage(tmp_path / "a")
    with pytest.raises(CorruptArtifact) as caught:
        artifact.read(tmp_path / "a", kind="teacher")
    assert file in str(caught.value)
    assert reason in str(caught.value)


def test_mutated_manifests_never_give_another_error(tmp_path: Path) -> None:
    make(tmp_path)
    good = (tmp_path / MANIFEST).read_bytes()
    dice, refused = random.Random(0), 0
    for _ in range(500):
        data = bytearray(good)
        for _ in range(dice.randint(1, 4)):
            at = dice.randrange(len(data))
            data[at : at + dice.randint(0, 3)] = dice.randbytes(dice.randint(0, 3))
        try:
            assert len(artifact.parse(bytes(data), "x").fingerprint) == 64
        except CorruptArtifact:
            refused += 1
    assert refused > 300


def test_unchanged_files_are_hashed_once(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"one")
    os.utime(path, ns=(HOUR_AGO, HOUR_AGO))
    first = sha256_of(path)
    path.write_bytes(b"two")
    os.utime(path, ns=(HOUR_AGO, HOUR_AGO))  # as if nothing had happened: only reading again would tell
    assert sha256_of(path) == first
    os.utime(path, ns=(HOUR_AGO + 1, HOUR_AGO + 1))
    assert sha256_of(path) != first


def test_a_file_changed_just_after_hashing_is_hashed_again(tmp_path: Path) -> None:
    path = tmp_path / "f"
    for text in (b"one", b"two", b"six"):
        path.write_bytes(text)
        os.utime(path)
        assert sha256_of(path) == hashlib.sha256(text).hexdigest()


def full_disk(path: Path) -> None:
    """Let the next atomic write of `path` by this thread meet a device that is always full."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.part").symlink_to("/dev/full")


def test_finish_on_a_full_disk_says_so_and_is_not_finished(tmp_path: Path) -> None:
    write_files(tmp_path)
    full_disk(tmp_path / MANIFEST)
    with pytest.raises(StoreError, match=r"full .*free space") as caught:
        make(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert not artifact.is_finished(tmp_path)
    make(tmp_path)
    artifact.read(tmp_path)


def test_a_full_disk_keeps_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "f"
    write_atomic(path, b"old")
    full_disk(path)
    with pytest.raises(StoreError, match="full"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_a_place_that_cannot_be_written_is_the_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="choose a folder"):
        artifact.begin(tmp_path / "file" / "out")


def test_begin_takes_back_an_earlier_manifest(tmp_path: Path) -> None:
    make(tmp_path)
    artifact.begin(tmp_path)
    assert not artifact.is_finished(tmp_path)
    assert (tmp_path / "data.bin").exists()


KILLED = """
import os, signal, sys
sys.path[:0] = {path!r}
os.replace = lambda *names: os.kill(os.getpid(), signal.SIGKILL)
from pathlib import Path
from distillery import artifact
artifact.finish(Path({folder!r}), kind="teacher", step="s", config={{}}, inputs={{}}, meta={{}}, seconds=1, hardware="")
"""


def test_a_kill_between_files_and_manifest_is_not_finished(tmp_path: Path) -> None:
    make(tmp_path)
    code = KILLED.format(path=sys.path, folder=str(tmp_path))
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    assert not artifact.is_finished(tmp_path)
    with pytest.raises(CorruptArtifact, match="has not finished"):
        artifact.read(tmp_path)
    assert "data.bin" in make(tmp_path).files
    assert len(artifact.read(tmp_path).files) == 2, "what the killed process left must not be listed"


def test_leftovers_of_dead_processes_go_when_they_are_old(tmp_path: Path) -> None:
    old, young = tmp_path / "f.1-2.part", tmp_path / "f.3-4.part"
    for part in (old, young):
        part.write_bytes(b"half")
    os.utime(old, (1, 1))
    write_atomic(tmp_path / "f", b"whole")
    assert not old.exists()
    assert young.exists(), "a part may belong to a process that is still writing"


def test_values_json_cannot_hold_are_named(tmp_path: Path) -> None:
    with pytest.raises(DistilleryError, match="accuracy"):
        make(tmp_path, meta={"accuracy": float("nan")})


def test_a_peak_of_memory_is_of_the_step_alone() -> None:
    """In a process of its own: 200 MB given back before the watch do not count, 100 MB after it do."""
    code = """if True:
        from distillery import device
        before = bytearray(b"x" * 200_000_000)
        del before
        device.watch_memory(None)
        start = device.peak_memory(None)["ram"]
        held = bytearray(100_000_000)
        held[::4096] = b"x" * len(held[::4096])
        del held
        print(device.peak_memory(None)["ram"] - start)
    """
    grown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert 80e6 < int(grown) < 130e6
