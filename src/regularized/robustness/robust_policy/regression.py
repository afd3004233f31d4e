"""Ridge regression on logged features: the weights of expectations, and how uncertain each direction still is."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from regularized.mechanisms.ranges import Choice, allowed, positive

__all__ = ["BONUSES", "Bonus", "Regression", "exploration_bonus", "ridge_regression"]

Bonus: TypeAlias = Literal["sum_diag", "l2_diag", "elliptic"]
BONUSES: Choice = Choice("sum_diag", "l2_diag", "elliptic")


@dataclass(frozen=True, slots=True)
class Regression:
    """What ridge regression knows of one step.

    Args:
        gram: (d, d) ``Lambda = sum of phi phi^T + ridge I``.
        inverse: (d, d) its inverse.
        weights: (d, k) ``Lambda^-1 Phi^T``: row i times values of k transitions estimates their expectation under mu_i.
    """

    gram: Tensor
    inverse: Tensor
    weights: Tensor


@allowed(ridge=positive("what is added to the diagonal; the paper's family uses 1"))
def ridge_regression(features: Tensor, *, ridge: float = 1.0) -> Regression:
    """Weights that turn values of logged next states into expectations under each factor.

    Args:
        features: (k, d) features of the logged states and actions; k may be 0.
        ridge: lambda; default 1, that of the theory.

    Raises:
        ValueError: ``ridge`` is not positive.

    Examples:
        Two visits to the first feature, none to the second:

        >>> ridge_regression(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), ridge=1.0).weights
        tensor([[0.3333, 0.3333],
                [0.0000, 0.0000]])
    """
    eye = torch.eye(features.shape[1], dtype=features.dtype, device=features.device)
    gram = features.T @ features + ridge * eye
    factor = torch.linalg.cholesky(gram)
    return Regression(gram, torch.cholesky_inverse(factor), torch.cholesky_solve(features.T, factor))


@allowed(kind=BONUSES)
def exploration_bonus(features: Tensor, inverse: Tensor, *, kind: Bonus = "sum_diag") -> Tensor:
    """How little is known of the features of an action: what optimism adds, before its factor beta.

    Args:
        features: (..., d) features.
        inverse: (d, d) inverse of Lambda.
        kind: ``"sum_diag"`` (default) ``sum_i phi_i sqrt(Lambda^-1_ii)``, of the group's online algorithm, for
            adversaries that treat each factor alone; ``"l2_diag"`` ``sqrt(sum_i phi_i^2 Lambda^-1_ii)``, of the
            sibling's code; ``"elliptic"`` ``sqrt(phi^T Lambda^-1 phi)``, that of value iteration without an adversary.

    Returns:
        (...) bonuses.

    Examples:
        >>> phi, inverse = torch.tensor([0.6, 0.4]), torch.tensor([[0.25, 0.0], [0.0, 1.0]])
        >>> kinds = ("sum_diag", "l2_diag", "elliptic")
        >>> [round(exploration_bonus(phi, inverse, kind=kind).item(), 3) for kind in kinds]
        [0.7, 0.5, 0.5]
    """
    if kind == "elliptic":
        return torch.einsum("...i,ij,...j->...", features, inverse, features).clamp(min=0.0).sqrt()
    diagonal = inverse.diagonal()
    if kind == "sum_diag":
        return features @ diagonal.sqrt()
    return (features.square() @ diagonal).sqrt()
