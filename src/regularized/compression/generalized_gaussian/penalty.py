"""BackSlash: the rate of weights as a penalty, and as a shrinking step; here a reader of the papers begins.

Jun Wu, Yirong Xiong, Jiangtao Wen, Yuxing Han: *It Takes a Good Model to Train a Good Model: Generalized Gaussian
Priors for Optimized LLMs*, 2025, arXiv 2506.00486 (third version; the fourth is another paper under the same number).
BackSlash itself is Jun Wu, Jiangtao Wen, Yuxing Han: *BackSlash: Rate Constrained Optimized Training of Large Language
Models*, ICML 2025, arXiv 2504.16968.

==============  =================================  =================================================================
paper           here                               meaning
==============  =================================  =================================================================
w, theta        ``weights``                        the weights, all tensors together
N               number of weights                  how many there are; each parameter once
nu              ``shape``                          shape of the generalised Gaussian: 1 Laplace, 2 Gauss
b, beta         ``scale``                          its width, in the unit of the weights
rho             ``ratio``                          ``E[w^2] / E[|w|]^2``, from which nu is read off
R               :func:`rate`                       ``(1 / N) sum (|w| + eps)^nu``: what is paid for the weights
D               the task's loss                    distortion
lambda, rdo     ``weight`` or ``strength``         exchange rate: ``J = D + lambda R``
eps, clip       ``eps``                            keeps the force finite at zero where nu < 1
xi              ``gain``                           variance of initial weights times the fan
e1, e2          exponents in :mod:`.rf8`           of a power of two, and of the power of two that is left over
==============  =================================  =================================================================

nu is read off anew at every step and taken as a constant there: nothing is differentiated through it.

**Loss or step.** The paper has R in the loss, and so have we (:func:`rate`). The authors' repository of 2506.00486 has,
from the algorithm's diagram as it says, another thing: after the optimizer's step it subtracts the gradient of
``lambda R`` from the weights, without the learning rate; that is :func:`shrink_`. Under plain gradient descent of rate
1 the two agree but for the order; under Adam, which divides the gradient of the loss by its size, they do not.

**Strength.** R is a mean, so that its gradient in one weight is ``lambda nu / N`` times a number near 1: what matters
is ``lambda / N``. The authors' 2,000 is for 10^8 weights, 2e-5 each.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from regularized.compression.generalized_gaussian.distribution import WeightMoments, moments_of
from regularized.mechanisms.ranges import allowed, at_least, positive

__all__ = ["EPS", "SHAPE", "STRENGTH", "distinct", "rate", "shrink_"]

EPS = at_least(0.0, remedy="ours is 1e-3, the authors' repository has 1")
SHAPE = positive().or_none("that of the weights now")
STRENGTH = at_least(0.0, remedy="0 switches it off")


@allowed(shape=SHAPE, eps=EPS)
def rate(
    weights: Iterable[Tensor], *, shape: float | None = None, eps: float = 1e-3, table: Tensor | None = None
) -> Tensor:
    """The rate ``R = (1 / N) sum (|w| + eps)^nu``; differentiable in the weights, not through the shape.

    Value and derivative come from one pass, and what is kept of it for the backward pass becomes the gradient. Beside a
    step of training it costs about ten light passes over the weights and a logarithm; nothing with the batch. A graph
    can be gone through once: with ``retain_graph=True``, take the rate anew for each backward pass.

    Args:
        weights: all that are paid for, of any shapes, on one device; a tensor that is given twice counts once.
        shape: nu: 1 is L1, 2 is L2. Default as in the paper: that of the weights now.
        eps: at least 0. Default 1e-3, ours: the paper has "a small constant", the authors' repository 1, with which
            every weight is pulled nearly alike. With 0 and a shape below 1 the force has no bound near zero.
        table: :func:`~regularized.compression.generalized_gaussian.distribution.ratio_table` on their device, for
            loops; default a new one.

    Returns:
        Scalar, in float32 at least.

    Raises:
        ValueError: there is no weight, the shape is not positive, or eps is negative.

    Examples:
        >>> w = torch.tensor([3.0, -1.0, 0.0, 0.0], requires_grad=True)
        >>> rate([w], shape=2.0, eps=0.0).item()
        2.5
        >>> torch.autograd.grad(rate([w], shape=1.0), w)
        (tensor([ 0.2500, -0.2500,  0.0000,  0.0000]),)
    """
    tensors = distinct(weights)
    value: Tensor = _Rate.apply(shape, eps, table, *tensors)  # type: ignore[no-untyped-call]
    return value


@allowed(strength=STRENGTH, eps=EPS, shape=SHAPE)
@torch.no_grad()
def shrink_(
    weights: Iterable[Tensor],
    strength: float,
    *,
    eps: float = 1.0,
    shape: float | None = None,
    table: Tensor | None = None,
) -> WeightMoments:
    """The repository's step: ``w <- w - strength (nu / N) sign(w) (|w| + eps)^(nu - 1)``, in place.

    To be taken after ``optimizer.step()``. It does not stop at zero: a weight that is smaller than the shrink changes
    its sign.

    Args:
        weights: all that are shrunk, of any shapes, on one device; a tensor that is given twice is shrunk once.
        strength: lambda, at least 0; 0 leaves every weight as it is, bit for bit.
        eps: at least 0; default 1, the repository's ``clip``.
        shape: nu; default that of the weights now.
        table: as in :func:`rate`.

    Returns:
        The moments of the weights before the step, with the shape that was used.

    Raises:
        ValueError: there is no weight, or an option is out of range.

    Examples:
        >>> w = torch.tensor([1.0, -1.0, 0.0, 0.001])
        >>> _ = shrink_([w], 0.04, shape=1.0)
        >>> w
        tensor([ 0.9900, -0.9900,  0.0000, -0.0090])
    """
    tensors = [w.detach() for w in distinct(weights)]
    magnitudes, moments = _measured(tensors, shape, table)
    if strength:
        pull, _ = _slopes(tensors, magnitudes, moments.shape, eps)
        torch._foreach_mul_(pull, moments.shape * (strength / _number(tensors)))
        torch._foreach_sub_(tensors, pull)
    return moments


def distinct(weights: Iterable[Tensor]) -> list[Tensor]:
    """Every tensor once, in their order: tied weights are paid for once.

    Args:
        weights: of any shapes.

    Raises:
        ValueError: there are none.

    Examples:
        >>> w = torch.zeros(3)
        >>> len(distinct([w, w]))
        1
    """
    tensors = list({id(w): w for w in weights if w.numel()}.values())
    if not tensors:
        raise ValueError("there is no weight; give parameters of a model, as model.parameters()")
    return tensors


def _number(tensors: Sequence[Tensor]) -> int:
    return sum(w.numel() for w in tensors)


def _measured(tensors: list[Tensor], shape: float | None, table: Tensor | None) -> tuple[list[Tensor], WeightMoments]:
    """Magnitudes, in float32 at least (|w| + 1 has no room for |w| in half precision), and moments with the shape."""
    accurate = [w.to(torch.promote_types(w.dtype, torch.float32)) for w in tensors]
    magnitudes = list(torch._foreach_abs(accurate))
    moments = moments_of(tensors, [m.sum() for m in magnitudes], table)
    if shape is not None:
        moments = moments._replace(shape=torch.full_like(moments.shape, shape))
    return magnitudes, moments


def _slopes(
    tensors: Sequence[Tensor], magnitudes: list[Tensor], nu: Tensor, eps: float
) -> tuple[list[Tensor], list[Tensor]]:
    """``sign(w) (|w| + eps)^(nu - 1)`` of each, and its sums of ``(|w| + eps)^nu``.

    By logarithm and power of two, half the time of torch's ``pow``; and in the memory of the magnitudes, since to take
    fresh memory costs more than all that is computed here.
    """
    torch._foreach_add_(magnitudes, eps)
    if eps == 0.0:  # 0 * log(0) is NaN
        for m in magnitudes:
            m.clamp_min_(torch.finfo(m.dtype).tiny)
    torch._foreach_log2_(magnitudes)
    torch._foreach_mul_(magnitudes, nu - 1)
    totals = []
    for slope, w in zip(magnitudes, tensors, strict=True):
        rest = eps * slope.exp2_().sum()
        slope.mul_(torch.sign(w))
        # (|w| + eps)^nu = (|w| + eps)^(nu - 1) (|w| + eps)
        totals.append(torch.dot(slope.reshape(-1), w.to(slope.dtype).reshape(-1)) + rest)
    return magnitudes, totals


class _Rate(torch.autograd.Function):
    """The rate; its derivative comes with the value, and is kept as what becomes the gradient."""

    @staticmethod
    def forward(ctx: Any, shape: float | None, eps: float, table: Tensor | None, *weights: Tensor) -> Tensor:
        magnitudes, moments = _measured(list(weights), shape, table)
        slopes, totals = _slopes(weights, magnitudes, moments.shape, eps)
        number = _number(weights)
        ctx.save_for_backward(moments.shape / number, *slopes)
        ctx.dtypes = [w.dtype for w in weights]
        return torch.stack(totals).sum() / number

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        factor, *slopes = ctx.saved_tensors
        torch._foreach_mul_(slopes, grads[0] * factor)  # in place: a second backward pass is refused by torch
        return None, None, None, *(slope.to(dtype) for slope, dtype in zip(slopes, ctx.dtypes, strict=True))
