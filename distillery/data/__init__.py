"""The data sets: what each one is called, how large it is, and how its pixels are normalised.

Mean and standard deviation (of pixels scaled to 0..1) stand here and nowhere else; an artifact carries its own copy.
"""

from __future__ import annotations

from dataclasses import dataclass

from distillery.data import _names

TENSOR_SIDE = 64  # up to here images are kept as uint8 tensors, above as the original files
SIDES = (8, 1024)  # smallest and largest `size`


@dataclass(frozen=True)
class Info:
    """Facts about one data set.

    `kind` is pixels (uint8 tensors) or photos (original image files), at the data set's own `size`.
    `classes` are in label order; () where the folders decide. `train` and `val` are the official numbers of images,
    0 where the folders decide.
    """

    name: str
    kind: str
    classes: tuple[str, ...]
    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    train: int
    val: int
    note: str
    licence: str = "unknown"  # as model hubs write it
    terms: str = "The licence of these images is not known to Distillery: they came from a folder of yours."
    cite: str = ""


PHOTO_MEAN, PHOTO_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet-1K, as all torchvision weights expect

_IMAGENET_TERMS = (
    "Images of ImageNet: its terms of access allow non-commercial research and education only, and the images remain "
    "their owners'."
)
_IMAGENET_PAPER = "Russakovsky et al., ImageNet Large Scale Visual Recognition Challenge, IJCV 2015."

_ALL = (
    Info(
        name="digits",
        kind="pixels",
        classes=tuple("0123456789"),
        size=16,
        # Measured on the training split at 16 px.
        mean=(0.3052, 0.3052, 0.3052),
        std=(0.3188, 0.3188, 0.3188),
        train=1442,
        val=355,
        note="scikit-learn's 8x8 digits, enlarged (bilinear); every fifth image of a class is validation",
        licence="cc-by-4.0",
        terms="Optical Recognition of Handwritten Digits of the UCI Machine Learning Repository, CC BY 4.0.",
        cite="Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998.",
    ),
    Info(
        name="cifar10",
        kind="pixels",
        classes=_names.CIFAR10,
        size=32,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        train=50_000,
        val=10_000,
        note="ROOT/cifar-10-batches-py/{data_batch_1..5,test_batch,batches.meta}",
        licence="unknown",
        terms="The authors publish no licence; they ask that their report is cited.",
        cite="Krizhevsky, Learning Multiple Layers of Features from Tiny Images, technical report, 2009.",
    ),
    Info(
        name="cifar100",
        kind="pixels",
        classes=_names.CIFAR100,
        size=32,
        mean=(0.5071, 0.4867, 0.4408),
        std=(0.2675, 0.2565, 0.2761),
        train=50_000,
        val=10_000,
        note="ROOT/cifar-100-python/{train,test,meta}",
        licence="unknown",
        terms="The authors publish no licence; they ask that their report is cited.",
        cite="Krizhevsky, Learning Multiple Layers of Features from Tiny Images, technical report, 2009.",
    ),
    Info(
        name="fashion_mnist",
        kind="pixels",
        classes=_names.FASHION_MNIST,
        size=32,
        # Of the 28 px images, as the field has it; the zero border of the 32 px ones is not counted.
        mean=(0.2860, 0.2860, 0.2860),
        std=(0.3530, 0.3530, 0.3530),
        train=60_000,
        val=10_000,
        note="ROOT/FashionMNIST/raw/*-ubyte; zero-padded from 28 to 32 px, size: 28 keeps the original",
        licence="mit",
        terms="Fashion-MNIST of Zalando, MIT licence.",
        cite="Xiao, Rasul and Vollgraf, Fashion-MNIST, arXiv 1708.07747, 2017.",
    ),
    Info(
        name="tiny_imagenet",
        kind="pixels",
        classes=_names.TINY_IMAGENET,
        size=64,
        mean=(0.4802, 0.4481, 0.3975),
        std=(0.2302, 0.2265, 0.2262),
        train=100_000,
        val=10_000,
        note="ROOT/train/WNID/images/*.JPEG, ROOT/val/images/*.JPEG, ROOT/val/val_annotations.txt",
        licence="other",
        terms=_IMAGENET_TERMS,
        cite=_IMAGENET_PAPER,
    ),
    Info(
        name="imagenette",
        kind="photos",
        classes=_names.IMAGENETTE,
        size=224,
        mean=PHOTO_MEAN,
        std=PHOTO_STD,
        train=9_469,
        val=3_925,
        note="ROOT/train/WNID/*.JPEG, ROOT/val/WNID/*.JPEG",
        licence="other",
        terms=_IMAGENET_TERMS,
        cite=_IMAGENET_PAPER,
    ),
    Info(
        name="imagefolder",
        kind="photos",
        classes=(),
        size=224,
        mean=PHOTO_MEAN,
        std=PHOTO_STD,
        train=0,
        val=0,
        note="ROOT/train/CLASS/*, ROOT/val/CLASS/*; class order is the sorted folder names",
    ),
)

DATASETS: dict[str, Info] = {info.name: info for info in _ALL}
