"""Networks by name.

`build` knows the names in `NETS`, `convnet<d>` of any depth d, and every torchvision classification model.
A family is one module with a strict `Options` model and `build(name, classes, size, options)`.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from torch import nn

from distillery.config import Options, parse
from distillery.errors import UserError, choices, nearest
from distillery.nets import convnet, resnet, zoo
from distillery.nets.head import classifier, features

NETS: dict[str, ModuleType] = {
    "convnet3": convnet,
    "convnet4": convnet,
    "convnet5": convnet,
    "convnet6": convnet,
    "resnet18_modified": resnet,
    "resnet34_modified": resnet,
    "resnet50_modified": resnet,
    "resnet101_modified": resnet,
    "resnet20": resnet,
}


def build(name: str, classes: int, size: int, **options: Any) -> nn.Module:
    """A new net with fresh weights, drawn from torch's global generator.

    Args:
        name: a name in `NETS`, `convnet<d>`, or a torchvision classification model.
        classes: number of outputs.
        size: side of the square input images [B, 3, size, size] in pixels.
        options: options of that family; see its `Options`.

    Raises:
        UserError: unknown name or option, impossible value, or images too small for the net.
    """
    for what, value in (("classes", classes), ("size", size)):
        if value < 1:
            raise UserError(f"net {name}: {what} is {value!r}; it must be at least 1")
    net: nn.Module = _family(name).build(name, classes, size, _options(name, options))
    return net


def check_net(name: str, options: dict[str, Any]) -> None:
    """Check a net's name and options without building it.

    Raises:
        UserError: unknown name or option (with the nearest one), or an impossible value.
    """
    _options(name, options)


def _options(name: str, options: dict[str, Any]) -> Options:
    family = _family(name)
    model: type[Options] = zoo.options_model(name) if family is zoo else family.Options
    return parse(model, options, f"options of net {name}")


def _family(name: str) -> ModuleType:
    if name in NETS:
        return NETS[name]
    if convnet.depth_of(name):
        return convnet
    if name in zoo.names():
        return zoo
    known = [*NETS, *zoo.names()]
    raise UserError(
        f"net {name!r} is not known{nearest(name, known)}; known are {choices(NETS)}, convnet<depth>, and "
        f"torchvision's {len(zoo.names())} classification models such as resnet50, mobilenet_v2 or swin_v2_t"
    )


__all__ = ["NETS", "build", "check_net", "classifier", "features"]
