"""What contracts share: the smallest classification, and plain training of it."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from regularized.evidence.contract.subjects import Terms
from regularized.evidence.models import mlp
from regularized.training.terms import CrossEntropy

__all__ = ["Classification", "plain"]


@dataclass(frozen=True, slots=True)
class Classification:
    """Points of a normal distribution in as many classes as they have first coordinates, and a small network.

    Its methods are what a :class:`~regularized.evidence.contract.Subject` asks for, and can be sent to other processes.

    Args:
        features: coordinates of a point; default 6.
        classes: default 4; at most ``features``.
        hidden: widths of the network's hidden layers; default one of 12.
        random_labels: labels that have nothing to do with the points, for what works against them; default False: the
            largest of the first coordinates.

    Examples:
        >>> task = Classification(features=5, classes=3)
        >>> {name: tuple(tensor.shape) for name, tensor in task.data(8, seed=0).items()}
        {'inputs': (8, 5), 'targets': (8,), 'index': (8,)}
        >>> task.model()(task.data(8, seed=0)["inputs"]).shape
        torch.Size([8, 3])
    """

    features: int = 6
    classes: int = 4
    hidden: tuple[int, ...] = (12,)
    random_labels: bool = False

    def model(self) -> nn.Sequential:
        """A new network, of the global random state."""
        return mlp([self.features, *self.hidden, self.classes])

    def data(self, n: int, seed: int) -> Mapping[str, Tensor]:
        """``inputs`` (n, features), ``targets`` (n,) and ``index`` 0 ... n - 1."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(n, self.features, generator=generator)
        if self.random_labels:
            targets = torch.randint(self.classes, (n,), generator=generator)
        else:
            targets = x[:, : self.classes].argmax(1)
        return {"inputs": x, "targets": targets, "index": torch.arange(n)}


def plain() -> Terms:
    """Cross-entropy and nothing else."""
    return {"task": CrossEntropy()}
