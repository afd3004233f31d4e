"""The ensemble's prediction: arithmetic mean of logits over members, then softmax.

Its distribution is the normalised geometric mean of the members' distributions. The loss is convex in the logits, so it
is at most the mean of the members' losses; and, averaged over all subsets of a size, it falls with every member more.
Over the first k members alone, as the paper evaluates, it may rise.
"""

import warnings
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regularized.training.step import call_model

__all__ = ["LogitEnsemble", "equal_members", "prefix_losses", "subset_losses"]


class LogitEnsemble(nn.Module):
    """Members as one model, whose output is the mean of their logits.

    One member's logits are held at a time beside the mean. To evaluate members that were trained together in one pass,
    see :meth:`~regularized.overfitting.infinite_compute.stacked.StackedModels.shared`.

    Args:
        models: members, each from the same inputs to logits of one shape.

    Raises:
        ValueError: no member; or, when called, members whose logits differ in shape.

    Warns:
        UserWarning: two members have the same weights, so that they count as one.

    Examples:
        >>> members = [nn.Linear(2, 3), nn.Linear(2, 3)]
        >>> LogitEnsemble(members)(torch.ones(4, 2)).shape
        torch.Size([4, 3])
    """

    def __init__(self, models: Sequence[nn.Module]) -> None:
        super().__init__()
        if not models:
            raise ValueError("an ensemble needs at least one member, got none")
        if pair := equal_members(models):
            warnings.warn(
                f"members {pair[0]} and {pair[1]} have the same weights, so the ensemble gains nothing by one of them; "
                "train each from a seed of its own",
                stacklevel=2,
            )
        self.members: nn.ModuleList = nn.ModuleList(models)

    def forward(self, inputs: Any) -> Tensor:
        """Mean logits; a mapping of inputs goes to each member as keyword arguments."""
        first, *rest = self.members
        mean: Tensor = call_model(first, inputs)
        for number, member in enumerate(rest, start=1):
            logits: Tensor = call_model(member, inputs)
            if logits.shape != mean.shape:
                raise ValueError(
                    f"members must agree in the shape of their logits: member 0 gives {tuple(mean.shape)}, member "
                    f"{number} {tuple(logits.shape)}; do they have one vocabulary and one head?"
                )
            # Equal members leave it as it is, to the last bit.
            mean = mean + (logits - mean) / (number + 1)
        return mean


def prefix_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Loss of the first k members together, for k = 1 ... K; the paper's curve over K.

    Args:
        logits: (K, B, V) of the members.
        labels: (B,) int64.

    Returns:
        (K,) mean losses in nats.

    Examples:
        >>> z = torch.tensor([[[2.0, 0.0]], [[0.0, 2.0]]])  # two members that contradict each other
        >>> [round(loss, 4) for loss in prefix_losses(z, torch.tensor([1])).tolist()]
        [2.1269, 0.6931]
    """
    _check(logits, labels)
    counts = torch.arange(1, len(logits) + 1, dtype=logits.dtype, device=logits.device)
    means = logits.cumsum(dim=0) / counts[:, None, None]
    return torch.stack([F.cross_entropy(mean, labels) for mean in means])


def subset_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Loss of k members together, averaged over all subsets of k, for k = 1 ... K; it never rises with k.

    There are 2^K - 1 subsets, each a softmax over (B, V).

    Args:
        logits: (K, B, V) of the members.
        labels: (B,) int64.

    Returns:
        (K,) mean losses in nats.

    Examples:
        >>> z = torch.tensor([[[2.0, 0.0]], [[0.0, 2.0]]])
        >>> [round(loss, 4) for loss in subset_losses(z, torch.tensor([1])).tolist()]
        [1.1269, 0.6931]
    """
    _check(logits, labels)
    members = range(len(logits))
    return torch.stack(
        [
            torch.stack([F.cross_entropy(logits[list(s)].mean(dim=0), labels) for s in combinations(members, k)]).mean()
            for k in range(1, len(logits) + 1)
        ]
    )


def equal_members(models: Sequence[nn.Module]) -> tuple[int, int] | None:
    """The first two modules with all parameters equal, by number; None where there are none, or no parameters."""
    own = [dict(model.named_parameters()) for model in models]
    for (i, a), (j, b) in combinations(enumerate(own), 2):
        if a and a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a):
            return i, j
    return None


def _check(logits: Tensor, labels: Tensor) -> None:
    if logits.ndim != 3 or labels.shape != logits.shape[1:2]:
        raise ValueError(
            f"need logits (K, B, V) and labels (B,), got {tuple(logits.shape)} and {tuple(labels.shape)}; flatten "
            "positions of a text into B"
        )
