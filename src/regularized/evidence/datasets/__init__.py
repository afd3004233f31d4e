"""Data of the experiments: each set is found where it lies.

- :mod:`~regularized.evidence.datasets.idx`: Fashion-MNIST and MNIST, from a package, a folder, or a download
- :mod:`~regularized.evidence.datasets.images`: other images: scikit-learn's digits and photographs, CIFAR, Kodak
- :mod:`~regularized.evidence.datasets.samples`: for each seed its own rows of a set, for training, validation, test
- :mod:`~regularized.evidence.datasets.folder`: the user's folder
- :mod:`~regularized.evidence.datasets.noise`: wrong labels

Tests use what scikit-learn carries, or write tiny files in the real format.
"""

from regularized.evidence.datasets.folder import data_folder
from regularized.evidence.datasets.idx import fashion_mnist, mnist
from regularized.evidence.datasets.images import Split, cifar, digits, kodak, photographs
from regularized.evidence.datasets.noise import flip_labels
from regularized.evidence.datasets.samples import (
    Sample,
    disjoint_rows,
    draw,
    eight_by_eight,
    eight_by_eight_split,
    with_wrong_labels,
)

__all__ = [
    "Sample",
    "Split",
    "cifar",
    "data_folder",
    "digits",
    "disjoint_rows",
    "draw",
    "eight_by_eight",
    "eight_by_eight_split",
    "fashion_mnist",
    "flip_labels",
    "kodak",
    "mnist",
    "photographs",
    "with_wrong_labels",
]
