"""For each seed its own images of a set, for training, validation and test.

Seeds that share images are not independent, and their spread says too little of what another seed would give. So the
70,000 images of Fashion-MNIST or MNIST are dealt out like cards:

- A seventh (10,000) is kept for choosing hyperparameters. Seeds from 1,000 on get their rows there and nowhere else.
- The other 60,000 are for the evidence. Seeds come in blocks (0-9, 10-19, ..., 100-109, ...). **Within a block no image
  is given out twice**: not to two seeds, and not for two purposes. Every block shuffles the 60,000 anew, so seeds of
  *different* blocks share images by chance.

The published cut into training and test is not kept: no number here is comparable with a published one anyway.

The 1,797 digits of scikit-learn are too few for this. There every seed splits all of them again, which is what an
experiment calls ``resplit``. CIFAR keeps its own test images; seeds split its training images again.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from regularized.evidence.datasets.idx import FASHION_MNIST, MNIST, labelled_images
from regularized.evidence.datasets.images import Split, cifar
from regularized.evidence.datasets.noise import flip_labels
from regularized.evidence.experiment import data_fingerprint

__all__ = [
    "TUNING_SEEDS_FROM",
    "Sample",
    "disjoint_rows",
    "display_name",
    "draw",
    "eight_by_eight",
    "eight_by_eight_name",
    "eight_by_eight_split",
    "resplit",
    "sampling",
    "with_wrong_labels",
]

TUNING_SEEDS_FROM = 1000
_IDX = {"fashion_mnist": FASHION_MNIST, "mnist": MNIST}
_NAMES = {
    "fashion_mnist": "Fashion-MNIST images",
    "mnist": "MNIST digits",
    "digits": "digits of 8x8 pixels",
    "cifar10": "CIFAR-10 images",
    "cifar100": "CIFAR-100 images",
}


@dataclass(frozen=True, slots=True)
class Sample:
    """The images of one seed: (n, C, H, W) float32, less the training images' mean, over their standard deviation.

    Args:
        train_x: to train on.
        train_y: their labels, (n,) int64.
        validation_x: to choose by.
        validation_y: their labels.
        test_x: to judge by.
        test_y: their labels.
    """

    train_x: Tensor
    train_y: Tensor
    validation_x: Tensor
    validation_y: Tensor
    test_x: Tensor
    test_y: Tensor

    @property
    def fingerprint(self) -> str:
        """Short hash of the content, see :func:`~regularized.evidence.experiment.data_fingerprint`."""
        return data_fingerprint(*(getattr(self, name).numpy() for name in self.__slots__))


def sampling(name: str) -> Literal["fresh", "resplit"]:
    """How the seeds of a set get their images: ``"fresh"``, each its own, or ``"resplit"``, all of one small pool.

    Raises:
        ValueError: there is no such set.
    """
    display_name(name)
    return "fresh" if name in _IDX else "resplit"


def resplit(name: str, *, train: int, test: int) -> float:
    """What :class:`~regularized.evidence.experiment.About` wants to know: test over training size, 0 for ``"fresh"``.

    Args:
        name: of the set.
        train: number of training images.
        test: number of test images.

    Examples:
        >>> resplit("fashion_mnist", train=1000, test=500), resplit("digits", train=1000, test=500)
        (0.0, 0.5)
    """
    return 0.0 if sampling(name) == "fresh" else test / train


def display_name(name: str) -> str:
    """What people call the images of a set.

    Raises:
        ValueError: there is no such set.
    """
    if name not in _NAMES:
        raise ValueError(f"no set {name!r}; there are {', '.join(_NAMES)}")
    return _NAMES[name]


def draw(name: str, seed: int, *, train: int, validation: int, test: int, seeds: int = 10) -> Sample:
    """The images of one seed.

    Args:
        name: ``"fashion_mnist"``, ``"mnist"``, ``"digits"``, ``"cifar10"`` or ``"cifar100"``.
        seed: of the experiment.
        train: number of training images.
        validation: number of validation images.
        test: number of test images.
        seeds: how many seeds a block has; default 10.

    Raises:
        Unavailable: the set is not here.
        ValueError: there is no such set, or it has too few images.

    Examples:
        >>> sample = draw("digits", 0, train=1000, validation=200, test=597)
        >>> sample.train_x.shape, sample.validation_y.shape
        (torch.Size([1000, 1, 8, 8]), torch.Size([200]))
    """
    sizes = (train, validation, test)
    if sampling(name) == "fresh":
        pixels, labels = labelled_images(_IDX[name])
        pixels = pixels[:, None]
        parts = disjoint_rows(len(labels), seed, sizes, seeds=seeds)
    elif name == "digits":
        pixels, labels = _digits()
        parts = _dealt(name, _shuffled(len(labels), seed), sizes)
    else:
        pixels, labels, published = _cifar(name)
        own_test = torch.arange(published, len(labels))
        parts = (
            *_dealt(name, _shuffled(published, seed), (train, validation)),
            *_dealt(f"the test set of {name}", own_test, (test,)),
        )
    mean, deviation = _moments(pixels[parts[0]])
    x = [(pixels[rows].float() - mean) / deviation for rows in parts]
    y = [labels[rows] for rows in parts]
    return Sample(x[0], y[0], x[1], y[1], x[2], y[2])


def eight_by_eight(name: str, seed: int, count: int) -> tuple[Tensor, Tensor]:
    """A seed's images as 8 x 8 pixels, for experiments that were made for scikit-learn's digits.

    Args:
        name: ``"fashion_mnist"`` or ``"mnist"``: rows of the seed's own, averaged over 4 x 4 pixels; or ``"digits"``:
            scikit-learn's, in an order of the seed's own.
        seed: of the experiment.
        count: number of images.

    Returns:
        (count, 64) float64 in [0, 1], and (count,) int64 labels.

    Raises:
        Unavailable: the set is not here.
        ValueError: there is no such set, or it has too few images.

    Examples:
        >>> pixels, labels = eight_by_eight("digits", 0, 100)
        >>> pixels.shape, float(pixels.max())
        (torch.Size([100, 64]), 1.0)
    """
    if sampling(name) == "fresh":
        images, labels = labelled_images(_IDX[name])
        (rows,) = disjoint_rows(len(labels), seed, (count,))
        # 28 x 28 with a frame of 2: 32 x 32, of which 4 x 4 become one.
        framed = F.pad(images[rows].double() / 255.0, (2, 2, 2, 2))
        return F.avg_pool2d(framed[:, None], 4).flatten(1), labels[rows]
    if name != "digits":
        raise ValueError(f"there are 8 x 8 pixels of 'fashion_mnist', 'mnist' and 'digits', got {name!r}")
    pixels, labels = _digits()
    (rows,) = _dealt(name, _shuffled(len(labels), seed), (count,))
    return pixels[rows].flatten(1).double() / 16.0, labels[rows]


def eight_by_eight_split(name: str, seed: int, *, train: int, test: int, scale: float = 0.3) -> Split:
    """A seed's 8 x 8 images in two parts; inputs (pixel - its training mean) / scale, (N, 64) float32.

    Args:
        name: as in :func:`eight_by_eight`.
        seed: of the experiment.
        train: number of training images.
        test: number of others.
        scale: divisor after centring; default 0.3, about the standard deviation of a pixel in the centre.

    Examples:
        >>> split = eight_by_eight_split("digits", 0, train=1000, test=500)
        >>> split.train_x.shape, split.test_y.shape, split.train_x.mean().abs().item() < 1e-6
        (torch.Size([1000, 64]), torch.Size([500]), True)
    """
    pixels, labels = eight_by_eight(name, seed, train + test)
    x = ((pixels - pixels[:train].mean(dim=0)) / scale).float()
    return Split(x[:train], labels[:train], x[train:], labels[train:])


def eight_by_eight_name(name: str) -> str:
    """What people call the images of :func:`eight_by_eight`.

    Examples:
        >>> eight_by_eight_name("fashion_mnist"), eight_by_eight_name("digits")
        ('Fashion-MNIST images of 8x8 pixels', 'digits of 8x8 pixels')
    """
    own = display_name(name)
    return own if name == "digits" else f"{own} of 8x8 pixels"


def with_wrong_labels(sample: Sample, share: float, *, seed: int, num_classes: int = 10) -> tuple[Sample, Tensor]:
    """The same with a share of the labels for training and validation wrong, those of the test as they were.

    Args:
        sample: the images.
        share: of labels that become another class, drawn evenly.
        seed: decides which.
        num_classes: default 10.

    Returns:
        The sample, and the true labels of its training images, (n,) int64.
    """
    draws = torch.Generator().manual_seed(10 * seed + 1)
    train, validation = (
        flip_labels(labels, share, num_classes=num_classes, generator=draws)
        for labels in (sample.train_y, sample.validation_y)
    )
    return replace(sample, train_y=train, validation_y=validation), sample.train_y


def disjoint_rows(total: int, seed: int, sizes: Sequence[int], *, seeds: int = 10) -> tuple[Tensor, ...]:
    """Rows of one seed of a set; those of the other seeds of its block are others, see the module.

    Args:
        total: rows of the set.
        seed: of the experiment, not negative.
        sizes: how many rows for each purpose.
        seeds: how many seeds a block has; default 10.

    Returns:
        For each size its rows, (size,) int64; disjoint.

    Raises:
        ValueError: there are not enough rows for that many seeds.

    Examples:
        >>> first, second = disjoint_rows(700, 0, (40, 20)), disjoint_rows(700, 1, (40, 20))
        >>> len(set(torch.cat(first + second).tolist()))
        120
    """
    need, reserve = sum(sizes), total // 7
    if seed < 0 or need < 1:
        raise ValueError(f"seed must not be negative and sizes must sum to 1 or more, got {seed} and {tuple(sizes)}")
    rows = _shuffled(total, 0)
    if seed >= TUNING_SEEDS_FROM:
        rows, place, seeds = rows[:reserve], seed - TUNING_SEEDS_FROM, seed - TUNING_SEEDS_FROM + 1
    else:
        block, place = divmod(seed, seeds)
        rows = rows[reserve:][_shuffled(total - reserve, block + 1)]
    if seeds * need > len(rows):
        kind = "for tuning" if seed >= TUNING_SEEDS_FROM else "for the evidence"
        raise ValueError(
            f"seed {seed} is one of {seeds} with {need:,} rows each, but of {total:,} rows {len(rows):,} are "
            f"{kind}: ask for at most {len(rows) // seeds:,} rows, or for at most {len(rows) // need} seeds"
        )
    return tuple(torch.split(rows[place * need : (place + 1) * need], list(sizes)))


def _shuffled(count: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def _moments(pixels: Tensor) -> tuple[float, float]:
    """Mean and standard deviation of whole numbers; exact sums, so the same on every machine and number of threads."""
    whole = pixels.long()
    mean = int(whole.sum()) / whole.numel()
    return mean, math.sqrt(int(whole.square().sum()) / whole.numel() - mean**2)


def _dealt(name: str, rows: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    if sum(sizes) > len(rows):
        raise ValueError(f"{name} has {len(rows):,} images, {sum(sizes):,} were asked for")
    return tuple(torch.split(rows[: sum(sizes)], list(sizes)))


def _digits() -> tuple[Tensor, Tensor]:
    """(1797, 1, 8, 8) and labels."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return torch.from_numpy(bunch.images)[:, None], torch.from_numpy(bunch.target).long()


def _cifar(name: str) -> tuple[Tensor, Tensor, int]:
    """(60000, 3, 32, 32) uint8, labels, and how many of them are for training."""
    split = cifar(int(name.removeprefix("cifar")))
    pixels = torch.cat([split.train_x, split.test_x]).mul_(255).round_().byte()
    return pixels, torch.cat([split.train_y, split.test_y]), len(split.train_y)
