"""The game of a GAN: logistic losses with the non-saturating generator, and the gradient penalty R1."""

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["discriminator_loss", "generator_loss", "gradient_penalty"]


def discriminator_loss(real_scores: Tensor, fake_scores: Tensor) -> Tensor:
    """``softplus(-D(x)) + softplus(D(G(z)))``, each averaged over its batch.

    Args:
        real_scores: (B, ...) scores of real samples, before any sigmoid.
        fake_scores: (B', ...) scores of generated ones.

    Examples:
        >>> round(discriminator_loss(torch.zeros(2), torch.zeros(3)).item(), 4)  # 2 log 2
        1.3863
    """
    return F.softplus(-real_scores).mean() + F.softplus(fake_scores).mean()


def generator_loss(fake_scores: Tensor) -> Tensor:
    """``softplus(-D(G(z)))``, the mean over the batch; it does not saturate where the discriminator wins.

    Args:
        fake_scores: (B, ...) scores of generated samples, before any sigmoid.

    Examples:
        >>> round(generator_loss(torch.zeros(3)).item(), 4)
        0.6931
    """
    return F.softplus(-fake_scores).mean()


def gradient_penalty(real_scores: Tensor, real: Tensor) -> Tensor:
    """R1 (Mescheder et al. 2018): the squared norm of the gradient of scores by real samples, mean over the batch.

    Args:
        real_scores: (B, ...) scores of ``real``, with their graph.
        real: (B, ...) samples that require a gradient.

    Returns:
        Scalar with a graph, to be differentiated once more.

    Examples:
        >>> x = torch.ones(2, 3, requires_grad=True)
        >>> gradient_penalty((2.0 * x).sum(dim=1), x).item()  # 3 times 2^2
        12.0
    """
    (gradient,) = torch.autograd.grad(real_scores.sum(), real, create_graph=True)
    return gradient.square().flatten(1).sum(dim=1).mean()
