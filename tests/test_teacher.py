"""Teachers: one learns, resumes bit for bit, passes its gate or not, takes given weights; several stand as one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from distillery import nets, teacher
from distillery.config import TeacherConfig
from distillery.data.real import Real
from distillery.device import choose
from distillery.errors import CorruptArtifact, GateError, NonFiniteLoss, UserError
from distillery.nets import pretrained
from distillery.rng import generator
from distillery.track import Track

CPU = choose("cpu", "fp32")
SMALL: dict[str, Any] = {"net": "convnet2", "net_options": {"width": 8}, "batch": 20, "epochs": 4}
SMALL |= {"flip": 0.0, "lr": 0.05}


def stripes(count: int = 40) -> Real:
    """Three classes of 8 px images that differ in direction and colour, with noise."""
    images, labels = [], []
    for cls in range(3):
        base = torch.zeros(3, 8, 8)
        base[cls, ::2] = 160
        base[:, :, cls] += 60
        noise = torch.rand(count, 3, 8, 8, generator=generator("stripes", cls)) * 90
        images.append((base + noise).clamp(0, 255).to(torch.uint8))
        labels += [cls] * count
    x, y = torch.cat(images), torch.tensor(labels)
    return Real.of(x, y, classes=("red", "green", "blue"), val=(x[::4], y[::4]))


class Stop(Exception):
    """Stands for a kill."""


class Killed(Track):
    """A track that dies after its n-th checkpoint."""

    def __init__(self, folder: Path, after: int) -> None:
        super().__init__(folder=folder, every=0.0)
        self.left = after

    def save(self, tensors: dict[str, torch.Tensor], values: dict[str, Any]) -> None:
        super().save(tensors, values)
        self.left -= 1
        if self.left == 0:
            raise Stop


def test_it_learns() -> None:
    _, card = teacher.make(TeacherConfig(**SMALL), stripes(), CPU, Track.quiet())
    assert card.accuracy > 0.9, card.accuracy
    assert len(card.curve) == 4
    assert card.classes == ["red", "green", "blue"]


@pytest.mark.parametrize("schedule", ["onecycle", "cosine"])
def test_a_killed_training_ends_with_the_same_weights(tmp_path: Path, schedule: str) -> None:
    cfg, real = TeacherConfig(**SMALL, schedule=schedule), stripes()
    whole, card = teacher.make(cfg, real, CPU, Track.quiet())
    for after in (1, 9, 3):
        with pytest.raises(Stop):
            teacher.make(cfg, real, CPU, Killed(tmp_path, after))
    again, resumed = teacher.make(cfg, real, CPU, Track(folder=tmp_path, every=0.0))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), f"{name} differs after a resume"
    assert resumed == card


def test_stop_at_ends_early() -> None:
    _, card = teacher.make(TeacherConfig(**SMALL | {"epochs": 30}, stop_at=0.7), stripes(), CPU, Track.quiet())
    assert card.accuracy >= 0.7
    assert len(card.curve) < 30


def test_the_gate_stops_a_weak_teacher() -> None:
    cfg = TeacherConfig(**SMALL | {"lr": 1e-6, "epochs": 1}, min_accuracy=1.0)
    _, card = teacher.make(cfg, stripes(), CPU, Track.quiet())
    with pytest.raises(GateError, match=r"below teacher.min_accuracy 1.0"):
        teacher.gate(cfg, card)


def test_a_diverging_training_is_stopped() -> None:
    with pytest.raises(NonFiniteLoss, match=r"loss is .* at step \d+ .*lr"):
        teacher.make(TeacherConfig(**SMALL | {"lr": 1e30, "epochs": 2}), stripes(), CPU, Track.quiet())


def given(tmp_path: Path, **changes: Any) -> TeacherConfig:
    """A configuration with weights of a trained teacher whose class order is reversed."""
    net, _ = teacher.make(TeacherConfig(**SMALL), stripes(), CPU, Track.quiet())
    last = nets.classifier(net)
    with torch.no_grad():
        last.weight.copy_(last.weight.flip(0))
        last.bias.copy_(last.bias.flip(0))
    pretrained.save(net, tmp_path / "weights.safetensors")
    return TeacherConfig(**SMALL, weights=str(tmp_path / "weights.safetensors"), **changes)


def test_given_weights_in_another_class_order(tmp_path: Path) -> None:
    _, card = teacher.make(given(tmp_path, classes=("blue", "green", "red")), stripes(), CPU, Track.quiet())
    assert card.accuracy > 0.9


def test_given_weights_in_an_undeclared_class_order_are_refused(tmp_path: Path) -> None:
    cfg = given(tmp_path, expected_accuracy=0.99)
    _, card = teacher.make(cfg, stripes(), CPU, Track.quiet())
    with pytest.raises(GateError, match=r"another class order \(teacher.classes\)"):
        teacher.gate(cfg, card)


def test_given_weights_of_other_classes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="lack 1 of .* red"):
        teacher.make(given(tmp_path, classes=("blue", "green", "pink")), stripes(), CPU, Track.quiet())


def test_save_and_load_give_the_same_teacher(tmp_path: Path) -> None:
    net, card = teacher.make(TeacherConfig(**SMALL), stripes(), CPU, Track.quiet())
    teacher.save(tmp_path, net, card)
    frozen = teacher.load(tmp_path, CPU)
    x_norm = torch.randn(5, 3, 8, 8, generator=generator("x"))
    assert torch.equal(frozen.logits(x_norm), net.eval()(x_norm.contiguous(memory_format=torch.channels_last)))
    assert not any(p.requires_grad for p in frozen.net.parameters())
    (tmp_path / "teacher.json").write_text("{}")
    with pytest.raises(CorruptArtifact, match="teacher.json"):
        teacher.load(tmp_path, CPU)


def pair(tmp_path: Path) -> list[tuple[nn.Module, teacher.Card]]:
    """Two teachers saved side by side, as in a "teachers" artifact."""
    made = []
    for name, depth in (("a", 2), ("b", 1)):
        cfg = TeacherConfig(**SMALL | {"net": f"convnet{depth}", "epochs": 1})
        made.append(teacher.make(cfg, stripes(), CPU, Track.quiet()))
        (tmp_path / name).mkdir()
        teacher.save(tmp_path / name, *made[-1])
    teacher.save_statistics(tmp_path / "b", {"class_bn/mean": torch.arange(3.0)})
    return made


def test_several_teachers_are_the_mean_of_their_logits(tmp_path: Path) -> None:
    (first, one), (second, two) = pair(tmp_path)
    both = teacher.load(tmp_path, CPU, ("a", "b"))
    x_norm = torch.randn(5, 3, 8, 8, generator=generator("x")).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = (first.eval()(x_norm) + second.eval()(x_norm)) / 2
    assert torch.equal(both.logits(x_norm), expected)
    assert [member.card.net for member in both.members] == ["convnet2", "convnet1"]
    assert both.card.net == "convnet2+convnet1"
    assert both.card.accuracy == (one.accuracy + two.accuracy) / 2
    assert len(both.card.per_class) == 3
    assert (both.size, both.mean, both.std) == (8, tuple(one.mean), tuple(one.std))
    assert not any(p.requires_grad for p in both.net.parameters())
    with pytest.raises(NotImplementedError):
        both.net(x_norm)  # there is no such net: a method that wants one gets its members


def test_load_takes_the_named_ones_with_their_statistics(tmp_path: Path) -> None:
    pair(tmp_path)
    alone = teacher.load(tmp_path, CPU, ("b",))
    assert alone.members == (alone,)
    assert alone.statistics["class_bn/mean"].tolist() == [0, 1, 2]
    assert teacher.load(tmp_path, CPU, ("a",)).statistics == {}
    assert "class_bn/mean" in teacher.load(tmp_path, CPU, ("a", "b")).members[1].statistics
    (tmp_path / "b" / "statistics.safetensors").write_bytes(b"no")
    with pytest.raises(CorruptArtifact, match=r"statistics\.safetensors.*gather the teachers again"):
        teacher.load(tmp_path, CPU, ("b",))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"classes": ["red", "blue", "green"]}, "a and b differ in classes: .*'green', 'blue'.*'blue', 'green'"),
        ({"size": 16}, "a and b differ in size: 8 and 16"),
        ({"mean": [0.1, 0.2, 0.3]}, r"a and b differ in mean: .*0\.5.* and .*0\.1"),
        ({"std": [0.1, 0.2, 0.3]}, "a and b differ in std"),
    ],
)
def test_teachers_that_disagree_are_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    (_, one), (_, two) = pair(tmp_path)
    teacher.agree({"a": one, "b": two})
    with pytest.raises(UserError, match=said):
        teacher.agree({"a": one, "b": replace(two, **changes)})
