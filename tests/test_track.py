"""Checkpoints are atomic and honest; progress is throttled; NaN stops a loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from distillery import track as track_module
from distillery.errors import NonFiniteLoss, UserError
from distillery.track import FILE, Track


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    track = Track(folder=tmp_path, every=0.0)
    assert track.load() is None
    state = {"a": torch.arange(6).reshape(2, 3).t(), "b": torch.tensor(1.5)}
    track.save(state, {"step": 3, "curve": [[1, 0.5]]})
    tensors, values = Track(folder=tmp_path).load() or ({}, {})
    assert torch.equal(tensors["a"], state["a"])
    assert values == {"step": 3, "curve": [[1, 0.5]]}
    track.clear()
    assert Track(folder=tmp_path).load() is None


@pytest.mark.parametrize("damage", [b"", b"\xff" * 40, b"\x08\x00\x00\x00\x00\x00\x00\x00{}      "])
def test_a_damaged_checkpoint_is_said_and_not_believed(tmp_path: Path, damage: bytes) -> None:
    said: list[dict[str, Any]] = []
    (tmp_path / FILE).write_bytes(damage)
    assert Track(said.append, tmp_path).load() is None
    assert "unreadable" in said[0]["text"]


def test_a_child_keeps_its_own_checkpoint(tmp_path: Path) -> None:
    track = Track(folder=tmp_path)
    track.child("one").save({}, {"x": 1})
    assert track.load() is None
    assert (track.child("one").load() or (0, 0))[1] == {"x": 1}
    assert track.child("two").load() is None


class Far:
    """What a store was given, and what it was told to forget."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.dropped: list[str] = []

    def keep(self, name: str, path: Path) -> None:
        self.files[name] = path.read_bytes()

    def drop(self, name: str) -> None:
        self.dropped.append(name)


def test_a_store_gets_every_checkpoint_under_its_place(tmp_path: Path) -> None:
    far = Far()
    track = Track(None, tmp_path, 0.0, far)
    part = track.child("part").child("inner")
    track.save({}, {"step": 8})
    part.send({"rows": torch.zeros(3)}, {})
    part.clear()
    assert set(far.files) == {FILE, f"part/inner/{FILE}"}
    assert (tmp_path / FILE).read_bytes() == far.files[FILE]
    assert not (tmp_path / "part" / "inner" / FILE).exists()
    assert far.dropped == [f"part/inner/{FILE}"]


def test_what_is_only_for_a_store_is_not_written_without_one(tmp_path: Path) -> None:
    track = Track(None, tmp_path, 0.0)
    track.send({"rows": torch.zeros(3)}, {})
    assert not track.is_sent
    assert list(tmp_path.iterdir()) == []


def test_slow_checkpoints_come_less_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A state that takes 1 s to write waits 50 s, one of 10 s twice the interval and no longer."""
    now = [0.0]
    monkeypatch.setattr(track_module.time, "monotonic", lambda: now[0])
    for cost, wait in ((0.1, 30.0), (1.0, 50.0), (10.0, 60.0)):
        track = Track(folder=tmp_path, every=30.0)
        monkeypatch.setattr(Track, "_write", lambda *_, cost=cost: now.__setitem__(0, now[0] + cost))
        track.save({}, {})
        now[0] += wait - 0.01
        assert not track.due()
        now[0] += 0.02
        assert track.due()


def test_progress_is_throttled_but_the_last_line_always_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[dict[str, Any]] = []
    now = iter(range(1000, 2000))
    monkeypatch.setattr(track_module.time, "monotonic", lambda: next(now) / 100)  # a line in 10 ms
    track = Track(said.append)
    for done in range(1, 101):
        track.log(done, 100, loss=0.5)
    assert [event["done"] for event in said] == [1, 100]
    assert said[-1]["eta"] == 0 or said[-1]["eta"] is None


def test_a_loss_that_is_no_number_names_step_and_checkpoint(tmp_path: Path) -> None:
    track = Track(folder=tmp_path)
    track.finite(1.0, 5, lr=0.1)
    with pytest.raises(NonFiniteLoss, match=r"nan at step 7 \(lr 0.1\); no checkpoint"):
        track.finite(float("nan"), 7, lr=0.1)
    track.save({}, {})
    with pytest.raises(NonFiniteLoss, match=FILE):
        track.finite(float("inf"), 7, lr=0.1)


def test_an_unwritable_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="file"):
        Track(folder=tmp_path / "file").save({}, {})
