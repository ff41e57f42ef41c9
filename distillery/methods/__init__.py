"""The methods: real images and a frozen teacher in, IPC images per class out.

A method is one module of this package and one line in `METHODS`. The module has

    NEEDS                 a `Needs`: whether it runs the teacher, whether a GPU is worth it
    Config                frozen, strict options under the field's names; the defaults are the paper's
    RECIPES               {(data set, ipc): options}; ipc 0 stands for any
    check(cfg, *, ipc, size, per_class)
                          raises UserError for values that cannot work. `per_class` holds the training images of each
                          class, None while they are not known
    estimate(cfg, *, ipc, classes, size, train=0)
                          {"forwards": images the teacher will see, "backwards": those of them whose gradient is
                          taken (may be left out), "peak_bytes": memory beyond the data and the net};
                          `train` is the number of real training images, 0 while it is not known
    groups(cfg, *, ipc, classes)
                          the independent parts of a set of `classes` classes; `classwise` where each class stands alone
    synthesize(cfg, real, teacher, *, ipc, seed, part, track)
                          a `Synthetic`: the images of the groups in `part`, ordered by class and slot

and holds to this:

- Any group made alone equals, bit for bit on CPU, the same images of a full run: randomness comes from
  `distillery.rng.generator(seed, METHOD, group)`, and what images share, they share within their group.
- Side effects go through `track` alone; a long loop saves its state there and continues from it with the same result.
  What it leaves there is cleared when the step has written the images.
- A teacher that gives NaN stops the method with `NonFiniteLoss`.
- It imports no other method; what several share lies in an underscore file.

`tests/test_methods.py` holds every entry of `METHODS` to this by itself; a new method adds the test of its equations.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from distillery.config import Options, parse
from distillery.errors import UserError, choices, nearest
from distillery.methods import cda, delt, dwa, gvbsm, median, random_real, rded, sre2l, sre2lpp, wmdd
from distillery.methods._contract import Group, Method, Needs, Teacher, classwise, in_order

METHODS: dict[str, Method] = {
    "random": random_real,
    "median": median,
    "rded": rded,
    "sre2l": sre2l,
    "cda": cda,
    "sre2lpp": sre2lpp,
    "dwa": dwa,
    "delt": delt,
    "gvbsm": gvbsm,
    "wmdd": wmdd,
}

# The accuracy that their authors publish was reached here in the authors' setting (docs/results); reports say so of
# all others. An entry needs such a result beside it.
REPRODUCED = ("rded",)

__all__ = [
    "METHODS",
    "REPRODUCED",
    "Group",
    "Method",
    "Needs",
    "Teacher",
    "classwise",
    "config_of",
    "cut",
    "find",
    "in_order",
    "module_name",
]


def find(name: str) -> Method:
    """The module of a method.

    Raises:
        UserError: no such method; names the nearest.
    """
    if name not in METHODS:
        raise UserError(f"method {name!r} is unknown{nearest(name, METHODS)}; known: {choices(METHODS)}")
    return METHODS[name]


def module_name(name: str) -> str:
    """Where a method's code is, below `distillery`: "random" -> "methods.random_real"."""
    module: Any = find(name)
    return str(module.__name__).removeprefix("distillery.")


def config_of(name: str, options: dict[str, Any], dataset: str, ipc: int) -> Options:
    """A method's options for one cell: `Config` < `RECIPES[dataset, 0]` < `RECIPES[dataset, ipc]` < `options`.

    Raises:
        UserError: unknown method, unknown or impossible option.
    """
    method = find(name)
    merged = {**method.RECIPES.get((dataset, 0), {}), **method.RECIPES.get((dataset, ipc), {}), **options}
    return parse(method.Config, merged, f"options of {name}")


def cut(name: str, groups: Sequence[Group], shards: int) -> list[list[Group]]:
    """A method's groups in `shards` runs of consecutive ones, whose lengths differ by at most one.

    Raises:
        UserError: fewer groups than shards.
    """
    if shards > len(groups):
        raise UserError(
            f"shards {shards}: {name} makes these images in {len(groups)} groups, and a group is the smallest part "
            f"that can be made alone; lower shards to at most {len(groups)}"
        )
    bounds = [shard * len(groups) // shards for shard in range(shards + 1)]
    return [list(groups[a:b]) for a, b in itertools.pairwise(bounds)]
