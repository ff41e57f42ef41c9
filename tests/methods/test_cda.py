"""CDA is SRe2L under a crop curriculum (reference 3.5)."""

import math
from typing import Any

import pytest
import torch
from _plain import SIZE, deep_teacher, labels_of, plain, through, to_u8
from _toys import toy_pixels

from distillery.methods import cda
from distillery.methods._views import ViewLaw, draw
from distillery.rng import generator
from distillery.track import Track

M = 10


def heights(mode: str, milestone: float) -> torch.Tensor:
    """Lower bound of the area at each iteration, as the paper's table of curricula has it."""
    found = []
    for t in range(M):
        done = t / (milestone * M)
        fall = {"cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done, "step": 1.0}[mode]
        found.append(0.08 + 0.92 * fall if done < 1 else 0.08)
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mode": "linear", "milestone": 0.5, "lr": 0.1, "r_bn": 2.0, "first_bn": 3.0},
        {"mode": "step", "milestone": 0.3, "jitter": 0},
    ],
    ids=["cosine", "linear", "step"],
)
def test_cda_is_the_plain_loop_under_its_curriculum(options: dict[str, Any]) -> None:
    teacher = deep_teacher()
    cfg = cda.Config(**{"iterations": M, "jitter": 2, "batch": 2} | options)
    part = cda.groups(cfg, ipc=1, classes=4)
    found = cda.synthesize(cfg, toy_pixels(), teacher, ipc=1, seed=2, part=part, track=Track.quiet())
    for group in part:
        law = ViewLaw("rrc", heights(cfg.mode, cfg.milestone), 0.5, cfg.jitter)
        views = draw(law, M, SIZE, generator(2, "cda", "views", group.name))
        assert views.boxes[0].tolist() == [0, 0, SIZE, SIZE], "the first view is not the whole image"
        noise = torch.randn(2, 1, 3, SIZE, SIZE, generator=generator(2, "cda", "init", group.name))
        *_, (_, last) = plain(
            [teacher.net],
            noise.flatten(0, 1).double(),
            labels_of(group),
            through(views),
            iterations=M,
            lr=cfg.lr,
            r_bn=cfg.r_bn,
            first_bn=cfg.first_bn,
        )
        assert torch.equal(found.images_u8[list(group.classes)], to_u8(last))
