"""Random real images: distinct, real, nested over IPC, and photos as the evaluation sees them."""

import torch
from _toys import toy_photos, toy_pixels, toy_teacher

from distillery.data.real import Real
from distillery.data.synthetic import Synthetic
from distillery.methods import random_real
from distillery.track import Track


def drawn(real: Real, ipc: int, seed: int = 0) -> Synthetic:
    part = random_real.groups(random_real.Config(), ipc=ipc, classes=len(real.classes))
    return random_real.synthesize(
        random_real.Config(), real, toy_teacher(real), ipc=ipc, seed=seed, part=part, track=Track.quiet()
    )


def test_images_are_distinct_real_ones_of_their_class() -> None:
    real = toy_pixels()
    found = drawn(real, 5)
    images, labels = real.pixels("train")
    for cls in range(4):
        places = found.extras["sources"][found.labels == cls, 0]
        assert len(set(places.tolist())) == 5
        assert torch.equal(found.images_u8[found.labels == cls], images[labels == cls][places])


def test_a_smaller_set_is_the_beginning_of_a_larger_one() -> None:
    small, large = drawn(toy_pixels(), 3), drawn(toy_pixels(), 7)
    for cls in range(4):
        assert torch.equal(small.images_u8[small.labels == cls], large.images_u8[large.labels == cls][:3])


def test_every_image_can_be_drawn() -> None:
    seen = torch.cat([drawn(toy_pixels(classes=1, per_class=6), 2, seed).extras["sources"] for seed in range(40)])
    assert set(seen.flatten().tolist()) == set(range(6))


def test_photos_are_resized_and_cropped_as_for_evaluation() -> None:
    real = toy_photos()
    found = drawn(real, 2)
    larger, labels = real.pixels("train")
    edge, size = (larger.shape[-1] - real.size) // 2, real.size
    for image, label, place in zip(found.images_u8, found.labels, found.extras["sources"][:, 0], strict=True):
        whole = larger[labels == label][place]
        # Cropping once, or twice as here, may round to neighbouring pixels.
        starts = [(edge + dy, edge + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
        assert any(torch.equal(image, whole[:, y : y + size, x : x + size]) for y, x in starts)
