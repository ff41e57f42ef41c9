"""Pull the statistics of a teacher's layers towards targets, without an autograd graph through the statistics.

For a segment of images with input x of a layer, channel means m and biased variances v over (images, H, W) and targets
M, V, the loss is  weight * ||m - M||_2 + weight_var * ||v - V||_2  (SRe2L's R_BN for one layer). Its gradient is affine
in x for each channel c:

    dL/dx = a_c + b_c x,   b = 2 weight_var (v - V) / (||v - V|| E),   a = weight (m - M) / (||m - M|| E) - b m

with E the elements of a channel. So a tap computes two numbers per channel on the way forward and adds a + b x to the
gradient on the way back (reference: the SRe2L family's recover loop; the affine form is ours to exploit).

Legend: K segments of equal size, in order along the batch; B images; C channels; T = 1 or K targets.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

LAUNCH_ELEMENTS = 2**23  # of a segment: below this its sums take about as long as a launch (estimated)


class Tap(Protocol):
    """Something at the input of a layer that contributes to the loss.

    Attributes:
        module: whose input is watched.
        values: [K] float32: the loss of each segment at the last forward.
        state: tensors that a checkpoint must hold, by name.
    """

    module: nn.Module
    values: Tensor
    state: dict[str, Tensor]

    def pull(self, x: Tensor, segments: int, step: int = 0) -> Tensor:
        """x itself at an iteration, with the loss's gradient added on the way back; sets `values`."""


@dataclass
class MomentTap:
    """Means and variances of a layer's input against targets.

    Attributes:
        module: whose input is watched.
        mean, var: targets [T, C] float32.
        weight, weight_var: of both norms, for one segment.
        ema: alpha of a running average of the statistics (G-VBSM), which is what is compared; 0 compares the batch's
            own. The gradient is always the batch's own.
        ema_from_zero: start the average at 0, as G-VBSM's code does, and not at the first value.
        skips: iterations at which the tap does nothing, its average included (G-VBSM).
    """

    module: nn.Module
    mean: Tensor
    var: Tensor
    weight: float
    weight_var: float
    ema: float = 0.0
    ema_from_zero: bool = False
    skips: Collection[int] = ()
    values: Tensor = field(default_factory=lambda: torch.zeros(0))
    state: dict[str, Tensor] = field(default_factory=dict)

    def pull(self, x: Tensor, segments: int, step: int = 0) -> Tensor:
        """See `Tap`."""
        if step in self.skips:
            self.values = torch.zeros(segments, device=x.device, dtype=_wide(x.dtype))
            return x
        mean, var, elements = self.measure(x.detach(), segments)
        held_mean, held_var = self._held("mean", mean), self._held("var", var)
        to_mean, far_mean = direction(held_mean - self.mean)
        to_var, far_var = direction(held_var - self.var)
        slope = to_var * (2 * self.weight_var / elements)
        offset = to_mean * (self.weight / elements) - slope * mean
        self.values = self.weight * far_mean + self.weight_var * far_var
        return self.push(x, offset, slope)

    def measure(self, x: Tensor, segments: int) -> tuple[Tensor, Tensor, int]:
        """The means and the variances [K, C] that are matched, and of how many elements each one is."""
        return *moments(x, segments), x[0, 0].numel() * (len(x) // segments)

    def push(self, x: Tensor, offset: Tensor, slope: Tensor) -> Tensor:
        """x itself; on the way back the gradient of what was measured is added: offset + slope * x."""
        pushed: Tensor = Affine.apply(x, offset, slope)
        return pushed

    def _held(self, name: str, now: Tensor) -> Tensor:
        if not self.ema:
            return now
        first = torch.zeros_like(now) if self.ema_from_zero else now
        held = torch.lerp(now, self.state.get(name, first).to(now), self.ema)
        self.state[name] = held
        return held


class Affine(torch.autograd.Function):
    """Identity forward; backward adds offset + slope * x, per segment and channel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, offset: Tensor, slope: Tensor) -> Tensor:
        """x [B, C, H, W]; offset, slope [K, C]."""
        ctx.save_for_backward(x, offset, slope)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """The gradient of x."""
        (gradient,) = gradients
        x, offset, slope = ctx.saved_tensors
        batch, channels, height, width = x.shape
        flat = x.permute(0, 2, 3, 1).reshape(len(offset), -1, channels)
        own = torch.addcmul(offset[:, None], flat, slope[:, None])
        own = own.view(batch, height, width, channels).permute(0, 3, 1, 2)
        return own.add_(gradient).to(gradient.dtype), None, None


def moments(x: Tensor, segments: int) -> tuple[Tensor, Tensor]:
    """Channel means and biased variances of each segment, [K, C] each, in float32 (float64 for float64).

    On a CPU each segment is reduced by itself, in the same order however many share the batch. On a GPU many small
    segments are reduced at once, to spare it a launch for each.
    """
    if x.is_cuda and segments > 1 and x.numel() < segments * LAUNCH_ELEMENTS:
        return _moments_at_once(x, segments)
    wide, channels = _wide(x.dtype), x.shape[1]
    found = []
    for part in x.chunk(segments):
        scratch = torch.zeros(2, channels, device=x.device, dtype=wide)  # running buffers that nobody reads
        found.append(torch.batch_norm_update_stats(part, scratch[0], scratch[1], 1.0))
    mean, var = zip(*found, strict=True)
    return torch.stack(mean), torch.stack(var)


def _moments_at_once(x: Tensor, segments: int) -> tuple[Tensor, Tensor]:
    # In half precision `var_mean` would round its results to it.
    var, mean = torch.var_mean(x.to(_wide(x.dtype)).unflatten(0, (segments, -1)), (1, 3, 4), correction=0)
    return mean, var


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def direction(difference: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors [K, C] and lengths [K] of differences [K, C]; a zero difference has the zero direction."""
    length = torch.linalg.vector_norm(difference, dim=1)
    return difference / length.clamp(min=torch.finfo(difference.dtype).tiny)[:, None], length


def norms(net: nn.Module) -> list[nn.BatchNorm2d]:
    """The net's BatchNorm2d layers in module order."""
    return [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]


def norm_taps(
    net: nn.Module,
    *,
    r_bn: float,
    r_var: float = 1.0,
    first_bn: float = 10.0,
    per_class: tuple[Tensor, Tensor] | None = None,
    share: float = 1.0,
) -> list[Tap]:
    """Taps at every BatchNorm2d: r_bn * sum_l w_l (||m_l - M_l|| + r_var ||v_l - V_l||), w_0 = first_bn, other w_l = 1.

    Args:
        net: a net with BatchNorm2d layers.
        r_bn, r_var, first_bn: see above (DWA's r_var; `first_bn_multiplier` of the official code).
        per_class: targets [T, all channels] of means and variances, one row per segment; default: the running buffers.
        share: weight of one segment in its group (WMDD: 1 / classes of the group).
    """
    taps: list[Tap] = []
    start = 0
    for index, layer in enumerate(norms(net)):
        assert layer.running_mean is not None and layer.running_var is not None, "no running statistics"
        mean, var = layer.running_mean[None], layer.running_var[None]
        if per_class is not None:
            own = slice(start, start + layer.num_features)
            mean, var = per_class[0][:, own].to(mean), per_class[1][:, own].to(var)
            start += layer.num_features
        weight = r_bn * share * (first_bn if index == 0 else 1.0)
        taps.append(MomentTap(layer, mean.detach().clone(), var.detach().clone(), weight, weight * r_var))
    return taps


class Switch:
    """Whether taps act, into how many segments the batch falls, and which iteration it is.

    Attributes:
        found: [K] losses of the taps at the last forward, once for each time that a layer ran: a net may run one layer
            twice, or leave one out.
    """

    def __init__(self) -> None:
        self.segments, self.step = 0, 0
        self.found: list[Tensor] = []

    @contextlib.contextmanager
    def on(self, segments: int, step: int = 0) -> Iterator[None]:
        """Taps act inside this block."""
        self.segments, self.step, self.found = segments, step, []
        try:
            yield
        finally:
            self.segments = 0


@contextlib.contextmanager
def tapped(taps: Sequence[Tap], switch: Switch) -> Iterator[None]:
    """Put taps at their layers for the length of a block."""

    def at(tap: Tap) -> Any:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            if not switch.segments:
                return None
            pulled = tap.pull(inputs[0], switch.segments, switch.step)
            switch.found.append(tap.values)
            return (pulled, *inputs[1:])

        return tap.module.register_forward_pre_hook(hook)

    handles = [at(tap) for tap in taps]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
