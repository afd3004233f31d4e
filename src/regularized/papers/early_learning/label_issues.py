"""Which labels are wrong, by the memory that early-learning regularization has of each sample."""

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import nn

from regularized.noisy_labels.early_learning import PredictionHistory
from regularized.papers.estimators import Array, RegularizedClassifier

__all__ = ["find_label_issues"]

_TECHNIQUE = "early_learning"
_SETTINGS = {"strength": 7.0, "momentum": 0.9}  # the authors', for CIFAR-100


def find_label_issues(
    X: ArrayLike, y: ArrayLike, *, classifier: RegularizedClassifier | None = None, return_indices: bool = False
) -> Array:
    """Samples whose labels are probably wrong, by what the network believed of them before it could memorise.

    Early-learning regularization keeps for each sample a running mean of the network's predictions. Where its largest
    entry is another class than the label, the label is suspected. One training on all samples, no cross-validation.

    Args:
        X: (N, F), scaled as for a network.
        y: (N,) labels.
        classifier: with technique ``"early_learning"``; default that with strength 7 and momentum 0.9, the authors'
            settings for CIFAR-100, and seed 0.
        return_indices: positions, the least likely label first, instead of a mask.

    Returns:
        (N,) bool, or (K,) positions.

    Raises:
        ValueError: another technique, which keeps no such history.

    Examples:
        >>> from sklearn.datasets import load_iris
        >>> X, y = load_iris(return_X_y=True)
        >>> y[:5] = 2  # wrong
        >>> bool(find_label_issues(X, y)[:5].all())
        True
    """
    used = classifier or RegularizedClassifier(_TECHNIQUE, settings=_SETTINGS, random_state=0)
    if used.technique != _TECHNIQUE:
        raise ValueError(f"wrong labels are found with technique {_TECHNIQUE!r}, got {used.technique!r}")
    kept: dict[str, nn.Module] = {}
    used.fit_with_terms(X, y, kept.update)
    history = next(term for term in kept.values() if isinstance(term, PredictionHistory))
    codes = torch.tensor(np.searchsorted(used.classes_, np.asarray(y)))
    suspected = history.suspected_label_errors(codes)
    if not return_indices:
        return suspected.numpy()
    scores = history.history
    belief = (scores / scores.sum(dim=1, keepdim=True)).gather(1, codes[:, None]).squeeze(1)
    rows = suspected.nonzero().flatten()
    return rows[belief[rows].argsort(stable=True)].numpy()
