"""Every classification model of torchvision, by its torchvision name, with any number of classes."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from distillery import config
from distillery.errors import UserError

INCEPTIONS = ("googlenet", "inception_v3")


class NoOptions(config.Options):
    """Most of these nets have no options."""


class InceptionOptions(config.Options):
    """Options of GoogLeNet and Inception."""

    transform_input: bool = False  # bring ImageNet-normalised input to (x - 0.5) / 0.5, as torchvision's weights expect


@functools.cache
def names() -> tuple[str, ...]:
    """Names of torchvision's classification models."""
    import torchvision.models  # here, because the import takes seconds that the other nets need not pay

    return tuple(torchvision.models.list_models(module=torchvision.models))


def options_model(name: str) -> type[config.Options]:
    """The options a model takes."""
    return InceptionOptions if name in INCEPTIONS else NoOptions


def build(name: str, classes: int, size: int, options: config.Options) -> nn.Module:
    """A torchvision model with fresh weights, without auxiliary heads, so that its output is one tensor.

    Raises:
        UserError: the model cannot take images of `size` pixels a side.
    """
    import torchvision.models

    try:
        net: nn.Module = torchvision.models.get_model(
            name, weights=None, num_classes=classes, **_arguments(name, size), **config.plain(options)
        )
        _try(net, size)
    except (RuntimeError, ValueError, AssertionError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"net {name} cannot take {size} px images ({reason}); choose a larger size (torchvision's models are made "
            "for 224), or a net for small images such as convnet3 or resnet18_modified"
        ) from error
    return net


def _arguments(name: str, size: int) -> dict[str, Any]:
    """What some builders must be told: the image size, and to leave out heads that only training would use."""
    if name.startswith("vit_"):
        return {"image_size": size}
    if name.startswith("maxvit_"):
        return {"input_size": (size, size)}
    return {"aux_logits": False, "init_weights": True} if name in INCEPTIONS else {}


@torch.no_grad()
def _try(net: nn.Module, size: int) -> None:
    """Run shapes through the net without arithmetic or data, so that too small images are found now."""
    shapes = {name: tensor.to("meta") for name, tensor in [*net.named_parameters(), *net.named_buffers()]}
    net.eval()
    torch.func.functional_call(net, shapes, (torch.empty(2, 3, size, size, device="meta"),))
    net.train()
