"""Which groups of a recover loop go through the teacher together, where, and whether they fit.

Legend: a group's images are optimised together (see `_contract.Group`); a pack is some groups of equal shape that share
calls of the teacher; the crew are the places where packs are worked on at the same time.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from distillery.device import Compute
from distillery.errors import UserError
from distillery.methods._contract import Group, Teacher

if TYPE_CHECKING:
    from distillery.track import Track

# Images of a pack on a CPU: a group goes alone. There a layer's last bit depends on how many images share its call
# (Linear below four images, any batch with several threads), the loop makes visible differences of last bits, and a
# group must be the same in whatever part it is made. A pack of 10 groups of 10 would save 10 to 25 % of the time.
CPU_IMAGES = 1
SMALL_PIXELS = 32 * 32**2  # of a group: below this a CPU works on several groups side by side
MEMORY_SHARE = 0.8  # of the free memory that a pack may fill
CGROUP, UNKNOWN = Path("/sys/fs/cgroup"), 2**62


def planned_bytes(images: int, size: int, net_bytes: int) -> int:
    """Memory of a pack: activations, and pixels, gradient and Adam's two moments in fp32."""
    return images * (net_bytes + 8 * 3 * size * size * 4)


def layout(
    name: str,
    part: Sequence[Group],
    teacher: Teacher,
    net_bytes: int,
    track: Track,
    *,
    alone: bool = False,
    same_slots: bool = False,
) -> list[list[Group]]:
    """Consecutive groups of equal shape that share calls of the teacher; says the planned peak.

    Args:
        name: the method.
        part: the groups.
        teacher: its device has the memory.
        net_bytes: all activations of one image.
        track: is told the plan.
        alone: every group needs weights of its own.
        same_slots: only groups with the same slots may share.

    Raises:
        UserError: the memory does not hold one group.
    """
    largest = max(len(group.images) for group in part)
    free = free_bytes(teacher.compute.device)
    per_image = planned_bytes(1, teacher.size, net_bytes)
    fitting = int(MEMORY_SHARE * free) // per_image
    if fitting < largest:
        raise UserError(
            f"{name}: one group of {largest} images needs about {largest * per_image / 2**30:.1f} GiB and "
            f"{free / 2**30:.1f} GiB are free on {teacher.compute.device}; lower {_remedy(part)}, or use precision: "
            "bf16"
        )
    most = min(fitting, CPU_IMAGES) if teacher.compute.device.type == "cpu" else fitting
    packs: list[list[Group]] = []
    for group in part:
        last = packs[-1] if packs else []
        alike = bool(last) and _shape(last[0]) == _shape(group)
        if alike and same_slots:
            alike = last[0].slots == group.slots
        if alike and not alone and (len(last) + 1) * len(group.images) <= most:
            last.append(group)
        else:
            packs.append([group])
    images = max(sum(len(group.images) for group in pack) for pack in packs)
    track.note(
        f"{name}: {len(part)} groups of up to {largest} images in {len(packs)} packs, planned peak "
        f"{images * per_image / 2**30:.2f} of {free / 2**30:.1f} GiB"
    )
    return packs


def _remedy(part: Sequence[Group]) -> str:
    """What makes the largest group smaller."""
    largest = max(part, key=lambda group: len(group.images))
    if len(largest.classes) > 1:
        return f"its option batch (now groups of {len(largest.images)})"
    return f"ipc (a group holds {len(largest.images)} images of one class)"


def cut(part: Sequence[Group], sizes: Sequence[int]) -> list[list[Group]]:
    """The packs of a run that is continued (the free memory may have changed since)."""
    ends = [sum(sizes[: place + 1]) for place in range(len(sizes))]
    return [list(part[end - size : end]) for end, size in zip(ends, sizes, strict=True)]


def _shape(group: Group) -> tuple[int, int]:
    return len(group.classes), len(group.slots)


def free_bytes(device: torch.device) -> int:
    """Memory that a pack may take: of the GPU, or of the machine or container, whichever has less."""
    if device.type == "cuda":
        # What earlier work freed stays with PyTorch, which gives it out again.
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return min(machine_bytes(), container_bytes(CGROUP))


def machine_bytes() -> int:
    try:
        with open("/proc/meminfo", encoding="utf-8") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return UNKNOWN  # not Linux


def container_bytes(cgroup: Path) -> int:
    """What a pod's memory limit leaves; pages of files do not count, the kernel drops them first."""
    try:
        limit = int((cgroup / "memory.max").read_text())  # the text is "max" where there is no limit
        used = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        return max(0, limit - int(used["anon"]))
    except (OSError, ValueError, KeyError):
        return UNKNOWN


def is_small(teacher: Mate, pack: Sequence[Group]) -> bool:
    """Whether a pack is worked on with one thread: sums over several threads differ from it in the last bit.

    This depends on the pack alone, so that its images do not depend on what is made before, after or beside it.
    """
    on_cpu = teacher.compute.device.type == "cpu"
    return on_cpu and all(len(group.images) * teacher.size**2 <= SMALL_PIXELS for group in pack)


def beside(teacher: Teacher, packs: Sequence[list[Group]]) -> int:
    """How many of the next packs are worked on at the same time."""
    if teacher.compute.device.type == "cuda":
        return len(packs)
    small = list(itertools.takewhile(lambda pack: is_small(teacher, pack), packs))
    return max(1, len(small))


def crew(teacher: Teacher, packs: list[list[Group]]) -> list[Mate]:
    """The teacher once for each place where packs are worked on at the same time.

    Several GPUs take packs in turn. On a CPU small groups are worked on side by side, one thread each: a convolution on
    few images gains little from a second thread.
    """
    device = teacher.compute.device
    if device.type == "cuda":
        own = torch.cuda.current_device() if device.index is None else device.index
        others = [place for place in range(torch.cuda.device_count()) if place != own][: len(packs) - 1]
        return [teacher, *(copy_of(teacher, torch.device("cuda", place)) for place in others)]
    places = min(torch.get_num_threads(), sum(is_small(teacher, pack) for pack in packs))
    return [teacher, *(copy_of(teacher, device) for _ in range(places - 1))]


def copy_of(teacher: Teacher, device: torch.device) -> Crewmate:
    """A teacher with nets of its own on a device."""
    compute = replace(teacher.compute, device=device)
    members = []
    for member in teacher.members:
        twin = copy.copy(member)
        for name, value in {"net": compute.place(copy.deepcopy(member.net)), "compute": compute}.items():
            object.__setattr__(twin, name, value)  # some teachers are frozen dataclasses
        members.append(twin)
    return Crewmate(members, compute, teacher.size, teacher.mean, teacher.std)


@dataclass(frozen=True)
class Crewmate:
    """What the loop reads of a teacher."""

    members: Sequence[Teacher]
    compute: Compute
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


Mate = Teacher | Crewmate
