"""Students: losses by their formulas, the loop against a written-out one, resume bit for bit, honest accuracies."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distillery import labels, nets, recipes, student
from distillery.config import Recipe
from distillery.data.augment import evaluation_view
from distillery.data.batches import Batch, Batches
from distillery.data.synthetic import Synthetic
from distillery.device import Compute, choose
from distillery.errors import CorruptArtifact, NonFiniteLoss
from distillery.rng import derived_seed, generator
from distillery.student import Outcome, evaluation_epochs, loss_of
from distillery.teacher import Card, Frozen
from distillery.track import Track

CPU = choose("cpu")
SIDE, CLASSES = 8, 4
NORM = ((0.5,) * 3, (0.25,) * 3)


def labelled(n: int, name: str = "synthetic") -> tuple[Tensor, Tensor]:
    """Noise whose brightness tells the class, n images of each, class after class."""
    noise = torch.randint(0, 90, (CLASSES * n, 3, SIDE, SIDE), generator=generator(0, name))
    targets = torch.arange(CLASSES).repeat_interleave(n)
    return (noise + 50 * targets[:, None, None, None]).to(torch.uint8), targets


class Oracle(nn.Module):
    """Knows the class from the brightness."""

    def forward(self, x_norm: Tensor) -> Tensor:
        level = (x_norm.mean((1, 2, 3)) * 0.25 + 0.5) * 255
        return -((level[:, None] - (45 + 50 * torch.arange(CLASSES, device=x_norm.device))) ** 2) / 200


def teacher(compute: Compute = CPU) -> Frozen:
    """A perfect teacher."""
    names = [str(c) for c in range(CLASSES)]
    return Frozen(Oracle(), Card("oracle", {}, names, SIDE, [0.5] * 3, [0.25] * 3, 1.0, 1.0, [], []), compute)


def recipe(preset: str = "rded", **changes: Any) -> Recipe:
    """A short recipe of the toy set."""
    return recipes.resolve(preset, {"epochs": 6, "batch": 5, **changes}, "cifar10", CLASSES, 3, SIDE, "convnet2")


def train(
    wanted: Recipe,
    track: Track | None = None,
    net: str = "convnet2",
    seed: int = 3,
    source: labels.Source | None = None,
    compute: Compute = CPU,
    images: Synthetic | None = None,
) -> Outcome:
    """One toy student."""
    return student.train(
        net,
        {"width": 8} if net.startswith("convnet") else {},
        wanted,
        images or Synthetic(*labelled(3)),
        source or labels.on_the_fly(teacher(compute), wanted.teacher_mode),
        teacher(compute),
        labelled(10, "validation"),
        seed=seed,
        compute=compute,
        track=track or Track.quiet(),
    )


def test_learns_and_reports_last_best_and_per_class() -> None:
    found = train(recipe(epochs=30, lr=0.02, temperature=4.0, evaluate_every=10, views={"mix": "none"}))
    assert [point[0] for point in found.curve] == [10, 20, 30]
    assert found.acc_last == found.curve[-1][1] > 0.8
    assert found.acc_best == max(point[1] for point in found.curve)
    assert found.best_epoch == next(point[0] for point in found.curve if point[1] == found.acc_best)
    assert sum(found.per_class) / CLASSES == pytest.approx(found.acc_last)
    assert found.curve[0][2] > found.curve[-1][2] > 0
    assert found.views == 30 * 12


def test_hard_labels_need_no_teacher() -> None:
    def never(epoch: int, batch: Batch) -> Tensor:
        raise AssertionError(f"labels were asked for at epoch {epoch}")

    found = train(recipe("fair-hard", epochs=30, evaluate_every=30, lr=0.05, views={"dsa": "flip"}), source=never)
    assert found.acc_last > 0.8


def test_same_seed_same_student_other_seed_another() -> None:
    first, again, other = (train(recipe(), seed=s) for s in (3, 3, 4))
    assert first == again
    assert first.curve != other.curve


def test_loop_equals_the_written_out_one() -> None:
    wanted = recipe(epochs=4, evaluate_every=4, views={"mix": "none"})
    found = train(wanted)
    torch.manual_seed(derived_seed(3, "student", "convnet2"))
    net = nets.build("convnet2", CLASSES, SIDE, width=8).to(memory_format=torch.channels_last)
    matrices = [p for n, p in net.named_parameters() if "weight" in n and p.ndim > 1]
    others = [p for p in net.parameters() if all(p is not m for m in matrices)]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.19
    images_u8, targets = labelled(3)
    run = Batches(images_u8, targets, wanted, 3, NORM, CPU)
    losses = []
    for epoch in range(4):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * 0.5 * (1 + math.cos(math.pi * epoch / 8))
        for step in range(3):
            batch = run.get(epoch, step)
            q = F.softmax(Oracle()(batch.x_norm).half().float() / 20, 1)
            p = F.log_softmax(net(batch.x_norm) / 20, 1)
            loss = (q * (q.log() - p)).sum() / len(q)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    val_u8, val_labels = labelled(10, "validation")
    with torch.no_grad():
        right = net.eval()(evaluation_view(val_u8, SIDE, *NORM)).argmax(1) == val_labels
    assert found.acc_last == float(right.double().mean())
    assert found.curve[-1][2] == pytest.approx(sum(losses) / 12, rel=1e-4)


def batch_of(own: float = 1.0) -> Batch:
    """Two images and their classes."""
    return Batch(slice(0, 2), torch.zeros(2, 3, 4, 4), torch.tensor([0, 2]), torch.tensor([2, 1]), own)


def test_losses_follow_their_formulas() -> None:
    z, t = torch.tensor([[1.0, 2.0, -1.0], [0.0, 1.0, 3.0]]), torch.tensor([[2.0, 0.0, 1.0], [1.0, 1.0, 0.0]])
    p, q = F.softmax(z / 4, 1), F.softmax(t / 4, 1)
    divergence = float((q * (q / p).log()).sum() / 2)
    warm = {"temperature": 4.0}
    assert float(loss_of(recipe(**warm), z, t, batch_of())) == pytest.approx(divergence)
    assert float(loss_of(recipe(**warm, kl_t2=True), z, t, batch_of(0.3))) == pytest.approx(16 * divergence)
    log = F.log_softmax(z, 1)
    own, partner = -(log[0, 0] + log[1, 2]) / 2, -(log[0, 2] + log[1, 1]) / 2
    mse = recipe("gvbsm", ce_weight=0.5)
    assert float(loss_of(mse, z, t, batch_of(0.3))) == pytest.approx(float(((z - t) ** 2).mean() + 0.5 * own))
    hard = recipe("fair-hard")
    assert float(loss_of(hard, z, None, batch_of())) == pytest.approx(float(own))
    assert float(loss_of(hard, z, None, batch_of(0.3))) == pytest.approx(float(0.3 * own + 0.7 * partner))


@pytest.mark.parametrize("preset", ["rded", "gvbsm", "fair-hard"])
@pytest.mark.parametrize("own", [1.0, 0.3])
def test_a_weighted_loss_is_the_weighted_mean_of_each_images_loss(preset: str, own: float) -> None:
    """In float64, mixed images included: what counts is the weight of the image itself."""
    wanted, weights = recipe(preset), torch.tensor([0.25, 1.75], dtype=torch.float64)
    z, t = (torch.randn(2, 3, dtype=torch.float64, generator=generator(0, name)) for name in "zt")
    whole = batch_of(own)
    each = [replace(whole, targets=whole.targets[i : i + 1], partners=whole.partners[i : i + 1]) for i in range(2)]
    alone = torch.stack([loss_of(wanted, z[i : i + 1], t[i : i + 1], each[i]) for i in range(2)])
    found = loss_of(wanted, z, t, replace(whole, weights=weights))
    assert found.item() == pytest.approx(float((weights * alone).sum() / 2), rel=1e-12)
    assert found.item() != pytest.approx(float(loss_of(wanted, z, t, whole)), rel=1e-3)
    assert loss_of(wanted, z, t, whole).item() == pytest.approx(float(alone.mean()), rel=1e-12)


def test_weights_follow_their_images_into_the_batches() -> None:
    images_u8, targets = labelled(3)
    weights = torch.arange(12.0) / 5.5
    run = Batches(images_u8, targets, recipe(), 3, NORM, CPU, weights)
    for step in range(3):
        batch = run.get(1, step)
        assert batch.weights is not None
        assert batch.weights.equal(weights[run.order(1)[batch.part]])


def weighted(*weights: float) -> Synthetic:
    """The toy set whose classes all have these weights."""
    images_u8, targets = labelled(3)
    return Synthetic(images_u8, targets, {"weights": torch.tensor(weights).repeat(CLASSES)})


@pytest.mark.parametrize("preset", ["rded", "gvbsm", "fair-hard"])
def test_weights_of_one_change_no_bit_and_others_do(preset: str) -> None:
    wanted = recipe(preset, evaluate_every=2)
    plain = train(wanted)
    assert train(wanted, images=weighted(1.0, 1.0, 1.0)) == plain
    other = train(wanted, images=weighted(0.5, 0.5, 2.0))
    assert [point[2] for point in other.curve] != [point[2] for point in plain.curve]


@pytest.mark.parametrize("bad", [(1.0,), (1.0, -1.0, 3.0), (1.0, float("nan"), 1.0)])
def test_weights_that_are_none_are_refused(bad: tuple[float, ...]) -> None:
    with pytest.raises(CorruptArtifact, match="weights .* for each of 12 images; synthesize it again"):
        train(recipe(), images=weighted(*bad) if len(bad) == 3 else weighted(2.0, *bad))


class Killed(Exception):
    """Stands for SIGKILL."""


class Dying(Track):
    """Checkpoints every few steps and dies at a given one."""

    def __init__(self, folder: Path, at: int, pace: int) -> None:
        super().__init__(folder=folder)
        self.seen, self.at, self.pace = 0, at, pace

    def due(self) -> bool:
        self.seen += 1
        if self.seen == self.at:
            raise Killed
        return self.seen % self.pace == 0


@pytest.mark.parametrize(
    ("preset", "net", "changes"),
    [
        ("rded", "convnet2", {}),
        ("fair-hard", "convnet2", {}),
        ("edc", "convnet2", {}),
        ("sre2lpp", "resnet20", {"batch": 6}),
        ("gvbsm", "convnet2", {"optimizer": "sgd"}),
    ],
)
def test_killed_training_ends_as_if_never_stopped(
    tmp_path: Path, preset: str, net: str, changes: dict[str, Any]
) -> None:
    wanted = recipe(preset, evaluate_every=2, **changes)
    whole = train(wanted, net=net)
    for number, at in enumerate(torch.randint(2, 17, (2,), generator=generator(0, preset)).tolist()):
        folder = tmp_path / str(number)
        with pytest.raises(Killed):
            train(wanted, Dying(folder, at, pace=2), net=net)
        assert train(wanted, Track(folder=folder), net=net) == whole


def test_dropout_is_part_of_the_seed(tmp_path: Path) -> None:
    wanted = recipe(epochs=2, evaluate_every=1)
    before = torch.get_rng_state()
    whole = train(wanted, net="shallow_with_dropout")
    assert torch.get_rng_state().equal(before)
    with pytest.raises(Killed):
        train(wanted, Dying(tmp_path, 4, pace=1), net="shallow_with_dropout")
    torch.rand(3)
    assert train(wanted, Track(folder=tmp_path), net="shallow_with_dropout") == whole


@pytest.fixture(autouse=True)
def shallow_net(monkeypatch: pytest.MonkeyPatch) -> None:
    """A net with dropout that is not slow, beside the real ones."""
    build = nets.build

    def with_dropout(name: str, classes: int, size: int, **options: Any) -> nn.Module:
        if name != "shallow_with_dropout":
            return build(name, classes, size, **options)
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(288, classes))

    monkeypatch.setattr(nets, "build", with_dropout)


def test_checkpoint_of_another_student_is_not_taken_up(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        train(recipe(), Dying(tmp_path, 8, pace=1), seed=1)
    assert train(recipe(), Track(folder=tmp_path), seed=2) == train(recipe(), seed=2)


def test_bad_loss_stops_with_step_lr_and_last_good_checkpoint(tmp_path: Path) -> None:
    def poisoned(epoch: int, batch: Batch) -> Tensor:
        logits = teacher().logits(batch.x_norm)
        return logits * float("nan") if epoch == 3 and batch.part.start > 0 else logits

    with pytest.raises(
        NonFiniteLoss, match=r"loss is nan at step 10 \(lr 0\.0008\d*, epoch 4\); the last finite"
    ) as stop:
        train(recipe(), Dying(tmp_path, 1000, pace=2), source=poisoned)
    assert "state.safetensors" in str(stop.value)
    state = Track(folder=tmp_path).load()
    assert state is not None
    assert state[1]["done"] == 10
    assert all(bool(torch.isfinite(t.float()).all()) for t in state[0].values())


def test_one_forward_at_higher_momentum_equals_the_official_two() -> None:
    x = torch.randn(16, 3, 4, 4, generator=generator(0, "bn"))
    twice, once = nn.BatchNorm2d(3, momentum=0.1), nn.BatchNorm2d(3, momentum=recipe("rded").bn_momentum)
    for _ in range(2):
        twice(x)
    once(x)
    assert torch.allclose(twice.running_mean, once.running_mean, atol=1e-6)
    assert torch.allclose(twice.running_var, once.running_var, atol=1e-6)


def test_average_of_weights_is_what_counts() -> None:
    plain, averaged = (train(recipe(epochs=4, lr=0.05, evaluate_every=1, ema=ema)) for ema in (0.0, 0.999))
    assert [point[2] for point in plain.curve] == [point[2] for point in averaged.curve]
    assert [point[1] for point in plain.curve] != [point[1] for point in averaged.curve]


def test_evaluations_are_few_and_the_late_ones_complete() -> None:
    for epochs in (1, 2, 5, 30, 300, 1000):
        found = evaluation_epochs(epochs, 0)
        assert list(found) == sorted(found)
        assert found[epochs]
        assert len(found) <= 14
        assert all(1 <= e <= epochs for e in found)
    rded = evaluation_epochs(300, 0)
    assert [e for e, full in rded.items() if full] == [250, 260, 270, 280, 290, 300]
    assert [e for e, full in rded.items() if not full] == [30, 60, 90, 120, 150, 180, 210, 240]
    assert evaluation_epochs(10, 4) == {4: True, 8: True, 10: True}
    assert evaluation_epochs(3, 9) == {3: True}


def test_early_points_use_a_sample_and_never_count_as_best(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(student, "SAMPLE", 8)
    sizes = []
    real = student.predictions

    def spy(net: nn.Module, images_u8: Tensor, *rest: Any, every: int) -> Tensor:
        seen = (torch.arange(CLASSES).repeat_interleave(10))[::every]
        sizes.append((len(seen), seen.bincount().tolist()))
        found = real(net, images_u8, *rest, every=every)
        assert torch.equal(found, real(net, images_u8[::every], *rest))
        return seen if len(seen) == 8 else found

    monkeypatch.setattr(student, "predictions", spy)
    found = train(recipe(epochs=10, lr=1e-6))
    assert sizes[0] == (8, [2] * CLASSES)  # even: the split is sorted by class
    assert sizes[-1] == (40, [10] * CLASSES)
    assert found.curve[0][1] == 1.0
    assert found.acc_best < 1.0
    assert found.best_epoch > 8


@pytest.mark.gpu
def test_a_gpu_in_bf16_learns_as_well() -> None:
    wanted, cuda = (
        recipe(epochs=30, lr=0.02, temperature=4.0, evaluate_every=10, views={"mix": "none"}),
        choose("cuda", "bf16"),
    )
    found = train(wanted, compute=cuda)
    assert found.acc_last > 0.8
    assert found.acc_last == pytest.approx(train(wanted).acc_last, abs=0.15)


def test_predictions_are_of_all_validation_images_and_give_the_accuracy() -> None:
    found = train(recipe(epochs=2, evaluate_every=2))
    owners = torch.arange(CLASSES).repeat_interleave(10)
    assert len(found.predicted) == len(owners)
    assert float((torch.tensor(found.predicted) == owners).double().mean()) == found.acc_last
