"""What each step's pod asks for: hardware profiles, what is changed by hand, and which steps need a GPU at all.

`plan` resolves all of it, so that cells, teachers and pieces carry final strings, as Kubernetes writes quantities. A
profile says what a step asks for that computes; steps of an experiment that need no GPU ask for none, whatever the
profile. What KFP takes only as a constant (shared memory, scratch, deadlines) stands in `pipelines/resources.py`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace

from distillery import methods
from distillery.config import Cell, Experiment
from distillery.errors import UserError, choices, nearest

CPU = re.compile(r"^\d+(\.\d+)?$|^\d+m$")
MEMORY = re.compile(r"^\d+(\.\d+)?([kMGT]|[KMGT]i)?$")
GPUS = re.compile(r"^\d*$")
CELL_STEPS = ("synthesize", "gather_pieces", "relabel", "evaluate_student")


@dataclass(frozen=True)
class Ask:
    """What one pod requests. `gpus` is "" for none: KFP then leaves the resource out, where "0" would name it."""

    cpu: str
    memory: str
    gpus: str = ""

    def __str__(self) -> str:
        gpus = f", {self.gpus} GPU{'s' * (self.gpus != '1')}" if self.gpus else ""
        return f"cpu {self.cpu}, memory {self.memory}{gpus}"


@dataclass(frozen=True)
class Profile:
    """One row of the table.

    Attributes:
        data: prepare_data.
        teachers: train_teacher, and gather_teachers where statistics are asked for.
        images: synthesize, a piece as well, of a method that computes.
        students: evaluate_student, and relabel where labels are stored.
        light: what is left of these steps when there is little to compute; never a GPU.
    """

    data: Ask
    teachers: Ask
    images: Ask
    students: Ask
    light: Ask


_A10, _A100, _H100 = Ask("6", "24Gi", "1"), Ask("10", "72Gi", "1"), Ask("20", "180Gi", "1")
_SOME, _MORE = Ask("2", "8Gi"), Ask("4", "16Gi")
# One GPU and its share of a usual machine, less what the node keeps: a10 of 8 CPUs and 32 GiB (g5.2xlarge), a100 of 12
# and 85 (a2-highgpu-1g), h100 of 24 and 234 (an eighth of a3-highgpu-8g and of p5.48xlarge).
PROFILES = {
    "cpu": Profile(data=Ask("4", "8Gi"), teachers=_MORE, images=_SOME, students=_SOME, light=_SOME),
    "a10": Profile(data=_MORE, teachers=_A10, images=_A10, students=_A10, light=_MORE),
    "a100": Profile(data=_MORE, teachers=_A100, images=_A100, students=_A100, light=_MORE),
    "h100": Profile(data=_MORE, teachers=_H100, images=_H100, students=_H100, light=_MORE),
    # Teachers and images on large GPUs; labels and students, of which there are most, on small ones.
    # A cell has one device, so its images and students must both have a GPU, or both none.
    "mixed": Profile(data=_MORE, teachers=_A100, images=_A100, students=_A10, light=_MORE),
}


@dataclass(frozen=True)
class Wish:
    """What was said when the run was submitted; "" leaves it to the profile, and the profile to the experiment."""

    profile: str = ""
    data_cpu: str = ""
    data_memory: str = ""
    teacher_cpu: str = ""
    teacher_memory: str = ""
    teacher_gpus: str = ""
    cell_cpu: str = ""
    cell_memory: str = ""
    cell_gpus: str = ""

    def __post_init__(self) -> None:
        shapes = {"cpu": (CPU, "4 or 500m"), "memory": (MEMORY, "16Gi"), "gpus": (GPUS, "0 or 1")}
        if self.profile and self.profile not in PROFILES:
            known = f"{nearest(self.profile, PROFILES)}; known: {choices(PROFILES)}"
            raise UserError(f"profile: {self.profile!r} is unknown{known}")
        for one in fields(self)[1:]:
            shape, example = shapes[one.name.rpartition("_")[2]]
            given = getattr(self, one.name)
            if given and not shape.match(given):
                raise UserError(f'{one.name}: {given!r} is no such quantity; write it like {example}, or "" for none')

    def change(self, part: str, ask: Ask) -> Ask:
        """The request of a part (data, teacher, cell) with what was given for it by hand; GPUs are `_with_gpus`'s."""
        cpu, memory = getattr(self, f"{part}_cpu"), getattr(self, f"{part}_memory")
        return replace(ask, cpu=cpu or ask.cpu, memory=memory or ask.memory)


def profile_of(wanted: Experiment, wish: Wish) -> Profile:
    """The row that counts for a run."""
    return PROFILES[wish.profile or wanted.profile]


def computes(step: str, cell: Cell) -> bool:
    """Whether a step of a cell has enough to compute to be worth a GPU."""
    if step == "synthesize":
        return methods.find(cell.method).NEEDS.gpu
    if step == "relabel":
        return cell.labels.mode == "stored" and any(one.recipe.regime == "soft" for one in cell.students)
    return step == "evaluate_student"


def device(asked: str, gpus: str, given: str) -> str:
    """The device of the steps whose pods ask for `gpus`.

    Where a GPU is asked for, it must be there: a step that finds none fails at once. Without one, `auto` stays what it
    is on this machine, which is what a laptop wants.

    Args:
        asked: the experiment's device.
        gpus: what the pods ask for.
        given: what was said by hand; "0" means the CPU.
    """
    if asked != "auto":
        return asked
    if gpus:
        return "cuda"
    return "cpu" if given else "auto"


def of_data(wanted: Experiment, wish: Wish) -> Ask:
    """The request of prepare_data."""
    return wish.change("data", profile_of(wanted, wish).data)


def of_teachers(wanted: Experiment, wish: Wish, *, working: bool = True) -> Ask:
    """The request of train_teacher, or of gather_teachers, which works only where statistics are asked for.

    Raises:
        UserError: device cuda, and teacher_gpus 0.
    """
    row = profile_of(wanted, wish)
    ask = _with_gpus(row.teachers if working else row.light, wanted.device, wish.teacher_gpus, "teacher", working)
    return wish.change("teacher", ask)


def for_teachers(wanted: Experiment, wish: Wish) -> Experiment:
    """The experiment as the teachers' pods see it: their profile and device."""
    gpus = of_teachers(wanted, wish).gpus
    update = {"profile": wish.profile or wanted.profile, "device": device(wanted.device, gpus, wish.teacher_gpus)}
    return wanted.model_copy(update=update)


def of_cell(wanted: Experiment, cell: Cell, wish: Wish) -> dict[str, Ask]:
    """The request of each of a cell's steps.

    Raises:
        UserError: device cuda, and cell_gpus 0.
    """
    row, found = profile_of(wanted, wish), {}
    for step in CELL_STEPS:
        working, heavy = computes(step, cell), row.images if step == "synthesize" else row.students
        ask = _with_gpus(heavy if working else row.light, wanted.device, wish.cell_gpus, "cell", working)
        found[step] = wish.change("cell", ask)
    return found


def placed(wanted: Experiment, cell: Cell, wish: Wish | None) -> Cell:
    """A cell with the requests of its pods; without a wish its device stays, because no pod was asked for."""
    asks = of_cell(wanted, cell, wish or Wish())
    pods = {f"{step}_{name}": value for step, ask in asks.items() for name, value in vars(ask).items()}
    if wish is not None:
        pods["device"] = device(wanted.device, asks["evaluate_student"].gpus, wish.cell_gpus)
    return cell.model_copy(update=pods)


def table(wanted: Experiment, cells: list[Cell], gathering: bool) -> str:
    """What each step's pod asks for, in lines; steps whose cells differ have one for each request.

    Args:
        wanted: the experiment.
        cells: its cells, with their requests.
        gathering: whether gather_teachers has statistics to make.
    """
    wish = Wish()
    lines = {"prepare_data": {str(of_data(wanted, wish)): [""]}}
    lines["train_teacher"] = {str(of_teachers(wanted, wish)): [""]}
    lines["gather_teachers"] = {str(of_teachers(wanted, wish, working=gathering)): [""]}
    for step in CELL_STEPS:
        lines[step] = {}
        for cell in cells:
            if step == "gather_pieces" and cell.shards == 1:
                continue
            ask = Ask(*(getattr(cell, f"{step}_{one.name}") for one in fields(Ask)))
            names = lines[step].setdefault(str(ask), [])
            names += [cell.method] if cell.method not in names else []
    said = []
    for step, asks in lines.items():
        for text, names in asks.items():
            said.append(f"  {step:16s} {text}" + (f"  ({', '.join(names)})" if len(asks) > 1 else ""))
    return "\n".join([f"pods under profile {wanted.profile} (--set profile={'|'.join(PROFILES)}):", *said])


def _with_gpus(ask: Ask, asked: str, given: str, part: str, working: bool) -> Ask:
    """A request with the GPUs of its step: none without work, none on CPUs, at least one where CUDA is a must."""
    if not working or asked == "cpu":
        return replace(ask, gpus="")
    gpus = (given or ask.gpus or ("1" if asked == "cuda" else "")).lstrip("0")
    if asked == "cuda" and not gpus:
        raise UserError(
            f"{part}_gpus: {given!r} beside device: cuda; leave {part}_gpus empty or give 1, or set device: cpu"
        )
    return replace(ask, gpus=gpus)
