"""Two losses of a masked autoencoder that knows what is hard: of the pixels, and of the guess how wrong they will be.

Symbols of arXiv 2312.13714 and their names here:

    B, N, M        images, patches of each, and how many of them are hidden
    x_m            ``target``      (B, M, E) pixels of the hidden patches, E = P P C
    x^_m           ``prediction``  (B, M, E) what the reconstructor says
    L_rec(i)       ``difficulty``  (B, M) squared error of each hidden patch; constant in the second loss
    L^(i)          ``predicted``   (B, M) what the loss predictor says, a number without a unit
    gamma          ``mask_ratio``  share of the patches that is hidden
    alpha_t        ``hard``        share of the hidden patches that is chosen for being hard, a function of the epoch

    reconstruction   L_rec(i) = mean_e (x^_ie - x_ie)^2
    relative         mean of  -log sigmoid(L^(i) - L^(j))  over the pairs with L_rec(i) > L_rec(j)
    absolute         mean of  (L^(i) - standardised L_rec(i))^2

The relative loss asks only for the order within an image: errors shrink while training goes on, their order does not.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from regularized.mechanisms.ranges import allowed, at_least

__all__ = ["absolute_loss", "reconstruction_losses", "relative_loss", "standardised_patches"]

_ROOT_EPS = 1e-6  # inside the roots, official


def standardised_patches(patches: Tensor) -> Tensor:
    """Each patch less its own mean, over its own deviation (unbiased, 1e-6 added to the variance).

    Args:
        patches: (B, M, E), E >= 2.

    Examples:
        >>> [round(x, 4) for x in standardised_patches(torch.tensor([[[0.0, 2.0]]])).flatten().tolist()]
        [-0.7071, 0.7071]
    """
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return (patches - mean) * (variance + _ROOT_EPS).rsqrt()


def reconstruction_losses(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each patch, in float32 or wider.

    Args:
        prediction: (B, M, E).
        target: (B, M, E); constant.

    Returns:
        (B, M). Its mean is the loss of a masked autoencoder.

    Raises:
        ValueError: shapes differ.

    Examples:
        >>> reconstruction_losses(torch.zeros(1, 2, 3), torch.tensor([[[1.0] * 3, [2.0] * 3]])).tolist()
        [[1.0, 4.0]]
    """
    if prediction.shape != target.shape or prediction.ndim != 3:
        raise ValueError(
            "prediction and target must have one shape (B, M, E), the hidden patches in the same order; got "
            f"{tuple(prediction.shape)} and {tuple(target.shape)}"
        )
    dtype = torch.promote_types(prediction.dtype, torch.float32)
    return (prediction.to(dtype) - target.detach().to(dtype)).square().mean(dim=-1)


@allowed(eps=at_least(0.0, remedy="0 is the formula of the paper, 1e-6 the official code"))
def relative_loss(predicted: Tensor, difficulty: Tensor, *, eps: float = 0.0) -> Tensor:
    """How often, and how surely, the guess puts two patches of an image into the wrong order.

    Args:
        predicted: (B, M) of the loss predictor, M hidden patches of each image.
        difficulty: (B, M) their reconstruction losses; constant.
        eps: added to the probability inside the logarithm; default 0 (the paper), computed as a softplus, whose
            gradient does not vanish for pairs that are far wrong. 1e-6 is the official code.

    Returns:
        Scalar in float32 or wider: the mean over all pairs in the batch that differ in difficulty; 0, with a graph,
        where all are equal.

    Raises:
        ValueError: the shapes are not (B, M) and equal, or ``eps`` is negative.

    Examples:
        >>> easy_hard = torch.tensor([[0.1, 0.9]])
        >>> undecided = relative_loss(torch.zeros(1, 2), easy_hard)
        >>> right, wrong = (relative_loss(torch.tensor([q]), easy_hard) for q in ([0.0, 30.0], [30.0, 0.0]))
        >>> [round(float(loss), 4) for loss in (undecided, right, wrong)]
        [0.6931, 0.0, 30.0]
    """
    q, t = _checked(predicted, difficulty)
    harder = t.unsqueeze(2) > t.unsqueeze(1)  # (B, M, M): each pair that differs once
    margin = q.unsqueeze(2) - q.unsqueeze(1)
    losses = F.softplus(-margin) if eps == 0.0 else -torch.log(torch.sigmoid(margin) + eps)
    # Not `losses[harder]`, whose size the host would have to wait for.
    return torch.where(harder, losses, 0.0).sum() / harder.sum().clamp(min=1)


def absolute_loss(predicted: Tensor, difficulty: Tensor) -> Tensor:
    """Squared error of the guess against the difficulties, standardised in each image: the paper's ablation.

    Args:
        predicted: (B, M), M >= 2.
        difficulty: (B, M); constant.

    Returns:
        Scalar in float32 or wider.

    Raises:
        ValueError: the shapes are not (B, M) and equal, or one patch only is hidden.

    Examples:
        >>> difficulty = torch.tensor([[1.0, 2.0, 3.0]])
        >>> round(float(absolute_loss(torch.tensor([[-1.0, 0.0, 1.0]]), difficulty)), 6)
        0.0
    """
    q, t = _checked(predicted, difficulty)
    if q.shape[1] < 2:
        raise ValueError("the absolute loss standardises over the hidden patches of an image and needs at least 2")
    return (q - standardised_patches(t)).square().mean()


def _checked(predicted: Tensor, difficulty: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float32 or wider, the second without a graph."""
    if difficulty.ndim != 2 or predicted.shape != difficulty.shape:
        raise ValueError(
            "difficulty must be (B, M), the loss of each hidden patch and not their mean, and predicted of the same "
            f"shape; got difficulty {tuple(difficulty.shape)} and predicted {tuple(predicted.shape)}"
        )
    dtype = torch.promote_types(predicted.dtype, torch.float32)
    return predicted.to(dtype), difficulty.detach().to(dtype)
