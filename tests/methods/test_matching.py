"""Statistics taps against autograd of the definition (reference 1.1, 7.1): values and gradients, in float64."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from distillery.methods import _matching
from distillery.methods._matching import MomentTap, Switch, moments, norm_taps, norms, tapped
from distillery.rng import generator


class Branches(nn.Module):
    """Three BatchNorms of different widths, one on a shortcut; each sees an input that others read too."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5)
        self.conv, self.bn1 = nn.Conv2d(5, 7, 3, stride=2, padding=1), nn.BatchNorm2d(7)
        self.short, self.bn2 = nn.Conv2d(5, 7, 1, stride=2), nn.BatchNorm2d(7)
        self.head = nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn0(self.stem(x)))
        x = torch.relu(self.bn1(self.conv(x)) + self.bn2(self.short(x)))
        return self.head(x.mean(dim=(2, 3)))


def net(name: str = "branches") -> Branches:
    """Random weights and running statistics, eval mode, frozen, float64."""
    made, stream = Branches().double(), generator("matching", name)
    for tensor in (*made.parameters(), *made.buffers()):
        if tensor.is_floating_point():
            tensor.data = torch.randn(tensor.shape, generator=stream, dtype=torch.float64)
    for layer in norms(made):
        layer.running_var.square_().add_(0.5)  # type: ignore[union-attr]
    return made.eval().requires_grad_(False)


def images(count: int, name: str = "images") -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=generator("matching", name, count), dtype=torch.float64)


def inputs_of(model: nn.Module, layers: list[nn.BatchNorm2d], x: Tensor) -> tuple[list[Tensor], Tensor]:
    """What the layers see, with its graph, and the logits."""
    seen: list[Tensor] = []
    handles = [layer.register_forward_pre_hook(lambda _m, args: seen.append(args[0])) for layer in layers]
    logits = model(x)
    for handle in handles:
        handle.remove()
    return seen, logits


def means_vars(x: Tensor) -> tuple[Tensor, Tensor]:
    """Of each channel over images and pixels, the variance biased."""
    return x.mean((0, 2, 3)), ((x - x.mean((0, 2, 3), keepdim=True)) ** 2).mean((0, 2, 3))


def task(logits: Tensor) -> Tensor:
    """A loss beside the statistics."""
    return functional.cross_entropy(logits, torch.arange(len(logits)) % 4)


Targets = Callable[[int, int], tuple[Tensor, Tensor]]  # layer, segment -> mean, var


def defined(
    model: Branches, x: Tensor, segments: int, targets: Targets, r_bn: float, r_var: float, first_bn: float
) -> tuple[Tensor, Tensor]:
    """Loss of each segment by the definition, and the gradient of all with the task's."""
    x = x.clone().requires_grad_()
    seen, logits = inputs_of(model, norms(model), x)
    losses = []
    for segment in range(segments):
        loss = torch.zeros((), dtype=torch.float64)
        for layer, held in enumerate(seen):
            mean, var = means_vars(held.chunk(segments)[segment])
            wanted_mean, wanted_var = targets(layer, segment)
            weight = first_bn if layer == 0 else 1.0
            loss = loss + weight * ((mean - wanted_mean).norm() + r_var * (var - wanted_var).norm())
        losses.append(r_bn * loss)
    each = torch.stack(losses)
    return each.detach(), torch.autograd.grad(each.sum() + task(logits), x)[0]


def fused(model: nn.Module, x: Tensor, segments: int, taps: list[_matching.Tap]) -> tuple[Tensor, Tensor]:
    """The same by taps."""
    x, switch = x.clone().requires_grad_(), Switch()
    with tapped(taps, switch), switch.on(segments):
        loss = task(model(x).double())
    gradient = torch.autograd.grad(loss, x)[0]
    return torch.stack([tap.values for tap in taps]).sum(0), gradient


def running(model: nn.Module) -> Targets:
    return lambda layer, _segment: (norms(model)[layer].running_mean, norms(model)[layer].running_var)  # type: ignore[return-value]


def assert_close(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
    assert torch.allclose(found[0], wanted[0], rtol=1e-11, atol=0)
    assert torch.allclose(found[1], wanted[1], rtol=1e-9, atol=1e-12 * float(wanted[1].abs().max()))


@pytest.mark.parametrize("segments", [1, 2, 3])
@pytest.mark.parametrize(("r_bn", "r_var", "first_bn"), [(0.01, 1.0, 10.0), (2.0, 11.0, 10.0), (0.7, 0.0, 1.0)])
def test_taps_give_the_value_and_gradient_of_the_definition(
    r_bn: float, r_var: float, first_bn: float, segments: int
) -> None:
    model, x = net(), images(6)
    taps = norm_taps(model, r_bn=r_bn, r_var=r_var, first_bn=first_bn)
    assert [tap.module for tap in taps] == [model.bn0, model.bn1, model.bn2]
    assert_close(fused(model, x, segments, taps), defined(model, x, segments, running(model), r_bn, r_var, first_bn))


def test_each_class_has_its_own_targets_and_its_share_of_the_weight() -> None:
    model, x, classes = net(), images(6), 3
    means = torch.randn(classes, 19, generator=generator("means"), dtype=torch.float64)
    variances = torch.rand(classes, 19, generator=generator("variances"), dtype=torch.float64)
    places = [slice(0, 5), slice(5, 12), slice(12, 19)]

    def targets(layer: int, segment: int) -> tuple[Tensor, Tensor]:
        return means[segment, places[layer]], variances[segment, places[layer]]

    taps = norm_taps(model, r_bn=0.3, per_class=(means, variances), share=1 / classes)
    assert_close(fused(model, x, classes, taps), defined(model, x, classes, targets, 0.3 / classes, 1.0, 10.0))


def test_each_segment_is_matched_by_itself() -> None:
    model, x = net(), images(6)
    whole = fused(model, x, 3, norm_taps(model, r_bn=1.0))
    for segment, part in enumerate(x.chunk(3)):
        alone = fused(model, part, 1, norm_taps(model, r_bn=1.0))
        assert torch.allclose(whole[0][segment], alone[0][0], rtol=1e-12)
    other = x.clone()
    other[4:] += 1
    assert torch.equal(fused(model, other, 3, norm_taps(model, r_bn=1.0))[0][:2], whole[0][:2])


def met(model: Branches, x: Tensor, names: tuple[str, ...]) -> list[_matching.Tap]:
    """Taps whose targets of these names are exactly what x gives."""
    with torch.no_grad():
        seen, _ = inputs_of(model, norms(model), x)
    taps = norm_taps(model, r_bn=1.0)
    for tap, held in zip(taps, seen, strict=True):
        for name, found in zip(("mean", "var"), moments(held, 1), strict=True):
            if name in names:
                setattr(tap, name, found)
    return taps


def test_statistics_that_are_met_exactly_pull_nowhere() -> None:
    """The norm has no gradient at 0; the taps give none there, and no NaN."""
    model, x = net(), images(4)
    values, gradient = fused(model, x, 1, met(model, x, ("mean", "var")))
    assert values.item() == 0
    leaf = x.clone().requires_grad_()
    assert torch.equal(gradient, torch.autograd.grad(task(model(leaf)), leaf)[0])


@pytest.mark.parametrize("name", ["mean", "var"])
def test_one_that_is_met_leaves_the_other_its_gradient(name: str) -> None:
    model, x = net(), images(4)
    leaf = x.clone().requires_grad_()
    seen, logits = inputs_of(model, norms(model), leaf)
    total = torch.zeros((), dtype=torch.float64)
    for layer, held in enumerate(seen):
        mean, var = means_vars(held)
        wanted_mean, wanted_var = running(model)(layer, 0)
        left = var - wanted_var if name == "mean" else mean - wanted_mean
        total = total + (10 if layer == 0 else 1) * left.norm()
    wanted = total.detach()[None], torch.autograd.grad(total + task(logits), leaf)[0]
    assert_close(fused(model, x, 1, met(model, x, (name,))), wanted)


def test_a_blank_batch_gives_numbers() -> None:
    """Every variance is 0 and every channel the same: nothing divides by it."""
    model = net()
    values, gradient = fused(model, torch.zeros(2, 3, 8, 8, dtype=torch.float64), 2, norm_taps(model, r_bn=1.0))
    assert values.isfinite().all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("from_zero", [False, True])
def test_a_running_average_is_compared_and_the_batchs_own_gradient_taken(from_zero: bool) -> None:
    """G-VBSM compares  average + s - stopgrad(s)  (reference 7.1)."""
    model, alpha, weight, weight_var = net(), 0.8, 0.7, 0.3
    taps: list[_matching.Tap] = []
    for layer in norms(model):
        assert layer.running_mean is not None and layer.running_var is not None
        taps.append(
            MomentTap(layer, layer.running_mean[None], layer.running_var[None], weight, weight_var, alpha, from_zero)
        )
    averages: dict[int, tuple[Tensor, Tensor]] = {}
    for step in range(4):
        x = images(4, f"step {step}").requires_grad_()
        seen, logits = inputs_of(model, norms(model), x)
        losses = []
        for half in range(2):
            loss = torch.zeros((), dtype=torch.float64)
            for place, (layer, held) in enumerate(zip(norms(model), seen, strict=True)):
                now = means_vars(held.chunk(2)[half])
                first = tuple(torch.zeros_like(s) if from_zero else s.detach() for s in now)
                before = averages.get(2 * place + half, first)
                average = [alpha * b + (1 - alpha) * s.detach() for b, s in zip(before, now, strict=True)]
                averages[2 * place + half] = (average[0], average[1])
                mean, var = (a + s - s.detach() for a, s in zip(average, now, strict=True))
                loss = loss + weight * (mean - layer.running_mean).norm()
                loss = loss + weight_var * (var - layer.running_var).norm()
            losses.append(loss)
        each = torch.stack(losses)
        wanted = each.detach(), torch.autograd.grad(each.sum() + task(logits), x)[0]
        assert_close(fused(model, x.detach(), 2, taps), wanted)
    for place, tap in enumerate(taps):
        held_means = torch.stack([averages[2 * place][0], averages[2 * place + 1][0]])
        assert torch.allclose(tap.state["mean"], held_means, rtol=1e-12), "a checkpoint would lose the average"
        assert set(tap.state) == {"mean", "var"}


def hooks(model: nn.Module) -> list[int]:
    return [len(m._forward_pre_hooks) + len(m._forward_hooks) + len(m._backward_hooks) for m in model.modules()]


@pytest.fixture
def model() -> Iterator[Branches]:
    """A net that must come back without hooks."""
    made = net()
    before = hooks(made)
    yield made
    assert hooks(made) == before


def test_hooks_go_with_their_block(model: Branches) -> None:
    switch = Switch()
    with tapped(norm_taps(model, r_bn=1.0), switch):
        assert sum(hooks(model)) == 3


def test_hooks_go_after_an_exception(model: Branches) -> None:
    switch = Switch()
    with pytest.raises(ZeroDivisionError), tapped(norm_taps(model, r_bn=1.0), switch), switch.on(1):
        raise ZeroDivisionError
    assert switch.segments == 0


def test_taps_rest_until_they_are_switched_on(model: Branches) -> None:
    x, switch, taps = images(4), Switch(), norm_taps(model, r_bn=1.0)
    plain = model(x)
    with tapped(taps, switch):
        assert torch.equal(model(x), plain)
        assert all(tap.values.numel() == 0 for tap in taps)
        with switch.on(2):
            assert torch.equal(model(x), plain), "a tap changes the forward"
        assert all(tap.values.shape == (2,) for tap in taps)


def test_targets_are_a_copy_of_the_running_statistics(model: Branches) -> None:
    taps = norm_taps(model, r_bn=1.0)
    first = taps[0]
    assert isinstance(first, MomentTap)
    before = first.mean.clone()
    assert model.bn0.running_mean is not None
    model.bn0.running_mean.add_(1)
    assert torch.equal(first.mean, before)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("reduce", [moments, _matching._moments_at_once])
def test_moments_are_means_and_biased_variances(
    reduce: Callable[[Tensor, int], tuple[Tensor, Tensor]], dtype: torch.dtype, layout: torch.memory_format
) -> None:
    x = (torch.randn(12, 5, 7, 7, generator=generator("moments")) * 3 + 50).to(dtype).contiguous(memory_format=layout)
    mean, var = reduce(x, 3)
    assert mean.dtype == var.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for segment, part in enumerate(x.double().chunk(3)):
        wanted_mean, wanted_var = means_vars(part)
        assert torch.allclose(mean[segment].double(), wanted_mean, rtol=1e-5)
        assert torch.allclose(var[segment].double(), wanted_var, rtol=1e-4)


def test_one_pixel_has_no_variance() -> None:
    x = torch.randn(2, 3, 1, 1, generator=generator("pixel"))
    mean, var = moments(x, 2)
    assert torch.equal(mean, x[:, :, 0, 0])
    assert torch.equal(var, torch.zeros(2, 3))


def test_bf16_stays_near_fp32() -> None:
    model, x = net().float(), images(12).float()
    exact = fused(model, x, 2, norm_taps(model, r_bn=0.5))
    with torch.autocast("cpu", torch.bfloat16):
        taps = norm_taps(model, r_bn=0.5)
        found = fused(model, x, 2, taps)
    assert all(tap.values.dtype == torch.float32 for tap in taps)
    assert torch.allclose(found[0], exact[0], rtol=0.01)
    error = (found[1] - exact[1]).norm() / exact[1].norm()
    assert 0 < float(error) < 0.03


def test_fp32_gradients_are_those_of_fp64() -> None:
    model, x = net(), images(12)
    exact = fused(model, x, 2, norm_taps(model, r_bn=0.5))
    single = net().float()
    found = fused(single, x.float(), 2, norm_taps(single, r_bn=0.5))
    assert torch.allclose(found[0].double(), exact[0], rtol=1e-5)
    assert float((found[1] - exact[1]).norm() / exact[1].norm()) < 1e-5
