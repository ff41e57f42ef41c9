"""Where the arithmetic happens: device, precision and memory layout, chosen once and said aloud."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import platform
import resource
import sys
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import nn

from distillery.errors import UserError, choices

DEVICES = ("auto", "cpu", "cuda")
PRECISIONS = ("auto", "fp32", "bf16")
Net = TypeVar("Net", bound=nn.Module)


@dataclass(frozen=True)
class Compute:
    """A device and the precision of its matrix work; parameters, pixels and optimisers stay fp32."""

    device: torch.device
    dtype: torch.dtype
    asked: str = field(default="", compare=False)  # the device's name in the experiment

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """Autocast to `dtype` for convolutions and matrix products; nothing in fp32."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def place(self, net: Net) -> Net:
        """The net on the device in channels-last layout (what fast convolutions read)."""
        return net.to(device=self.device, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]

    def images(self, x: torch.Tensor) -> torch.Tensor:
        """Images [N, 3, H, W] of any dtype on the device, channels last."""
        return x.to(self.device, memory_format=torch.channels_last, non_blocking=True)

    @property
    def precision(self) -> str:
        """The name used in experiments: fp32 or bf16."""
        return "bf16" if self.dtype == torch.bfloat16 else "fp32"


def choose(device: str = "auto", precision: str = "auto", *, working: bool = True) -> Compute:
    """Resolve device and precision.

    Args:
        device: auto (CUDA when present), cpu or cuda.
        precision: auto (bf16 on CUDA, fp32 on CPU), fp32 or bf16.
        working: whether anything will be computed; if not, CUDA may be named where there is none.

    Raises:
        UserError: unknown name, or CUDA asked for and absent. It never falls back silently.
    """
    if device not in DEVICES:
        raise UserError(f"device: {device!r} is not one of {choices(DEVICES)}")
    if precision not in PRECISIONS:
        raise UserError(f"precision: {precision!r} is not one of {choices(PRECISIONS)}")
    if device == "cuda" and working and not torch.cuda.is_available():
        raise UserError(
            "device: 'cuda' was asked for (by the experiment, or because the pod asks for a GPU), but this torch "
            f"({torch.__version__}) sees no CUDA device; check the driver with nvidia-smi and that the image has a "
            "torch for it, request a GPU for this step, or accept the CPU: device: cpu, and on a cluster profile cpu"
        )
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if kind == "cpu":
        _keep_freed_memory()
    wanted = ("bf16" if kind == "cuda" else "fp32") if precision == "auto" else precision
    return Compute(torch.device(kind), torch.bfloat16 if wanted == "bf16" else torch.float32, device)


def hardware(compute: Compute) -> str:
    """One line that says what the work ran on; where CUDA is only named, its name."""
    if compute.device.type == "cuda" and not torch.cuda.is_available():
        return f"cuda, {compute.precision}"
    if compute.device.type == "cuda":
        return f"{torch.cuda.get_device_name(compute.device)}, {compute.precision}"
    return f"{_cpu_name()}, {torch.get_num_threads()} threads, {compute.precision}"


def watch_memory(compute: Compute | None) -> None:
    """Start a new peak of memory; where the kernel does not let a process do that, the old one stays."""
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w", encoding="ascii") as peak:
        peak.write("5")
    if compute and compute.device.type == "cuda" and torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats(compute.device)


def peak_memory(compute: Compute | None) -> dict[str, int]:
    """Bytes held at most since `watch_memory`: `ram` of this process, and `gpu` as torch allocated it."""
    found = {"ram": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="ascii") as lines:
        peaks = [1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]
        found["ram"] = peaks[0] if peaks else found["ram"]
    if compute and compute.device.type == "cuda" and torch.cuda.is_available():
        found["gpu"] = torch.cuda.max_memory_allocated(compute.device)
    return found


@functools.cache
def _keep_freed_memory() -> None:
    """Stop glibc from returning large blocks to the kernel after every operation.

    Activations are freed and allocated again thousands of times; with glibc's defaults each time is a mapping whose
    pages fault in anew, which costs up to half of a ConvNet's training step. Changes no numbers.
    """
    if not sys.platform.startswith("linux") or platform.libc_ver()[0] != "glibc":
        return
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4  # malloc.h
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(m_mmap_max, 0)
    mallopt(m_trim_threshold, 2**31 - 1)
    mallopt(m_top_pad, 64 * 2**20)


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        return names[0] if names else platform.machine()
    except OSError:
        return platform.processor() or platform.machine()
