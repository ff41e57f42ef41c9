"""The recover loop: optimise images until a frozen teacher finds its own statistics in them.

One loop for the whole family (SRe2L, CDA, SRe2L++, DWA, DELT, G-VBSM, WMDD); a method's file declares a `Recovery` and
says which images share a `Group`. Each step of a group: draw a view, loss = CE + the taps' losses (`_matching`) + the
method's own terms, one Adam step on the pixels (betas .5, .9), clamp to the range of real pixels. The last iterate is
kept as uint8.

What makes it fast changes no image: the teacher is frozen, so nothing is computed for its weights; a group's images
meet those of other groups only in the same call of the teacher, so as many groups as a GPU's memory allows share one
(a pack); statistics need no autograd graph; losses are looked at every `LOOK` steps.

Legend: M iterations, G groups in a pack, c classes of a group, s images of a class, n = c * s, S side.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from distillery.data import augment
from distillery.data.synthetic import Synthetic
from distillery.errors import NonFiniteLoss, UserError
from distillery.methods import _packs, _selection
from distillery.methods._contract import Group, Teacher, in_order
from distillery.methods._matching import Switch, Tap, norm_taps, norms, tapped
from distillery.methods._views import ViewLaw, Views, back, draw, matrices, see
from distillery.nets import head
from distillery.rng import generator

if TYPE_CHECKING:
    from distillery.data.real import Real
    from distillery.track import Track

BETAS, EPS = (0.5, 0.9), 1e-8
LOOK = 50  # steps between looks at the losses: each look waits for the device
STRIDE_PIXELS = 2**18  # image pixels of a group between two looks at the clock


@dataclass(frozen=True)
class Seen:
    """What a method's own term is computed from, for one step of a pack.

    Attributes:
        views: [G, n, 3, S, S] normalised views; the gradient flows through them.
        logits: [G, n, classes] float32.
        features: [G, n, D] float32, what goes into the layer that makes the logits.
        groups: the G groups.
        slots: how many images of each class are active (they lie class after class).
        step: which iteration.
    """

    views: Tensor
    logits: Tensor
    features: Tensor
    groups: Sequence[Group]
    slots: int
    step: int


Taps = Callable[[Teacher, Sequence[Group]], tuple[list[Tap], int]]
Term = Callable[[Seen], Tensor]


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """What a method declares.

    Attributes:
        name: the method, in errors and as the address of its random streams.
        iterations: M.
        lr: base learning rate, on normalised pixels.
        law: how views are drawn.
        init: a group's first images [c, s, 3, S, S], normalised; called once per group.
        taps: the taps of one teacher for a pack's groups, and the segments of one group (1: a group's images are
            matched together); default: BatchNorm inputs against the running statistics, weighted by `r_bn`, `r_var`
            and `first_bn`.
        r_bn, r_var, first_bn: see `_matching.norm_taps`.
        norms: every teacher must have BatchNorm (G-VBSM has convolutions to match besides).
        r_ce: weight of the cross-entropy.
        terms: the method's own losses by name, each Seen -> [G].
        factor: [M] factors on the learning rate; default: half a cosine from 1 to 0.
        starts: first iteration of each slot, rising from 0 (DELT); default: all at 0.
        restarts: iterations at which the optimiser starts anew.
        ascent: (rho, K) of DWA's directed weight adjustment.
    """

    name: str
    iterations: int
    lr: float
    law: ViewLaw
    init: Callable[[Group], Tensor]
    taps: Taps | None = None
    r_bn: float = 0.0
    r_var: float = 1.0
    first_bn: float = 10.0
    norms: bool = True
    r_ce: float = 1.0
    terms: dict[str, Term] = field(default_factory=dict)
    factor: Tensor | None = None
    starts: tuple[int, ...] = ()
    restarts: tuple[int, ...] = ()
    ascent: tuple[float, int] | None = None

    def active(self, slots: range, step: int) -> int:
        """How many of a group's slots move at an iteration."""
        return sum(self.starts[slot] <= step for slot in slots) if self.starts else len(slots)

    def rates(self) -> Tensor:
        """Learning rate at each iteration, [M] float64."""
        return self.lr * (cosine(self.iterations) if self.factor is None else self.factor)


def cosine(iterations: int) -> Tensor:
    """Half a cosine from 1 to 0, [M] float64."""
    return (1 + torch.cos(math.pi * torch.arange(iterations, dtype=torch.float64) / iterations)) / 2


def one_per_class(classes: int, ipc: int, batch: int) -> list[Group]:
    """SRe2L's groups: one image of each of up to `batch` consecutive classes."""
    chunks = [tuple(range(at, min(classes, at + batch))) for at in range(0, classes, batch)]
    return [Group(chunk, range(slot, slot + 1)) for chunk in chunks for slot in range(ipc)]


def class_major(classes: int, ipc: int, batch: int, parts: int = 1) -> list[Group]:
    """DELT's, G-VBSM's and WMDD's groups: all IPC images of as many consecutive classes as `batch` holds.

    With several parts (G-VBSM on Tiny), a class's images fall into that many runs of consecutive ones, and each run
    meets its own classes.
    """
    run = math.ceil(ipc / parts)
    step = max(1, batch // run)
    return [
        Group(tuple(range(at, min(classes, at + step))), range(slot, min(ipc, slot + run)))
        for slot in range(0, ipc, run)
        for at in range(0, classes, step)
    ]


def noise(name: str, seed: int, size: int) -> Callable[[Group], Tensor]:
    """First images N(0, 1) in normalised space, a stream for each group."""

    def init(group: Group) -> Tensor:
        shape = (len(group.classes), len(group.slots), 3, size, size)
        return torch.randn(shape, generator=generator(seed, name, "init", group.name))

    return init


def given(images_u8: dict[int, Tensor], teacher: Teacher) -> Callable[[Group], Tensor]:
    """First images from real ones: class -> [IPC, 3, S, S] uint8."""

    def init(group: Group) -> Tensor:
        own = torch.stack([images_u8[cls][list(group.slots)] for cls in group.classes])
        flat = augment.normalise(own.flatten(0, 1), teacher.mean, teacher.std)
        return flat.view(own.shape).contiguous()

    return init


def once(track: Track, make: Callable[[Track], dict[int, Tensor]]) -> dict[int, Tensor]:
    """First images of each class, chosen once and kept beside the checkpoint until the step ends."""
    chosen = track.child("chosen")
    kept = chosen.load(quiet=True)
    if kept is not None:
        return {int(cls): images for cls, images in kept[0].items()}
    choosing = track.child("choosing")
    found = make(choosing)
    chosen.save({str(cls): images for cls, images in found.items()}, {})
    choosing.clear()
    return found


def classes_in(part: Sequence[Group]) -> list[int]:
    """The classes of a part, ascending."""
    return sorted({cls for group in part for cls in group.classes})


def check_norms(name: str, teacher: Teacher, needed: bool = True) -> None:
    """Refuse teachers with BatchNorm that kept no statistics and, where it is needed, teachers without BatchNorm.

    Raises:
        UserError: names the net.
    """
    for member in teacher.members:
        lacking = [m for m in norms(member.net) if m.running_mean is None]
        if lacking or (needed and not norms(member.net)):
            raise UserError(
                f"{name} matches BatchNorm statistics, and the teacher {type(member.net).__name__} has "
                f"{'BatchNorm layers without running statistics' if lacking else 'no BatchNorm2d layer'}; choose a "
                "teacher net with BatchNorm, or a method that needs none (rded, median, random)"
            )


def recover(recovery: Recovery, real: Real, teacher: Teacher, part: Sequence[Group], seed: int, track: Track) -> Tensor:
    """Run the loop over some groups.

    Args:
        recovery: what the method declares.
        real: gives the number of classes and the image size, which the teacher must share.
        teacher: one, or several that take turns, one an iteration.
        part: the groups to make.
        seed: of views (and of the method's `init`).
        track: progress and checkpoints; a killed loop continues to the same images (bit for bit on CPU).

    Returns:
        [images, 3, S, S] uint8 on the CPU, ordered by class and slot.

    Raises:
        UserError: a teacher for other data, or memory too small for one group.
        NonFiniteLoss: names group, step and term.
    """
    check_norms(recovery.name, teacher, recovery.norms)
    net_bytes = _selection.look(teacher, real).all_bytes
    shelf = _Shelf(track)
    if shelf.sizes:
        packs = _packs.cut(part, shelf.sizes)
    else:
        name, apart, late = recovery.name, recovery.ascent is not None, bool(recovery.starts)
        packs = _packs.layout(name, part, teacher, net_bytes, track, alone=apart, same_slots=late)
        shelf.sizes = [len(pack) for pack in packs]
    crew, total = _packs.crew(teacher, packs), len(packs) * recovery.iterations
    pixels = max(len(group.images) for group in part) * teacher.size**2
    stride = max(1, min(LOOK, STRIDE_PIXELS // pixels))
    with ThreadPoolExecutor(len(crew)) as pool:
        while (at := len(shelf.done)) < len(packs):
            side = min(_packs.beside(teacher, packs[at : at + len(crew)]), shelf.together or len(crew))
            runs = [_Pack(recovery, mate, pack, seed) for mate, pack in zip(crew[:side], packs[at:], strict=False)]
            step = shelf.take_up(runs)
            with contextlib.ExitStack() as stack:
                for run in runs:
                    stack.enter_context(run.ready())
                while step < recovery.iterations:
                    step = min(recovery.iterations, step + stride)
                    _together(pool, runs, step)
                    track.log(at * recovery.iterations + len(runs) * step, total, **runs[0].said)
                    if track.due() and step < recovery.iterations:
                        shelf.keep(runs, step)
            shelf.done += [run.images_u8() for run in runs]
            if track.due() or len(shelf.done) == len(packs):  # until the caller has written the images, they lie here
                shelf.keep([], 0)
    made = dict(zip([image for group in part for image in group.images], torch.cat(shelf.done), strict=True))
    return torch.stack([made[image] for image in in_order(part)])


class _Shelf:
    """What a killed loop finds again: the images of finished packs, and the state of those at work.

    Attributes:
        done: images of the finished packs.
        sizes: groups of each pack; empty while nothing was kept.
        together: packs at work at the last checkpoint; 0 when there were none, or they have been taken up.
    """

    def __init__(self, track: Track) -> None:
        self._track, self._parts, self._stored = track, 0, 0  # parts written, and the finished packs in them
        self._state, self._step = dict[str, Tensor](), 0
        self.done, self.sizes, self.together = list[Tensor](), list[int](), 0
        kept = track.load()
        if kept is None:
            return
        done: list[Tensor] = []
        for part in range(int(kept[1]["parts"])):
            found = self._finished(part).load(quiet=True)
            if found is None:
                track.note("the images of finished groups are lost; starting this step from its beginning")
                return
            done += [found[0][place] for place in sorted(found[0], key=int)]
        self._state, self._step, self._parts = kept[0], int(kept[1]["step"]), int(kept[1]["parts"])
        self.done, self.sizes, self.together = done, list(kept[1]["sizes"]), int(kept[1]["together"])
        self._stored = len(done)

    def take_up(self, runs: Sequence[_Pack]) -> int:
        """Bring the first packs to where they were; the step they are at."""
        if not self.together:
            return 0
        for place, run in enumerate(runs):
            prefix = f"run{place}/"
            own = {k.removeprefix(prefix): tensor for k, tensor in self._state.items() if k.startswith(prefix)}
            run.restore(own, self._step)
        self._state, self.together = {}, 0
        return self._step

    def keep(self, runs: Sequence[_Pack], step: int) -> None:
        """Write a checkpoint: images that were finished since the last one, once, and the packs at work."""
        if len(self.done) > self._stored:
            fresh = {str(place): self.done[place] for place in range(self._stored, len(self.done))}
            self._finished(self._parts).save(fresh, {})
            self._stored, self._parts = len(self.done), self._parts + 1
        tensors: dict[str, Tensor] = {}
        for place, run in enumerate(runs):
            run.look()  # never a checkpoint behind a bad loss
            tensors |= {f"run{place}/{name}": tensor for name, tensor in run.state().items()}
        values = {"parts": self._parts, "together": len(runs), "step": step, "sizes": self.sizes}
        self._track.save(tensors, values)

    def _finished(self, part: int) -> Track:
        return self._track.child(f"finished{part}")


def _together(pool: ThreadPoolExecutor, runs: Sequence[_Pack], step: int) -> None:
    """Bring every run to a step: a large one on a CPU with all threads, small ones with one thread each."""
    if len(runs) == 1 and not _packs.is_small(runs[0].teacher, runs[0].groups):
        runs[0].reach(step)
        return
    waiting = [pool.submit(_alone, run, step) for run in runs]
    for each in waiting:
        each.result()


def _alone(run: _Pack, step: int) -> None:
    if run.teacher.compute.device.type == "cpu":
        torch.set_num_threads(1)  # of this thread: the others compute beside it
    run.reach(step)


def as_set(images_u8: Tensor, part: Sequence[Group], **extras: Tensor) -> Synthetic:
    """The recovered images of a part as a set."""
    return Synthetic(images_u8, torch.tensor([cls for cls, _ in in_order(part)]), dict(extras))


class _Pack:
    """Groups that go through the loop together."""

    def __init__(self, recovery: Recovery, teacher: _packs.Mate, groups: list[Group], seed: int) -> None:
        self.recovery, self.teacher, self.groups = recovery, teacher, groups
        device, size = teacher.compute.device, teacher.size
        double = any(p.dtype == torch.float64 for member in teacher.members for p in member.net.parameters())
        pixels = torch.float64 if double else torch.float32
        self.first = torch.stack([recovery.init(group) for group in groups]).to(device, pixels)
        self.views: list[Views] = [
            draw(recovery.law, recovery.iterations, size, generator(seed, recovery.name, "views", group.name))
            for group in groups
        ]
        self.classes = torch.tensor([group.classes for group in groups], device=device)
        mean, std = (torch.tensor(v, device=device, dtype=pixels).view(3, 1, 1) for v in (teacher.mean, teacher.std))
        self.low, self.high = -mean / std, (1 - mean) / std
        self.mean, self.std = mean, std
        self.rates = recovery.rates().tolist()
        self.turns = [_Turn(recovery, member, groups) for member in teacher.members]
        self.step, self.age = 0, 0
        self.records: list[tuple[int, tuple[str, ...], Tensor]] = []
        self.said: dict[str, float | str] = {}
        active = recovery.active(groups[0].slots, 0)
        self.x = self.first[:, :, :active].clone(memory_format=torch.contiguous_format)
        self.m, self.v = torch.zeros_like(self.x), torch.zeros_like(self.x)

    @contextlib.contextmanager
    def ready(self) -> Iterator[None]:
        """Taps at their layers, and weights adjusted where the method asks for it; all undone afterwards."""
        with contextlib.ExitStack() as stack:
            for turn in self.turns:
                stack.enter_context(tapped(turn.taps, turn.switch))
                if self.recovery.ascent:
                    stack.enter_context(self._ascended(turn.member, *self.recovery.ascent))
            yield

    def advance(self) -> None:
        """One step of every group of the pack."""
        recovery, step = self.recovery, self.step
        self._activate()
        if step in recovery.restarts:
            self.m.zero_()
            self.v.zero_()
            self.age = 0
        rows, columns = matrices(self.views, step, self.teacher.size, self.x.device)
        flat = self.x.flatten(1, 2)
        views = see(flat, rows, columns).requires_grad_()
        loss, names, values = self._loss(views, step)
        (gradient,) = torch.autograd.grad(loss, views)
        self.records.append((step, names, values))
        self._adam(back(gradient, rows, columns).view_as(self.x), self.rates[step])
        self.step += 1

    def reach(self, step: int) -> None:
        """Advance to a step, with looks at the losses on the way."""
        while self.step < step:
            self.advance()
            if self.step % LOOK == 0 or self.step == self.recovery.iterations:
                self.look()

    def look(self) -> None:
        """Fetch the losses since the last look and stop at one that is not a number.

        Raises:
            NonFiniteLoss: names group, step and term.
        """
        records, self.records = self.records, []
        if not records:
            return
        sizes = [len(names) for _, names, _ in records]
        for (step, names, _), values in zip(
            records, torch.cat([v for _, _, v in records]).cpu().split(sizes), strict=True
        ):
            bad = (~values.isfinite()).nonzero()
            if len(bad):
                term, group = bad[0].tolist()
                raise NonFiniteLoss(
                    f"{self.recovery.name}: {names[term]} is {float(values[term, group])} at step {step} for "
                    f"{self.groups[group].name}; check the teacher's weights and its normalisation, lower lr (now "
                    f"{self.recovery.lr}), or use precision: fp32"
                )
            self.said = {
                name: round(float(value), 4) for name, value in zip(names, values.double().mean(1), strict=True)
            }

    def images_u8(self) -> Tensor:
        """[images, 3, S, S] uint8, group after group, class after class."""
        pixels = (self.x * self.std + self.mean) * 255
        return pixels.round_().clamp_(0, 255).to(torch.uint8).flatten(0, 2).cpu()

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds of this pack."""
        held = {"x": self.x, "m": self.m, "v": self.v, "age": torch.tensor(self.age)}
        for number, turn in enumerate(self.turns):
            for place, tap in enumerate(turn.taps):
                held |= {f"tap/{number}/{place}/{name}": tensor for name, tensor in tap.state.items()}
        return held

    def restore(self, tensors: dict[str, Tensor], step: int) -> None:
        """Take a checkpoint up."""
        device = self.x.device
        self.x, self.m, self.v = (tensors[name].to(device) for name in ("x", "m", "v"))
        self.age, self.step = int(tensors["age"]), step
        for name, tensor in tensors.items():
            if name.startswith("tap/"):
                _, number, place, key = name.split("/", 3)
                self.turns[int(number)].taps[int(place)].state[key] = tensor.to(device)

    def _activate(self) -> None:
        """Let images whose time has come join; until then they cost nothing."""
        now, wanted = self.x.shape[2], self.recovery.active(self.groups[0].slots, self.step)
        if wanted > now:
            fresh = self.first[:, :, now:wanted]
            self.x = torch.cat([self.x, fresh], dim=2)
            self.m, self.v = (torch.cat([held, torch.zeros_like(fresh)], dim=2) for held in (self.m, self.v))

    def _loss(self, views: Tensor, step: int) -> tuple[Tensor, tuple[str, ...], Tensor]:
        """The loss to differentiate (the taps add their own gradients), names of the terms, and their values [T, G]."""
        recovery, groups = self.recovery, len(self.groups)
        turn = self.turns[step % len(self.turns)]
        with turn.switch.on(groups * turn.segments, step), turn.watched() as features:
            logits = turn.logits(views.flatten(0, 1)).view(groups, views.shape[1], -1)
        targets = self.classes[:, :, None].expand(-1, -1, self.x.shape[2]).flatten(1)
        each = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
        terms = {"cross-entropy": recovery.r_ce * each.mean(1)}
        if recovery.terms:
            inner = features[-1].float().view(groups, views.shape[1], -1)
            seen = Seen(views, logits, inner, self.groups, self.x.shape[2], step)
            terms |= {name: term(seen) for name, term in recovery.terms.items()}
        loss = torch.stack(list(terms.values())).sum()
        if turn.switch.found:
            matched = torch.stack(turn.switch.found).sum(0).view(groups, turn.segments).sum(1)
            terms["statistics loss"] = matched.to(loss.dtype)
        return loss, tuple(terms), torch.stack(list(terms.values())).detach()

    def _adam(self, gradient: Tensor, lr: float) -> None:
        self.age += 1
        self.m.lerp_(gradient, 1 - BETAS[0])
        self.v.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
        scale = self.v.sqrt().div_(math.sqrt(1 - BETAS[1] ** self.age)).add_(EPS)
        self.x.addcdiv_(self.m, scale, value=-lr / (1 - BETAS[0] ** self.age))
        self.x.clamp_(self.low, self.high)

    @contextlib.contextmanager
    def _ascended(self, member: Teacher, rho: float, steps: int) -> Iterator[None]:
        """DWA: K normalised gradient steps up the CE of the first images, of length rho in all; buffers stay.

        The weights depend on the first images and the first view alone, so a continued run finds them again.
        """
        weights: list[Tensor] = list(member.net.parameters())
        before = [weight.detach().clone() for weight in weights]
        rows, columns = matrices(self.views, 0, self.teacher.size, self.x.device)
        images = see(self.first.flatten(1, 2), rows, columns).flatten(0, 1)
        targets = self.classes[:, :, None].expand(-1, -1, self.first.shape[2]).flatten()
        try:
            for weight in weights:
                weight.requires_grad_(True)
            for _ in range(steps):
                loss = functional.cross_entropy(_logits(member, images), targets)
                gradients = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
                length = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients])) + 1e-12
                with torch.no_grad():
                    torch._foreach_add_(weights, [g * (rho / steps / length) for g in gradients])
            for weight in weights:
                weight.requires_grad_(False)
            yield
        finally:
            with torch.no_grad():
                for weight, old in zip(weights, before, strict=True):
                    weight.requires_grad_(False).copy_(old)


class _Turn:
    """One teacher at work: its taps, its segments and its features."""

    def __init__(self, recovery: Recovery, member: Teacher, groups: Sequence[Group]) -> None:
        self.member, self.switch = member, Switch()
        if recovery.taps is not None:
            self.taps, self.segments = recovery.taps(member, groups)
        else:
            self.taps = norm_taps(member.net, r_bn=recovery.r_bn, r_var=recovery.r_var, first_bn=recovery.first_bn)
            self.segments = 1
        self.watches = bool(recovery.terms)

    def logits(self, x_norm: Tensor) -> Tensor:
        """[B, 3, S, S] -> [B, C] float32, with gradients to the images."""
        return _logits(self.member, x_norm)

    @contextlib.contextmanager
    def watched(self) -> Iterator[list[Tensor]]:
        """Collect what goes into the layer that makes the logits, averaged over space where it is a map."""
        if not self.watches:
            yield []
            return
        with head.watched(self.member.net) as found:
            yield found


def _logits(member: Teacher, x_norm: Tensor) -> Tensor:
    """As `Frozen.logits`, with gradients."""
    with member.compute.autocast():
        out: Tensor = member.net(member.compute.images(x_norm))
    return out if out.dtype == torch.float64 else out.float()


def work(steps: int, images: int, size: int, scored: int = 0) -> dict[str, int]:
    """An estimate for `images` images that take `steps` steps in all, after `scored` images were looked at once.

    Memory: pixels with gradient and moments in fp32 beside the set itself.
    """
    return {"forwards": steps + scored, "backwards": steps, "peak_bytes": images * 3 * size * size * (1 + 8 * 4)}
