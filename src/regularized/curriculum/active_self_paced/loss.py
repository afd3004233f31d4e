"""Self-paced weights and pseudo-labels in closed form: the two blocks of active self-paced learning, usable alone.

From "Active Self-Paced Learning for Cost-Effective and Progressive Face Identification", 2017, arXiv 1701.03555;
:mod:`regularized.curriculum.active_self_paced.procedure` has the procedure, and which rule is the released code's.

=========  ============  ===============================================================
paper      here          meaning
=========  ============  ===============================================================
l_ij       ``losses``    (n, m) loss of sample i for classifier j, >= 0
C          ``cost``      factor of the loss, > 0
lambda_j   ``pace``      scalar or (m,): losses with C l >= lambda get no weight
v_ij       ``weights``   (n, m) in [0, 1]
y_ij       ``labels``    (n, m) in {-1, +1}, at most one +1 a row; none: no known class
=========  ============  ===============================================================

Self-paced learning minimises ``sum v C l + f(v; lambda)`` over v as well, with ``f = lambda (v^2 / 2 - v)`` (linear
soft weights) or ``f = -lambda v`` (hard ones). Both minimisers are closed forms.
"""

import warnings
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from regularized.mechanisms.ranges import Choice, positive

__all__ = [
    "Weighting",
    "one_vs_rest_hinge",
    "one_vs_rest_labels",
    "self_paced_implicit_loss",
    "self_paced_penalty",
    "self_paced_weights",
    "unique_labels",
]

Weighting: TypeAlias = Literal["linear", "hard"]
WEIGHTING = Choice("linear", "hard")
COST = positive()


def self_paced_weights(
    losses: Tensor, pace: Tensor | float, *, cost: float = 1.0, weighting: Weighting = "linear"
) -> Tensor:
    """The weights that minimise the self-paced objective for given losses; for any loss that is at least 0.

    Args:
        losses: (n,) or (n, m), non-negative.
        pace: lambda > 0, a number, or (m,) one for each class; a larger one admits harder samples.
        cost: factor C of the losses, > 0; default 1 (unconfirmed, as all defaults of the paper).
        weighting: ``"linear"`` (default): ``1 - C l / lambda`` below the pace, else 0; ``"hard"``: 1 below it, else 0.

    Returns:
        Weights in [0, 1] of the shape of ``losses``.

    Raises:
        ValueError: a loss is negative or NaN, or pace, cost or weighting is not allowed.

    Warns:
        UserWarning: all weights are 0; the median loss is named, so that the pace can be set.

    Examples:
        >>> self_paced_weights(torch.tensor([0.0, 0.5, 1.0, 3.0]), pace=1.0)
        tensor([1.0000, 0.5000, 0.0000, 0.0000])
    """
    scaled, pace = _checked(losses, pace, cost, weighting)
    admitted = scaled < pace
    if weighting == "hard":
        weights = admitted.to(losses.dtype)
    else:
        weights = torch.where(admitted, 1 - scaled / pace, torch.zeros_like(scaled))
    if losses.numel() and not bool(weights.any()):
        warnings.warn(
            f"no sample has a weight: the median loss is {float(losses.median()):.4g} and samples need less than "
            f"pace / cost (at most {float((pace / cost).max()):.4g}); raise the pace",
            stacklevel=2,
        )
    return weights


def self_paced_penalty(weights: Tensor, pace: Tensor | float, *, weighting: Weighting = "linear") -> Tensor:
    """``f(v; lambda)`` of each weight; its sum is the self-paced part of the objective.

    Args:
        weights: (n,) or (n, m) in [0, 1].
        pace: lambda, a number or (m,).
        weighting: ``"linear"`` (default) or ``"hard"``.

    Returns:
        Shape of ``weights``, at most 0.

    Examples:
        >>> self_paced_penalty(torch.tensor([0.0, 0.5, 1.0]), 2.0)
        tensor([ 0.0000, -0.7500, -1.0000])
    """
    pace = torch.as_tensor(pace, dtype=weights.dtype, device=weights.device)
    return pace * (0.5 * weights.square() - weights) if weighting == "linear" else -pace * weights


def self_paced_implicit_loss(losses: Tensor, pace: Tensor | float, *, cost: float = 1.0) -> Tensor:
    """What is left when the linear weights are put in: ``-(lambda - C l)^2 / (2 lambda)`` below the pace, else 0.

    Bounded, rising and concave in the loss: this is why self-paced learning is robust to wrong labels.

    Args:
        losses: (n,) or (n, m), non-negative.
        pace: lambda > 0, a number or (m,).
        cost: factor C of the losses, > 0; default 1.

    Returns:
        Shape of ``losses``, in [-lambda / 2, 0].

    Examples:
        >>> self_paced_implicit_loss(torch.tensor([0.0, 0.5, 5.0]), 1.0) + 0.0
        tensor([-0.5000, -0.1250,  0.0000])
    """
    scaled, pace = _checked(losses, pace, cost, "linear")
    return (scaled - pace).clamp(max=0.0).square() / (-2 * pace)


def one_vs_rest_hinge(scores: Tensor, labels: Tensor, *, squared: bool = False) -> Tensor:
    """``max(0, 1 - y s)`` of each classifier.

    Args:
        scores: (n, m).
        labels: (n, m) in {-1, +1}.
        squared: its square, which the machines of the released code minimise; default False, the paper's.

    Returns:
        (n, m), differentiable in the scores.

    Examples:
        >>> one_vs_rest_hinge(torch.tensor([[2.0, 0.5]]), torch.tensor([[1, 1]]))
        tensor([[0.0000, 0.5000]])
    """
    hinge = (1 - labels.to(scores.dtype) * scores).clamp(min=0.0)
    return hinge.square() if squared else hinge


def one_vs_rest_labels(scores: Tensor, weights: Tensor | None = None, *, squared: bool = False) -> Tensor:
    """The labels that minimise the weighted hinge loss of each sample, at most one +1 a row.

    With ``d_j = v_j (max(0, 1 - s_j) - max(0, 1 + s_j))``, what it costs to call class j positive: the class with the
    smallest d is positive if that is below 0; else none is.

    Args:
        scores: (n, m).
        weights: (n, m) in [0, 1]; default 1.
        squared: for the squared hinge loss; default False. Without weights the labels are the same.

    Returns:
        (n, m) in {-1, +1}, of the type of ``scores``.

    Raises:
        ValueError: scores are not (n, m) or not finite, or the weights have another shape.

    Examples:
        >>> one_vs_rest_labels(torch.tensor([[0.2, 0.7], [-0.1, -0.3]]))
        tensor([[-1.,  1.],
                [-1., -1.]])
    """
    check_scores(scores)
    if weights is not None and weights.shape != scores.shape:
        raise ValueError(f"weights must have the shape of the scores {tuple(scores.shape)}, got {tuple(weights.shape)}")
    positive = torch.ones_like(scores)
    cost = one_vs_rest_hinge(scores, positive, squared=squared) - one_vs_rest_hinge(scores, -positive, squared=squared)
    if weights is not None:
        cost = weights * cost
    best, chosen = cost.min(dim=1)
    labels = torch.full_like(scores, -1.0)
    return labels.scatter_(1, chosen[:, None], torch.where(best < 0, 1.0, -1.0).to(scores.dtype)[:, None])


def unique_labels(scores: Tensor, pace: Tensor | float, *, cost: float = 1.0, squared: bool = False) -> Tensor:
    """The released code's labels: a class is given where it accepts the sample and no other class does.

    Class j accepts where the loss of calling it positive is below its pace, ``C max(0, 1 - s_j) < lambda_j``. Where
    none accepts, the sample may be of a class that is not known yet; where several do, nothing is sure: all -1.

    Args:
        scores: (n, m).
        pace: lambda > 0, a number or (m,).
        cost: factor C of the losses, > 0; default 1, as the released code accepts.
        squared: accept by the squared hinge loss; default False, as the released code accepts.

    Returns:
        (n, m) in {-1, +1}, of the type of ``scores``.

    Raises:
        ValueError: scores are not (n, m) or not finite, or pace or cost is not allowed.

    Examples:
        >>> unique_labels(torch.tensor([[0.9, -1.0], [0.9, 0.8], [0.3, -1.0]]), pace=0.5)
        tensor([[ 1., -1.],
                [-1., -1.],
                [-1., -1.]])
    """
    check_scores(scores)
    losses = one_vs_rest_hinge(scores, torch.ones_like(scores), squared=squared)
    scaled, pace = _checked(losses, pace, cost, "hard")
    accepted = scaled < pace
    alone = accepted & (accepted.sum(dim=1, keepdim=True) == 1)
    return torch.where(alone, 1.0, -1.0).to(scores.dtype)


def check_scores(scores: Tensor, *, shape: tuple[int, int] | None = None) -> None:
    """Refuse scores that are not a finite (n, m) matrix.

    Raises:
        ValueError: another shape, or NaN or infinite entries; their number is given.
    """
    if scores.ndim != 2 or (shape is not None and tuple(scores.shape) != shape):
        raise ValueError(f"scores must have shape {shape or '(n, m)'}, got {tuple(scores.shape)}")
    bad = int((~torch.isfinite(scores)).sum())
    if bad:
        raise ValueError(
            f"{bad} of {scores.numel()} scores are not finite; look at the classifier before labels are made of it"
        )


def _checked(losses: Tensor, pace: Tensor | float, cost: float, weighting: str) -> tuple[Tensor, Tensor]:
    WEIGHTING("weighting", weighting)
    COST("cost", cost)
    pace = torch.as_tensor(pace, dtype=losses.dtype, device=losses.device)
    if not bool((pace > 0).all()):
        raise ValueError(f"pace must be positive, got {pace.tolist()}")
    if losses.numel() and not float(losses.min()) >= 0:  # NaN fails, too
        raise ValueError(
            f"self-paced weights need losses of at least 0, got {float(losses.min()):.4g}; leave regularisers that can "
            "be negative out of the loss that decides the weights"
        )
    return cost * losses, pace
