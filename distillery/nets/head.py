"""The last layer of any net, and what goes into it."""

from __future__ import annotations

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


def features(net: nn.Module, x_norm: torch.Tensor) -> torch.Tensor:
    """Penultimate features [B, F]: the input of the classifier (averaged over space where it is a map).

    Runs one ordinary forward: mode, autocast and gradients are the caller's.
    """
    kept: list[torch.Tensor] = []
    hook = classifier(net).register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
    try:
        net(x_norm)
    finally:
        hook.remove()
    last = kept[-1]
    return last.mean((2, 3)) if last.ndim == 4 else last
