"""SRe2L++ is SRe2L from RDED's patches of medium score, with crops at every size (reference 3.6)."""

import pytest
import torch
from _plain import SIZE, deep_teacher, labels_of, plain, through, to_u8
from _toys import toy_pixels
from torch import Tensor

from distillery.methods import METHODS, Group, _patches, rded, sre2lpp
from distillery.methods._views import ViewLaw, curriculum, draw
from distillery.rng import generator
from distillery.track import Track

M, IPC, SEED = 10, 2, 3
SELECTION = {"mipc": 10, "num_crop": 3, "factor": 1}


def made(**options: object) -> Tensor:
    cfg = sre2lpp.Config(**{"iterations": M, "jitter": 2, "batch": 2} | SELECTION | options)  # type: ignore[arg-type]
    part = sre2lpp.groups(cfg, ipc=IPC, classes=4)
    found = sre2lpp.synthesize(cfg, toy_pixels(), deep_teacher(), ipc=IPC, seed=SEED, part=part, track=Track.quiet())
    return found.images_u8


def test_easy_first_images_are_rdeds() -> None:
    wanted = METHODS["rded"].synthesize(
        rded.Config(**SELECTION),  # type: ignore[arg-type]
        toy_pixels(),
        deep_teacher(),
        ipc=IPC,
        seed=SEED,
        part=[Group((cls,), range(IPC)) for cls in range(4)],
        track=Track.quiet(),
    )
    assert torch.equal(made(init="easy", lr=1e-9), wanted.images_u8)
    assert not torch.equal(made(lr=1e-9), wanted.images_u8)


@pytest.mark.parametrize(("images", "patches", "first"), [(10, 2, 4), (9, 3, 3), (5, 5, 0), (7, 2, 2)])
def test_medium_patches_are_the_middle_of_the_ranking(images: int, patches: int, first: int) -> None:
    scores = torch.rand(images, 4, generator=generator("medium", images))
    ranked = sorted((min(own), image) for image, own in enumerate(scores.tolist()))
    found, _, values = _patches.choose(scores, patches, 1, medium=True)
    assert list(zip(values.tolist(), found.tolist(), strict=True)) == ranked[first : first + patches]


def test_sre2lpp_is_the_plain_loop_from_its_patches() -> None:
    teacher, found, start = deep_teacher(), made(), made(lr=1e-9)
    for group in sre2lpp.groups(sre2lpp.Config(batch=2), ipc=IPC, classes=4):
        own = [cls * IPC + slot for cls, slot in group.images]
        law = ViewLaw("rrc", curriculum(M, "constant"), 0.5, 2)
        first = teacher.normalise(start[own].double() / 255).float().double()  # the engine normalises in float32
        *_, (_, last) = plain(
            [teacher.net],
            first,
            labels_of(group),
            through(draw(law, M, SIZE, generator(SEED, "sre2lpp", "views", group.name))),
            iterations=M,
            lr=0.25,
            r_bn=0.01,
        )
        # Normalising rounds otherwise here and there: 1e-7 of a pixel may tip a value on the edge of rounding.
        assert int((found[own].int() - to_u8(last).int()).abs().max()) <= 1
