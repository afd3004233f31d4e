"""The noise mask's objective: loss times log density of the masks that led to it, a score-function gradient.

:mod:`regularized.overfitting.noise_mask.layer` has the paper and its symbols.
"""

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from regularized.mechanisms.ranges import Choice

__all__ = ["Credit", "beta_log_density", "noise_mask_objective"]

# Shapes: B images, D cells of the mask's grid.

Credit: TypeAlias = Literal["batch", "sample"]
CREDIT = Choice("batch", "sample")


def beta_log_density(cells: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """Log density of Beta(exp alpha, exp beta) at each cell, differentiable in alpha and beta.

    Args:
        cells: (B, D) values in (0, 1), constant.
        alpha: (B, D) logarithm of the first concentration.
        beta: (B, D) logarithm of the second one.

    Returns:
        (B, D).

    Examples:
        >>> beta_log_density(torch.tensor([[0.2, 0.9]]), torch.zeros(1, 2), torch.zeros(1, 2))  # uniform
        tensor([[0., 0.]])
    """
    one, two = alpha.exp(), beta.exp()
    normaliser = torch.lgamma(one + two) - torch.lgamma(one) - torch.lgamma(two)
    return (one - 1) * cells.log() + (two - 1) * torch.log1p(-cells) + normaliser


def noise_mask_objective(
    losses: Tensor, log_density: Tensor, *, credit: Credit = "batch", coupled: bool = True
) -> Tensor:
    """What classifier and policy minimise together: the loss times the log density of the masks that led to it.

    Args:
        losses: (B,) loss of each image with ``credit="sample"``; a scalar mean, or (B,), with ``"batch"``.
        log_density: (B,) q of each mask.
        credit: ``"batch"`` (official code): each policy gets the mean loss of the batch; ``"sample"``: its own image's.
        coupled: True (official code): the product, so q scales the classifier's gradient, too. False: the classifier
            gets the plain gradient, the policy the same as before.

    Returns:
        Scalar.

    Raises:
        ValueError: ``credit`` is neither, or losses of each image are missing for ``"sample"``.

    Examples:
        >>> noise_mask_objective(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 4.0]))
        tensor(6.)
        >>> noise_mask_objective(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 4.0]), credit="sample")
        tensor(7.)
    """
    CREDIT("credit", credit)
    if credit == "sample" and losses.shape != log_density.shape:
        raise ValueError(
            f"credit='sample' needs one loss an image, shape {tuple(log_density.shape)}, got {tuple(losses.shape)}; "
            'give F.cross_entropy(..., reduction="none")'
        )
    if credit == "batch" and losses.shape not in (torch.Size([]), log_density.shape):
        raise ValueError(
            f"credit='batch' takes the mean loss, or one loss an image of shape {tuple(log_density.shape)}; got "
            f"{tuple(losses.shape)}"
        )
    if credit == "batch":
        losses, log_density = losses.mean(), log_density.mean()
    if coupled:
        return (losses * log_density).mean()
    return (losses + losses.detach() * log_density).mean()
