"""The last layer of any net, and what goes into it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


def classifier_name(net: nn.Module) -> str:
    """Name of the layer that makes the logits: the last linear one, else the last convolution (SqueezeNet)."""
    for kind in (nn.Linear, nn.Conv2d):
        found = [name for name, module in net.named_modules() if isinstance(module, kind)]
        if found:
            return found[-1]
    raise AssertionError(f"{type(net).__name__} has neither a linear layer nor a convolution")


def classifier(net: nn.Module) -> nn.Linear | nn.Conv2d:
    """The layer that makes the logits; its weight's first axis is the classes."""
    layer = net.get_submodule(classifier_name(net))
    assert isinstance(layer, nn.Linear | nn.Conv2d)
    return layer


@contextlib.contextmanager
def watched(net: nn.Module) -> Iterator[list[torch.Tensor]]:
    """A block whose forwards leave their penultimate features [B, F] in a list: the input of the classifier (averaged
    over space where it is a map)."""
    found: list[torch.Tensor] = []

    def keep(_layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        found.append(inputs[0].mean((2, 3)) if inputs[0].ndim == 4 else inputs[0])

    hook = classifier(net).register_forward_pre_hook(keep)
    try:
        yield found
    finally:
        hook.remove()


def features(net: nn.Module, x_norm: torch.Tensor) -> torch.Tensor:
    """The penultimate features [B, F] of one ordinary forward: mode, autocast and gradients are the caller's."""
    with watched(net) as found:
        net(x_norm)
    return found[-1]
