"""Labels: both modes give one student, the file holds what it says, and a killed process loses nothing."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from distillery import labels, nets, recipes, student
from distillery.config import LabelConfig, Recipe, Student
from distillery.data import label_file
from distillery.data.batches import Batch, Batches, slices
from distillery.data.synthetic import Synthetic
from distillery.device import choose
from distillery.errors import CorruptArtifact
from distillery.rng import generator
from distillery.teacher import Card, Ensemble, Frozen
from distillery.track import Track

CPU = choose("cpu")
STORED, LIVE = LabelConfig(mode="stored"), LabelConfig()
QUICK = {"epochs": 3, "batch": 4, "evaluate_every": 3}


def teacher(classes: int = 5, side: int = 8) -> Frozen:
    """A small teacher whose BatchNorm has seen something."""
    torch.manual_seed(0)
    net = nets.build("convnet2", classes, side, width=8)
    net(torch.randn(64, 3, side, side))
    card = Card(
        "convnet2", {"width": 8}, [str(c) for c in range(classes)], side, [0.5] * 3, [0.25] * 3, 1.0, 1.0, [], []
    )
    return Frozen(net, card, CPU)


def several() -> Ensemble:
    """Two teachers of one opinion less than two."""
    first, second = teacher(), teacher()
    with torch.no_grad():
        for value in second.net.parameters():
            value.mul_(-0.5)
    return Ensemble([first, second])


def images(classes: int = 5, ipc: int = 3, side: int = 8) -> Synthetic:
    """Noise, each class a little brighter than the one before."""
    noise = torch.randint(0, 100, (classes * ipc, 3, side, side), generator=generator(0, "synthetic"))
    targets = torch.arange(classes).repeat_interleave(ipc)
    return Synthetic((noise + 30 * targets[:, None, None, None]).to(torch.uint8), targets)


def one(preset: str = "rded", **changes: Any) -> Student:
    """A student of the toy set."""
    recipe = recipes.resolve(preset, QUICK | changes, "cifar10", 5, 3, 8, "convnet2")
    return Student(net="convnet2", net_options={"width": 4}, recipe=recipe)


def relabel(
    out: Path,
    students: list[Student],
    config: LabelConfig,
    track: Track | None = None,
    seed: int = 7,
    eye: Frozen | None = None,
) -> dict[str, Any]:
    """Labels of the toy set."""
    return labels.relabel(
        students, images(), eye or teacher(), seed=seed, config=config, out=out, track=track or Track.quiet()
    )


def source(folder: Path, choice: Student, index: int = 0, seed: int = 7) -> labels.Source:
    """The labels of one toy student."""
    return labels.open_source(folder, index, choice.recipe, images(), teacher(), seed)


def all_labels(found: labels.Source, recipe: Recipe, seed: int = 7) -> torch.Tensor:
    """Every label of a run in order of presentation, [epochs * N, C]."""
    batches = Batches(images().images_u8, images().labels, recipe, seed, ((0.5,) * 3, (0.25,) * 3), CPU)
    steps = [(e, s) for e in range(recipe.epochs) for s in range(len(batches.slices))]
    return torch.cat([found(e, batches.get(e, s)) for e, s in steps])


@pytest.mark.parametrize("eye", [teacher, several])
@pytest.mark.parametrize(
    ("preset", "changes"),
    [
        ("rded", {}),
        ("sre2lpp", {"batch": 5}),
        ("dwa", {}),
        ("edc", {}),
        ("gvbsm", {}),
        ("rded", {"views": {"dsa": "color_crop_cutout_flip_scale_rotate", "shuffle_patches": 2}}),
    ],
)
def test_stored_and_on_the_fly_give_the_same_student(
    tmp_path: Path, preset: str, changes: dict[str, Any], eye: Callable[[], Frozen]
) -> None:
    choice, outcomes, weights = one(preset, **changes), [], []
    for name, config in (("stored", STORED), ("live", LIVE)):
        folder = tmp_path / name
        folder.mkdir()
        relabel(folder, [choice], config, eye=eye())
        found = labels.open_source(folder, 0, choice.recipe, images(), eye(), 7)
        weights.append(all_labels(found, choice.recipe))
        outcomes.append(
            student.train(
                choice.net,
                choice.net_options,
                choice.recipe,
                images(),
                found,
                eye(),
                (images().images_u8, images().labels),
                seed=7,
                compute=CPU,
                track=Track.quiet(),
            )
        )
    assert weights[0].equal(weights[1])
    assert outcomes[0] == outcomes[1]
    assert weights[0].std() > 0.01


def test_labels_are_fp16_roundings_of_the_teacher_on_the_view() -> None:
    choice, eye = one(), teacher()
    batches = Batches(images().images_u8, images().labels, choice.recipe, 7, (eye.mean, eye.std), CPU)
    batch = batches.get(1, 2)
    with torch.no_grad():
        expected = eye.net(batch.x_norm)
    found = labels.on_the_fly(eye, "eval")(1, batch)
    assert found.equal(expected.half().float())
    assert not found.equal(expected)


def test_card_and_sizes(tmp_path: Path) -> None:
    soft, hard = one("rded"), one("fair-hard")
    meta = relabel(tmp_path, [hard, soft], STORED)
    assert json.loads((tmp_path / "labels.json").read_text())["students"] == meta["students"]
    assert [entry["mode"] for entry in labels.entries(tmp_path)] == ["none", "stored"]
    first, second = meta["students"]
    assert (first["bytes"], first["fkd_bytes"]) == (0, 0)
    assert second["bytes"] == (tmp_path / "student-1.safetensors").stat().st_size == meta["label_bytes"]
    assert second["bytes"] - labels.stored_bytes(15, 3, 5, 0) < 128
    assert labels.stored_bytes(15, 3, 5, 0) == 15 * 3 * 5 * 2
    assert labels.stored_bytes(15, 3, 5, 2) == 15 * 3 * (3 * 2 + 2)
    assert labels.stored_bytes(15, 3, 1000, 2) == 15 * 3 * (3 * 2 + 2 * 4)
    assert second["fkd_bytes"] == meta["fkd_bytes"] == 15 * 3 * (5 * 2 + 25)
    assert (second["epochs"], second["batch"], second["steps"], second["seed"]) == (3, 4, 12, 7)
    assert not list(tmp_path.glob("*.part"))
    live = tmp_path / "live"
    live.mkdir()
    assert relabel(live, [hard, soft], LIVE)["label_bytes"] == 0
    assert [p.name for p in live.iterdir()] == ["labels.json"]


def test_fkd_size_matches_the_published_one() -> None:
    published = {10: 5.67, 50: 28.33, 200: 113.33}  # GiB, ImageNet-1K, 300 epochs
    for ipc, size in published.items():
        assert labels.fkd_bytes(ipc * 1000, 300, 1000) / 2**30 == pytest.approx(size, rel=0.005)


def test_equal_seeds_give_equal_files(tmp_path: Path) -> None:
    contents = []
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        (tmp_path / name).mkdir()
        relabel(tmp_path / name, [one()], STORED, seed=seed)
        contents.append((tmp_path / name / "student-0.safetensors").read_bytes())
    assert contents[0] == contents[1] != contents[2]


def test_top_k_keeps_the_largest_and_spreads_the_rest() -> None:
    logits, warm = torch.randn(6, 9, generator=generator(0, "logits")) * 5, 4.0
    values, places = labels.compress(logits, 3, warm)
    back = labels.expand(values, places, 9)
    exact, found = F.softmax(logits / warm, 1), F.softmax(back / warm, 1)
    kept = torch.zeros(6, 9, dtype=torch.bool).scatter(1, logits.topk(3, 1).indices, True)
    assert torch.allclose(found[kept], exact[kept], atol=1e-6)
    rest = (exact * ~kept).sum(1, keepdim=True) / 6
    assert torch.allclose(found[~kept].view(6, 6), rest.expand(6, 6), atol=1e-6)
    assert back[kept].equal(logits[kept])


def test_top_k_is_read_back_from_the_file(tmp_path: Path) -> None:
    choice = one()
    relabel(tmp_path, [choice], LabelConfig(mode="stored", top_k=2))
    found = all_labels(source(tmp_path, choice), choice.recipe)
    exact = all_labels(labels.on_the_fly(teacher(), "eval"), choice.recipe)
    values, places = labels.compress(exact, 2, 20.0)
    assert torch.allclose(found, labels.expand(values.half().float(), places, 5), atol=2e-3)
    assert found.gather(1, places).equal(exact.gather(1, places))
    meta = relabel(tmp_path, [choice], LabelConfig(mode="stored", top_k=5))  # all of them: nothing to spread
    assert meta["students"][0]["top_k"] == 0
    assert all_labels(source(tmp_path, choice), choice.recipe).equal(exact)


def test_top_k_on_the_fly_is_said_to_have_no_effect(tmp_path: Path) -> None:
    said: list[dict[str, Any]] = []
    relabel(tmp_path, [one()], LabelConfig(top_k=3), Track(said.append))
    assert [e["text"] for e in said if e["event"] == "note"] == [
        "labels.top_k 3 has no effect with labels.mode on_the_fly"
    ]


def test_teacher_modes() -> None:
    eye, x_norm = teacher(), torch.randn(7, 3, 8, 8, generator=generator(0, "x"))
    before = {name: value.clone() for name, value in eye.net.state_dict().items()}
    train, halves = (labels.teacher_logits(eye, x_norm, mode) for mode in ("train", "bssl"))
    assert not eye.net.training
    assert all(value.equal(before[name]) for name, value in eye.net.state_dict().items())
    assert labels.teacher_logits(eye, x_norm, "eval").equal(eye.logits(x_norm))
    eye.net.train()
    with torch.no_grad():
        assert train.equal(eye.net(x_norm))
        assert halves.equal(torch.cat([eye.net(x_norm[:4]), eye.net(x_norm[4:])]))
    assert not train.equal(halves)


@pytest.mark.parametrize("mode", ["eval", "train", "bssl"])
def test_labels_of_several_teachers_are_the_mean_of_each_ones(mode: str) -> None:
    both, x_norm = several(), torch.randn(7, 3, 8, 8, generator=generator(0, "x"))
    first, second = (labels.teacher_logits(member, x_norm, mode) for member in both.members)
    assert not torch.allclose(first, second, atol=0.01)
    assert labels.teacher_logits(both, x_norm, mode).equal((first + second) / 2)
    assert not any(module.training for module in both.net.modules())


class Killed(Exception):
    """Stands for SIGKILL."""


class Dying(Track):
    """Checkpoints at every step and dies after some."""

    def __init__(self, folder: Path, lives: int) -> None:
        super().__init__(folder=folder, every=0.0)
        self.lives = lives

    def due(self) -> bool:
        self.lives -= 1
        if self.lives < 0:
            raise Killed
        return super().due()


@pytest.mark.parametrize("lives", [0, 1, 5, 12, 14, 20])
def test_killed_relabel_continues_to_the_same_bytes(tmp_path: Path, lives: int) -> None:
    students = [one(), one("dwa"), one("fair-hard")]
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    relabel(tmp_path / "whole", students, STORED)
    with pytest.raises(Killed):
        relabel(tmp_path / "killed", students, STORED, Dying(tmp_path / "kept", lives))
    second = Dying(tmp_path / "kept", 1000)
    relabel(tmp_path / "killed", students, STORED, second)
    assert 1000 - second.lives == 24 - lives  # nothing is labelled again
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "killed" / path.name).read_bytes(), path.name


def test_half_written_labels_of_another_seed_are_not_continued(tmp_path: Path) -> None:
    (tmp_path / "clean").mkdir()
    with pytest.raises(Killed):
        relabel(tmp_path, [one()], STORED, Dying(tmp_path / "kept", 6), seed=1)
    relabel(tmp_path, [one()], STORED, Track(folder=tmp_path / "kept"), seed=2)
    relabel(tmp_path / "clean", [one()], STORED, seed=2)
    name = "student-0.safetensors"
    assert (tmp_path / name).read_bytes() == (tmp_path / "clean" / name).read_bytes()


@pytest.mark.parametrize(
    ("changes", "seed", "message"),
    [
        ({"epochs": 4}, 7, r"student 0 were made for epochs 3, but the student is trained with 4; run relabel again"),
        ({"views": {"flip": 0.0}}, 7, "were made for recipe"),
        ({}, 8, "made for seed 7"),
    ],
)
def test_labels_of_other_views_are_refused(tmp_path: Path, changes: dict[str, Any], seed: int, message: str) -> None:
    relabel(tmp_path, [one()], STORED)
    with pytest.raises(CorruptArtifact, match=message):
        source(tmp_path, one(**changes), seed=seed)


def test_missing_labels_are_named(tmp_path: Path) -> None:
    with pytest.raises(CorruptArtifact, match=r"labels\.json: not a labels artifact"):
        source(tmp_path, one())
    relabel(tmp_path, [one()], STORED)
    with pytest.raises(CorruptArtifact, match="labels of 1 students, none of number 1"):
        source(tmp_path, one(), index=1)
    (tmp_path / "student-0.safetensors").unlink()
    with pytest.raises(CorruptArtifact, match=r"student-0\.safetensors: the stored labels are missing"):
        source(tmp_path, one())


def test_label_file_is_plain_safetensors(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    arrays, fresh = label_file.create(tmp_path / "x.safetensors", 3, 2, 300, 4)
    arrays["logits"][1, 2], arrays["places"][1, 2] = [1, 2, 3, 4, 5], [9, 299, 0, 7]
    arrays["logits"].flush()
    arrays["places"].flush()
    tensors = load_file(tmp_path / "x.safetensors")
    assert fresh
    assert tensors["logits"].shape == (2, 3, 5)
    assert tensors["places"][1, 2].tolist() == [9, 299, 0, 7]
    assert label_file.create(tmp_path / "x.safetensors", 3, 2, 300, 4)[1] is False
    assert label_file.create(tmp_path / "x.safetensors", 3, 2, 301, 0)[1] is True


def test_batches_show_every_image_once_in_even_parts() -> None:
    assert [p.stop - p.start for p in slices(51, 50)] == [25, 26]
    assert [p.stop - p.start for p in slices(500, 256)] == [250, 250]
    assert [(p.start, p.stop) for p in slices(7, 100)] == [(0, 7)]
    for n in range(1, 40):
        parts = slices(n, 6)
        assert [i for p in parts for i in range(p.start, p.stop)] == list(range(n))
        assert len(parts) == math.ceil(n / 6)
        assert max(p.stop - p.start for p in parts) <= 6


def test_views_and_order_depend_on_the_address_alone() -> None:
    plain = one(views={"mix": "none", "flip": 0.0}).recipe

    def batches(recipe: Recipe, seed: int = 7) -> Batches:
        return Batches(images().images_u8, images().labels, recipe, seed, ((0.0,) * 3, (1.0,) * 3), CPU)

    def shown(batch: Batch) -> list[int]:
        pixels = (batch.x_norm * 255).round().to(torch.uint8)
        return [int((images().images_u8 == p).flatten(1).all(1).nonzero()) for p in pixels]

    run = batches(plain)
    epoch = [shown(run.get(2, s)) for s in range(4)]
    assert sorted(i for part in epoch for i in part) == list(range(15))
    assert shown(batches(plain).get(2, 3)) == epoch[3]  # without having drawn anything before
    assert all(run.get(2, 1).targets == images().labels[epoch[1]])
    assert [shown(run.get(1, s)) for s in range(4)] != epoch
    assert [shown(batches(plain, 8).get(2, s)) for s in range(4)] != epoch
    mixed = batches(one().recipe)
    assert mixed.get(0, 0).x_norm.equal(batches(one().recipe).get(0, 0).x_norm)
    assert not mixed.get(0, 0).x_norm.equal(mixed.get(0, 1).x_norm)
