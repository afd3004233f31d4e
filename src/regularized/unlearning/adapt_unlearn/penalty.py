"""Weights that stay away from known bad ones: three functions of the squared distance, and the distance itself.

=====================  ================================================================  ==========================
paper                  meaning                                                           here
=====================  ================================================================  ==========================
theta                  weights of the generator that is trained                          ``weights``
theta_G, phi_G         pretrained generator and discriminator                            at the start of a stage
S_n, S_p               generated samples with and without what must go                   ``Feedback``
theta_N^k, K           weights after the k-th adaptation to samples of S_n               ``references``
d^2                    mean over k of \\|theta - theta_N^k\\|^2                            :func:`squared_distance`
F                      diagonal Fisher information of theta_G                            :func:`generator_fisher`
L_adapt                lambda/2 sum_i F_i (theta_i - theta_G,i)^2                        ``ElasticAnchor``
EL2, IL2, NL2          exp(-alpha d^2), 1/d^2, -d^2                                      ``kind`` of ``repel``
gamma                  coefficient of L_repulsion                                        ``weight`` of ``Repulsion``
=====================  ================================================================  ==========================

All references collapse into their mean ``m``: ``mean_k |theta - theta_N^k|^2 = |theta - m|^2 + c``, with a constant
``c``, the spread of the references. So distance and gradient cost two reads of the weights, however many there are.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from regularized.mechanisms.ranges import Choice, allowed, positive

__all__ = ["Collapsed", "Distance", "Kind", "collapse", "repel", "repel_slope", "squared_distance", "tensor_scales"]

Kind: TypeAlias = Literal["exponential", "inverse", "negative_square"]
"""EL2, IL2 and NL2 of the paper."""

Distance: TypeAlias = Literal["relative", "sum", "official"]
"""How a squared distance is measured, see :func:`tensor_scales`."""

_KIND = Choice("exponential", "inverse", "negative_square", meaning="EL2, IL2 and NL2 of the paper")


@dataclass(slots=True)
class Collapsed:
    """References, as far as distances to them depend on them.

    Args:
        mean: their mean, a tensor for each parameter, float32 or wider.
        spread: (P,) for each parameter the mean over references of the squared distance to ``mean``.
        count: how many there are, K.
    """

    mean: list[Tensor]
    spread: Tensor
    count: int

    @torch.no_grad()
    def add(self, reference: Sequence[Tensor]) -> None:
        """Take in one reference more (Welford's update of mean and spread).

        Args:
            reference: its parameters, of the shapes of ``mean``.
        """
        self.count += 1
        offsets = [new.to(mean) - mean for new, mean in zip(reference, self.mean, strict=True)]
        squares = torch.stack([offset.square().sum() for offset in offsets])
        share = 1.0 / self.count
        torch._foreach_add_(self.mean, offsets, alpha=share)
        self.spread.mul_(1.0 - share).add_(squares.to(self.spread), alpha=share * (1.0 - share))


def collapse(references: Sequence[Sequence[Tensor]]) -> Collapsed:
    """Mean and spread of references.

    Args:
        references: for each its parameters; at least one.

    Examples:
        >>> both = collapse([[torch.tensor([0.0])], [torch.tensor([2.0])]])
        >>> both.mean, both.spread
        ([tensor([1.])], tensor([1.]))
    """
    wide = [torch.promote_types(tensor.dtype, torch.float32) for tensor in references[0]]
    found = Collapsed(
        [torch.zeros_like(tensor, dtype=dtype) for tensor, dtype in zip(references[0], wide, strict=True)],
        torch.zeros(len(wide), dtype=wide[0], device=references[0][0].device),
        0,
    )
    for reference in references:
        found.add(reference)
    return found


def tensor_scales(weights: Sequence[Tensor], distance: Distance, *, count: int) -> Tensor:
    """The factor of each parameter's squared distance.

    - ``"sum"``: 1, which is the paper's formula.
    - ``"relative"``: 1 as well; ``Repulsion`` divides by the distance at the start of unlearning, so that coefficients
      need no units.
    - ``"official"``: ``K^2 / (2 P n)`` for a parameter of n numbers, one of P: the authors' code sums, over references,
      the *mean* of each tensor's squares, and multiplies by K / (2 P). Biases weigh as much as matrices, and the
      distance grows with the square of the number of references.

    Args:
        weights: the parameters, of which sizes are read.
        distance: one of these.
        count: references, K.

    Returns:
        (P,) float32 or wider.

    Examples:
        >>> tensor_scales([torch.zeros(4), torch.zeros(2)], "official", count=2)
        tensor([0.2500, 0.5000])
    """
    dtype, device = torch.promote_types(weights[0].dtype, torch.float32), weights[0].device
    if distance == "official":
        sizes = torch.tensor([w.numel() for w in weights], dtype=dtype, device=device)
        return count**2 / (2 * len(weights) * sizes)
    return torch.ones(len(weights), dtype=dtype, device=device)


def squared_distance(weights: Sequence[Tensor], references: Collapsed, scales: Tensor) -> Tensor:
    """``sum_p scale_p (|theta_p - m_p|^2 + c_p)``; differentiable in the weights.

    Args:
        weights: the parameters theta.
        references: mean and spread.
        scales: (P,) from :func:`tensor_scales`.

    Returns:
        Scalar, float32 or wider.

    Examples:
        >>> theta, both = [torch.tensor([3.0])], collapse([[torch.tensor([0.0])], [torch.tensor([2.0])]])
        >>> squared_distance(theta, both, tensor_scales(theta, "sum", count=2)).item()  # of 9 and 1 the mean
        5.0
    """
    squares = [(w - mean).square().sum() for w, mean in zip(weights, references.mean, strict=True)]
    return ((torch.stack(squares) + references.spread) * scales).sum()


@allowed(kind=_KIND, alpha=positive(), cap=positive().or_none("no cap"))
def repel(squared: Tensor, kind: Kind, *, alpha: float = 1.0, cap: float | None = None) -> Tensor:
    """The repulsion as a function of a squared distance ``d^2``; it falls as the distance grows.

    Args:
        squared: d^2 >= 0.
        kind: ``"exponential"``: exp(-alpha d^2), in (0, 1]; ``"inverse"``: 1 / d^2; ``"negative_square"``: -d^2, which
            has no lower bound.
        alpha: of the exponential; default 1.
        cap: distance from which on nothing repels: d^2 counts as at most this. Default None.

    Examples:
        >>> d2 = torch.tensor(2.0)
        >>> [round(repel(d2, kind).item(), 4) for kind in ("exponential", "inverse", "negative_square")]
        [0.1353, 0.5, -2.0]
    """
    squared = squared if cap is None else squared.clamp_max(cap)
    if kind == "exponential":
        return torch.exp(-alpha * squared)
    return 1.0 / squared if kind == "inverse" else -squared


@allowed(kind=_KIND, alpha=positive(), cap=positive().or_none("no cap"))
def repel_slope(squared: Tensor, kind: Kind, *, alpha: float = 1.0, cap: float | None = None) -> Tensor:
    """Derivative of :func:`repel` by d^2, <= 0; its gradient in the weights is this times ``2 (theta - m)``.

    Args:
        squared: d^2 >= 0.
        kind: as in :func:`repel`.
        alpha: of the exponential; default 1.
        cap: the slope is 0 beyond it; default None.

    Examples:
        >>> d2 = torch.tensor(2.0)
        >>> [round(repel_slope(d2, kind).item(), 4) for kind in ("exponential", "inverse", "negative_square")]
        [-0.1353, -0.25, -1.0]
    """
    if kind == "exponential":
        slope = -alpha * torch.exp(-alpha * squared)
    elif kind == "inverse":
        slope = -squared.square().reciprocal()
    else:
        slope = -torch.ones_like(squared)
    return slope if cap is None else slope * (squared <= cap)
