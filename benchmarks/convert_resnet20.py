"""Convert a CIFAR ResNet-20 from .npz (PyTorch state-dict names) to the safetensors file a teacher reads.

python benchmarks/convert_resnet20.py cifar10_resnet20.npz out.safetensors
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch

from distillery import nets
from distillery.errors import DistilleryError, UserError
from distillery.nets import pretrained


def convert(source: Path, out: Path) -> int:
    """Check the arrays against ResNet-20 and write them; returns the number of trainable numbers.

    Raises:
        UserError: not an .npz of plain arrays, or arrays that do not fit ResNet-20.
    """
    try:
        with np.load(source, allow_pickle=False) as arrays:
            state = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    except (OSError, ValueError, TypeError, AttributeError, BadZipFile) as error:
        raise UserError(f"{source}: not an .npz of plain arrays ({error})") from error
    classes = len(state["linear.bias"]) if "linear.bias" in state else 10
    net = nets.build("resnet20", classes, 32)
    pretrained.fill(net, state, str(source), "resnet20")
    pretrained.save(net, out)
    return sum(p.numel() for p in net.parameters())


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("npz", type=Path)
    parser.add_argument("out", type=Path)
    given = parser.parse_args(arguments)
    try:
        count = convert(given.npz, given.out)
    except DistilleryError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(f"{given.out}: ResNet-20 with {count:,} trainable numbers")
    return 0


if __name__ == "__main__":
    sys.exit(main())
