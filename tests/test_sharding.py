"""Shards: pieces of a cell, made alone, are the whole to the byte; a lost, doubled, foreign or failed one is told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from distillery import artifact, experiment, methods, run, steps
from distillery.data import synthetic
from distillery.data.synthetic import Synthetic
from distillery.errors import CorruptArtifact, DistilleryError, UserError

TEXT = """
name: toy
dataset: {name: digits, per_class: 12}
teacher: {net: convnet1, net_options: {width: 4}, epochs: 1, batch: 50, flip: 0.0, lr: 0.05}
methods:
  - {method: rded, ipc: [2], options: {mipc: 12}, shards: 3}
  - {method: random, ipc: [2]}
students:
  - {net: convnet1, net_options: {width: 4}, recipe: {preset: fair-soft, epochs: 1}}
"""


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTILLERY_LOG", "quiet")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with shards."""
    out = tmp_path_factory.mktemp("sharded")
    assert run.run(TEXT, str(out)).failures == []
    return out


def inputs(out: Path) -> tuple[dict[str, Any], Path, Path]:
    """The cell with shards, the data and the teachers."""
    (data,), (teachers,) = out.glob("1-data/*"), out.glob("2-teachers/all-*")
    return steps.plan(TEXT)[0], data, teachers


def pieces(out: Path) -> list[Path]:
    """The finished pieces."""
    return sorted(path.parent for path in out.glob("3-synthetic/*-piece*/manifest.json"))


def test_cut_gives_consecutive_and_nearly_equal_shares() -> None:
    groups = [methods.Group((cls,), range(1)) for cls in range(10)]
    found = methods.cut("rded", groups, 4)
    assert [group for share in found for group in share] == groups
    assert [len(share) for share in found] == [2, 3, 2, 3]
    assert methods.cut("rded", groups, 1) == [groups]
    with pytest.raises(UserError, match="shards 11: rded .* 10 groups, .* lower shards to at most 10"):
        methods.cut("rded", groups, 11)


def test_too_many_shards_are_refused_before_anything_is_started() -> None:
    with pytest.raises(UserError, match=r"methods\[0\] \(rded, ipc 2\): shards 11: .* 10 groups"):
        experiment.check(TEXT.replace("shards: 3", "shards: 11"))


def test_pieces_stay_small_enough_for_kfp() -> None:
    cell, _ = steps.plan(TEXT)
    found = steps.plan_pieces(steps.plan(TEXT))
    assert [(p["id"], p["shard"], p["shards"]) for p in found[:3]] == [(cell["id"], i, 3) for i in range(3)]
    assert [(p["shard"], p["shards"]) for p in found[3:]] == [(0, 1)]
    assert all(p["students"] == [] for p in found)
    many = TEXT.replace("ipc: [2], options: {mipc: 12}, shards: 3", f"ipc: [1], seeds: {list(range(30))}, shards: 10")
    with pytest.raises(UserError, match=r"301 pieces of \d+ bytes .* lower shards"):
        experiment.check(many)


def test_a_run_in_shards_equals_one_without(sharded: Path, tmp_path: Path) -> None:
    assert run.run(TEXT.replace(", shards: 3", ""), str(tmp_path)).failures == []
    for folder in ("3-synthetic", "4-labels", "5-students"):
        here, there = (
            {p.parent.name: artifact.read(p.parent) for p in out.glob(f"{folder}/*/manifest.json")}
            for out in (sharded, tmp_path)
        )
        here = {name: manifest for name, manifest in here.items() if "-piece" not in name}
        assert {k: m.fingerprint for k, m in here.items()} == {k: m.fingerprint for k, m in there.items()}
        assert {k: (m.meta, m.files) for k, m in here.items()} == {k: (m.meta, m.files) for k, m in there.items()}
    assert len(pieces(sharded)) == 3


def test_pieces_come_back_in_any_order(sharded: Path, tmp_path: Path) -> None:
    cell, data, teachers = inputs(sharded)
    whole = steps.synthesize(cell, data, teachers, tmp_path / "whole")
    made = pieces(sharded)
    found = steps.gather_pieces(cell, data, teachers, [made[2], made[0], made[1]], tmp_path / "gathered")
    assert found.fingerprint == whole.fingerprint
    name = synthetic.FILE
    assert (tmp_path / "gathered" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    spent = sum(artifact.read(piece).run["seconds"] for piece in made)
    assert found.run["seconds"] >= spent
    bundled = steps.bundle_pieces(made, tmp_path / "bundle")
    assert bundled.meta == {"pieces": 3}
    own = list((tmp_path / "bundle" / cell["id"]).iterdir())
    again = steps.gather_pieces(cell, data, teachers, own, tmp_path / "from bundle")
    assert again.fingerprint == whole.fingerprint


def test_groups_that_cross_classes_come_back_in_order() -> None:
    """Two groups, each with one image of every class, as methods with BatchNorm over classes have them."""
    colour = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1).expand(6, 3, 8, 8).contiguous()
    labels, place = torch.tensor([0, 0, 1, 1, 2, 2]), torch.arange(6.0)
    groups = [methods.Group((0, 1, 2), range(slot, slot + 1)) for slot in range(2)]
    parts = [Synthetic(colour[i::2], labels[i::2], {"place": place[i::2]}) for i in (1, 0)]
    places = [p for group in reversed(groups) for p in methods.in_order([group])]
    found = synthetic.join(parts, places)
    assert torch.equal(found.images_u8, colour)
    assert torch.equal(found.labels, labels)
    assert torch.equal(found.extras["place"], place)
    with pytest.raises(CorruptArtifact, match="not the 3 images expected; make the parts again"):
        synthetic.join(parts, places[:3])


def test_only_the_lost_piece_is_made_again(sharded: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(sharded, out)
    for path in [*out.glob("3-synthetic/rded*"), *out.glob("[45]-*/rded*")]:
        if "-piece" not in path.name or "-piece1" in path.name:
            shutil.rmtree(path)
    before = {path: (path / "manifest.json").stat().st_mtime_ns for path in pieces(out)}
    assert run.run(TEXT, str(out)).failures == []
    after = {path: (path / "manifest.json").stat().st_mtime_ns for path in pieces(out)}
    assert len(before) == 2
    assert len(after) == 3
    assert {path: after[path] for path in before} == before


def test_a_finished_set_needs_no_pieces(sharded: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(sharded, out)
    for path in pieces(out):
        shutil.rmtree(path)
    assert run.run(TEXT, str(out)).failures == []
    assert pieces(out) == []


@pytest.mark.parametrize(
    ("choose", "said"),
    [
        (lambda made, other: made[:2], r"pieces 0 to 2, \[2\] are missing and none are there twice"),
        (lambda made, other: [*made, made[1]], r"none are missing and \[1\] are there twice"),
        (lambda made, other: [made[0], other, made[2]], r"piece 1 of 3 of rded-ipc2-seed1.*of rded-ipc2-seed0"),
        (lambda made, other: [*made[:2], made[0].parent.parent / "data"], r"dataset of prepare_data, not a piece"),
    ],
)
def test_wrong_pieces_are_told(sharded: Path, tmp_path: Path, choose: Any, said: str) -> None:
    cell, data, teachers = inputs(sharded)
    second = steps.plan(TEXT.replace("shards: 3", "shards: 3, seeds: [1]"))[0]
    other, made = tmp_path / "other", pieces(sharded)
    if "seed1" in said:
        steps.synthesize_piece(steps.pieces(second)[1], data, teachers, other)
    folders = [data if path.name == "data" else path for path in choose(made, other)]
    strict = cell | {"stop_on_failure": True}
    with pytest.raises(CorruptArtifact, match=said):
        steps.gather_pieces(strict, data, teachers, folders, tmp_path / "out")
    assert steps.gather_pieces(cell, data, teachers, folders, tmp_path / "out").kind == "failure"


def test_a_doubled_piece_is_refused_by_the_bundle(sharded: Path, tmp_path: Path) -> None:
    made = pieces(sharded)
    with pytest.raises(CorruptArtifact, match="piece 0 of 3 of rded-ipc2-seed0.* is there already"):
        steps.bundle_pieces([*made, made[0]], tmp_path / "bundle")


def test_a_failed_piece_is_its_cells_failure(sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cell, data, teachers = inputs(sharded)
    broken = methods.find("rded")
    made = []
    for piece in steps.pieces(cell):
        made.append(tmp_path / f"piece{piece['shard']}")
        with monkeypatch.context() as patch:
            if piece["shard"] == 1:
                patch.setattr(broken, "synthesize", lambda *_, **__: (_ for _ in ()).throw(DistilleryError("no luck")))
            steps.synthesize_piece(piece, data, teachers, made[-1])
    steps.bundle_pieces(made, tmp_path / "bundle")
    own = list((tmp_path / "bundle" / cell["id"]).iterdir())
    found = steps.gather_pieces(cell, data, teachers, own, tmp_path / "out")
    assert found.kind == "failure"
    told = json.loads((tmp_path / "out" / "failure.json").read_text())
    assert (told["step"], told["cell"]) == ("synthesize_piece", cell), "with the students, which a piece does not know"
    assert "no luck" in told["error"]
    assert steps.relabel(cell, tmp_path / "out", teachers, tmp_path / "labels").kind == "failure"
    steps.synthesize_piece(steps.pieces(cell)[1], data, teachers, made[1])
    assert steps.gather_pieces(cell, data, teachers, made, tmp_path / "out").kind == "synthetic"
