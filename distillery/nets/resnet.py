"""ResNets for small images.

`resnet<18|34|50|101>_modified`: torchvision's, with a 3x3 stride-1 stem and no max-pool (CIFAR, Tiny-ImageNet).
`resnet20`: the CIFAR network of He et al. (arXiv 1512.03385, section 4.2) with parameter-free option-A shortcuts;
state-dict names are those of the common public implementation (conv1, bn1, layer1.0.conv1, ..., linear).
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from distillery import config

SUFFIX = "_modified"
STAGES, BLOCKS = (16, 32, 64), 3  # channels of the stages of ResNet-20, blocks in each


class Options(config.Options):
    """These nets have no options."""


class Block(nn.Module):
    """Two 3x3 convolutions around a shortcut without parameters (option A)."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride, self.extra = stride, width - channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, channels, h, w] -> [B, width, h / stride, w / stride]."""
        out = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        return functional.relu(out + self._shortcut(x))

    def _shortcut(self, x: torch.Tensor) -> torch.Tensor:
        if not self.extra:
            return x
        below = self.extra // 2  # new channels are zeros, half of them on each side
        return functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, below, self.extra - below))


class ResNet20(nn.Module):
    """Three stages of three blocks, 16-32-64 channels. Input [B, 3, S, S], output logits [B, C]."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, STAGES[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(STAGES[0])
        self.layer1 = _stage(STAGES[0], STAGES[0], stride=1)
        self.layer2 = _stage(STAGES[0], STAGES[1], stride=2)
        self.layer3 = _stage(STAGES[1], STAGES[2], stride=2)
        self.linear = nn.Linear(STAGES[2], classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x_norm: torch.Tensor) -> torch.Tensor:
        """Logits [B, C]."""
        x = functional.relu(self.bn1(self.conv1(x_norm)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: torch.Tensor = self.linear(x.mean((2, 3)))
        return logits


def build(name: str, classes: int, size: int, options: Options) -> nn.Module:
    """A small-image ResNet; all of them take images of any size."""
    if name == "resnet20":
        return ResNet20(classes)
    import torchvision.models  # here, because the import takes seconds that the other nets need not pay

    net: nn.Module = torchvision.models.get_model(name.removesuffix(SUFFIX), weights=None, num_classes=classes)
    # torch's default initialisation for the new stem, not torchvision's fan-out one: what the papers' code trains with
    net.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    net.maxpool = nn.Identity()
    return net


def _stage(channels: int, width: int, stride: int) -> nn.Sequential:
    first = Block(channels, width, stride)
    return nn.Sequential(first, *(Block(width, width, 1) for _ in range(BLOCKS - 1)))
