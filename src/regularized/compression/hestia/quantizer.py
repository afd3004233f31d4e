"""Ternary and other low-bit weights that begin soft and end hard: a softmax over the levels whose temperature falls.

G. Wang, F. Wang, Lv, Zong, Yang: *HESTIA: A Hessian-Guided Differentiable Quantization-Aware Training Framework for
Extremely Low-Bit LLMs*, 2026, arXiv 2601.20745; official code ``hestia2026/Hestia`` at ``04fdb17``.

==============  =======================  ===========================================================================
paper, code     here                     meaning
==============  =======================  ===========================================================================
W               ``weight``               latent weights, what the optimizer sees
gamma           ``scale``                mean absolute value of a group of weights, at least 1e-5; *not* detached
z = W / gamma   ``z``                    a weight in units of its group's scale
C               ``levels``               the allowed values of z, ``(-1, 0, 1)`` for ternary weights
tau, temp       ``temperature``          of the softmax over the levels; 0 is hard rounding
p               ``pressure``             share of the quantized weight in what the layer computes with
Psi_tau(z)      :func:`soft_levels`      expected level under ``softmax_j(-(z - c_j)^2 / tau)``
W_q             :func:`anneal`           ``W + p (gamma Psi_tau(W / gamma) - W)``
chi = Tr(H)     ``traces.py``            trace of the loss' Hessian, how sensitive a weight tensor is
f, temp_scale   ``schedule.py``          factor on the temperature of a tensor, from its trace
rho, a          ``schedule.py``          shares of training in which pressure rises and temperature falls
==============  =======================  ===========================================================================

The official code makes a tensor with one more dimension, as long as the codebook, for each weight. For levels at equal
distances the expected level is a *staircase of sigmoids*: with ``x = exp(2 d z / tau)`` the softmax' normaliser is a
polynomial in x with negative roots ``-r_k``, and the mean of the level's number is ``sum_k x / (x + r_k)``. Ternary
weights take two, ``sigma(2 z / tau + rho) + sigma(2 z / tau - rho) - 1`` with ``cosh(rho) = exp(1 / tau) / 2``, which
neither over- nor underflow, and whose steps move to ``z = +-1/2`` as tau falls. The backward pass keeps the weights
alone and computes the rest again.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from regularized.mechanisms.ranges import Choice, allowed, at_least, share

__all__ = [
    "CODEBOOKS",
    "Codebook",
    "StraightThrough",
    "anneal",
    "check_group_size",
    "from_codes",
    "group_scales",
    "levels_of",
    "optimal_temperature",
    "quantize_weight",
    "soft_levels",
    "to_codes",
]

Codebook: TypeAlias = Literal["binary", "ternary", "quaternary"] | Sequence[float]
StraightThrough: TypeAlias = Literal["identity", "with_scale"]

CODEBOOKS: dict[str, tuple[float, ...]] = {
    "binary": (-1.0, 1.0),
    "ternary": (-1.0, 0.0, 1.0),
    "quaternary": (-1.5, -0.5, 0.5, 1.5),
}
"""Levels by name, in units of a group's mean absolute weight. The paper's is ternary; the others are ours."""

SMALLEST_SCALE = 1e-5
_TEMPERATURE_OFFSET = 1e-6  # the official code divides by tau + 1e-6


# -- levels -------------------------------------------------------------------------------------------


def levels_of(codebook: Codebook) -> tuple[float, ...]:
    """The levels of a codebook.

    Args:
        codebook: a name of :data:`CODEBOOKS`, or two to 256 rising numbers in units of a group's mean absolute weight.

    Raises:
        ValueError: an unknown name; fewer than two levels or more than 256; levels that do not rise or are not finite.

    Examples:
        >>> levels_of("ternary")
        (-1.0, 0.0, 1.0)
    """
    if isinstance(codebook, str):
        Choice(*CODEBOOKS, meaning="or rising numbers such as (-1, 0, 1)")("codebook", codebook)
        return CODEBOOKS[codebook]
    levels = tuple(float(level) for level in codebook)
    if not 2 <= len(levels) <= 256:
        raise ValueError(f"a codebook needs 2 to 256 levels, got {len(levels)}; ternary weights have (-1, 0, 1)")
    if not all(math.isfinite(level) for level in levels) or any(a >= b for a, b in itertools.pairwise(levels)):
        raise ValueError(f"the levels of a codebook must be finite and rise, got {levels}; sort them, each once")
    return levels


def _nearest(z: Tensor, levels: tuple[float, ...]) -> Tensor:
    """The level next to each z; half way the one nearer to zero, as the code's rounding to even does it."""
    if levels == CODEBOOKS["ternary"]:
        return z.round().clamp_(-1.0, 1.0).add_(0.0)  # no -0.0: codes know one zero
    table = z.new_tensor(levels)
    middle = (table[1:] + table[:-1]) / 2
    number = torch.where(z > 0, torch.bucketize(z, middle), torch.bucketize(z, middle, right=True))
    return table[number].addcmul_(z, z.new_zeros(()))  # 0 * z: what is not finite stays so


def _steps(levels: tuple[float, ...], temperature: float) -> tuple[float, ...] | None:
    """The rho_k of the staircase ``sum_k sigma(2 d z / tau + rho_k)``; None where it has no such simple form.

    For two to four levels at equal distances around zero, and a temperature at which the polynomial has real roots.
    """
    if levels == CODEBOOKS["binary"]:
        return (0.0,)
    if levels == CODEBOOKS["ternary"]:
        log_cosh = 1.0 / temperature - math.log(2.0)
        between: tuple[float, ...] = ()
    elif levels == CODEBOOKS["quaternary"]:
        log_cosh = 2.0 / temperature + math.log1p(-math.exp(-2.0 / temperature)) - math.log(2.0)
        between = (0.0,)
    else:
        return None
    if log_cosh < 0.0:
        return None
    rho = log_cosh + math.log1p(math.sqrt(-math.expm1(-2.0 * log_cosh)))  # arccosh without its overflow
    return (rho, *between, -rho)


def _expected(
    weight: Tensor, scale: Tensor | float, levels: tuple[float, ...], temperature: float, *, slope: bool
) -> tuple[Tensor, Tensor | None]:
    """Expected level at each ``z = weight / scale``, and its derivative by z where it is asked for."""
    steps = _steps(levels, temperature)
    if steps is None:
        return _expected_by_softmax(weight / scale, levels, temperature, slope=slope)
    distance = levels[1] - levels[0]
    x = weight * (2.0 * distance / temperature / scale)
    value: Tensor | None = None
    rise: Tensor | None = None
    for rho in steps:
        step = (x + rho).sigmoid_()
        if slope:
            risen = torch.addcmul(step, step, step, value=-1.0)  # sigma (1 - sigma)
            rise = risen if rise is None else rise.add_(risen)
        value = step if value is None else value.add_(step)
    assert value is not None
    if distance != 1.0:
        value.mul_(distance)
    value.add_(levels[0])
    return value, None if rise is None else rise.mul_(2.0 * distance * distance / temperature)


def _expected_by_softmax(
    z: Tensor, levels: tuple[float, ...], temperature: float, *, slope: bool
) -> tuple[Tensor, Tensor | None]:
    """The same of any levels, one at a time: nothing has the codebook as a dimension."""

    def logit(level: float) -> Tensor:
        return torch.add(z * (2.0 * level / temperature), -level * level / temperature)  # + what all have in common

    top = functools.reduce(torch.maximum, (logit(level) for level in levels))
    total, first, second = torch.zeros_like(z), torch.zeros_like(z), torch.zeros_like(z)
    for level in levels:
        mass = (logit(level) - top).exp_()
        total += mass
        first.add_(mass, alpha=level)
        second.add_(mass, alpha=level * level)
    value = first.div_(total)
    if not slope:
        return value, None
    variance = second.div_(total).addcmul_(value, value, value=-1.0).clamp_(min=0.0)
    return value, variance.mul_(2.0 / temperature)


@allowed(temperature=at_least(0.0, "of the softmax; 0 is hard rounding"))
def soft_levels(z: Tensor, temperature: float, *, codebook: Codebook = "ternary") -> Tensor:
    """Expected level ``sum_j c_j softmax_j(-(z - c_j)^2 / temperature)``; the nearest level at temperature 0.

    Args:
        z: any shape, in units of the scale.
        temperature: at least 0. The official code adds 1e-6 to it, as :func:`anneal` does; here it is taken as it is.
        codebook: see :func:`levels_of`.

    Returns:
        Like ``z``; no gradient, that is :func:`anneal`'s.

    Examples:
        >>> soft_levels(torch.tensor([-2.0, 0.0, 0.5]), 0.1)
        tensor([-1.0000,  0.0000,  0.5000])
    """
    levels = levels_of(codebook)
    with torch.no_grad():
        return _nearest(z, levels) if temperature == 0.0 else _expected(z, 1.0, levels, temperature, slope=False)[0]


# -- groups -------------------------------------------------------------------------------------------


def check_group_size(shape: Sequence[int], group_size: int, *, owner: str = "the weight") -> None:
    """Refuse a group size that does not fit.

    Args:
        shape: of the weight.
        group_size: as in :func:`anneal`.
        owner: what has the weight, for the message.

    Raises:
        ValueError: it is below -1, or positive and no divisor of the last dimension.
    """
    if group_size < -1:
        raise ValueError(
            f"group_size must be positive (so many weights of a row share a scale), -1 (a row) or 0 (the whole "
            f"tensor), got {group_size}"
        )
    if group_size > 0 and shape[-1] % group_size:
        fits = [size for size in (256, 128, 64, 32, 16, 8) if shape[-1] % size == 0]
        raise ValueError(
            f"{owner} has shape {tuple(shape)}, whose last dimension {shape[-1]} is not divisible by group_size="
            f"{group_size}; take {', '.join(map(str, [*fits, -1]))} (a scale a row) or 0 (one scale)"
        )


def _grouped(weight: Tensor, group_size: int) -> Tensor:
    """(groups, weights of a group), in float32 at least."""
    check_group_size(weight.shape, group_size)
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if group_size == 0:
        return wide.reshape(1, -1)
    return wide.reshape(-1, weight.shape[-1] if group_size == -1 else group_size)


def _scales(grouped: Tensor) -> Tensor:
    return grouped.abs().mean(dim=1, keepdim=True).clamp_(min=SMALLEST_SCALE)


def group_scales(weight: Tensor, *, group_size: int = 128) -> Tensor:
    """Mean absolute weight of each group, at least 1e-5.

    Args:
        weight: any shape.
        group_size: as in :func:`anneal`.

    Returns:
        (groups, 1), in float32 at least; no gradient.

    Examples:
        >>> group_scales(torch.tensor([[1.0, -3.0], [0.0, 0.0]]), group_size=-1)
        tensor([[2.0000e+00],
                [1.0000e-05]])
    """
    return _scales(_grouped(weight.detach(), group_size))


# -- soft ---------------------------------------------------------------------------------------------


class _Anneal(torch.autograd.Function):
    """Keeps the latent weights, which are alive anyway, and a number a group."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        pressure: float,
        temperature: float,
        levels: tuple[float, ...],
        group_size: int,
        with_scale: bool,
    ) -> Tensor:
        grouped = _grouped(weight, group_size)
        scale = _scales(grouped)
        if temperature == 0.0:
            value = _nearest(grouped / scale, levels)
        else:
            value, _ = _expected(grouped, scale, levels, temperature + _TEMPERATURE_OFFSET, slope=False)
        out = value.mul_(scale)
        if pressure < 1.0:
            out = torch.lerp(grouped, out, pressure, out=out)
        ctx.save_for_backward(weight, scale)
        ctx.settings = (pressure, temperature, levels, group_size, with_scale)
        return out.reshape(weight.shape).to(weight.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        weight, scale = ctx.saved_tensors
        pressure, temperature, levels, group_size, with_scale = ctx.settings
        grad = _grouped(grads[0], group_size)
        if temperature == 0.0 and not with_scale:
            return grads[0], None, None, None, None, None
        grouped = _grouped(weight, group_size)
        # q = scale Psi(w / scale):  dq / dw = Psi', and through the scale  Psi - Psi' w / scale.
        if temperature == 0.0:
            through = grad
            of_scale = (grad * _nearest(grouped / scale, levels)).sum(dim=1, keepdim=True)
        else:
            value, slope = _expected(grouped, scale, levels, temperature + _TEMPERATURE_OFFSET, slope=True)
            assert slope is not None
            through = slope.mul_(grad)
            of_scale = value.mul_(grad).sum(dim=1, keepdim=True)
            of_scale -= torch.mul(through, grouped, out=value).sum(dim=1, keepdim=True) / scale
        of_scale = torch.where(scale > SMALLEST_SCALE, of_scale / grouped.shape[1], 0.0)
        out = torch.addcmul(through, torch.sign(grouped), of_scale)
        if pressure < 1.0:
            out = torch.lerp(grad, out, pressure)
        return out.reshape(weight.shape).to(weight.dtype), None, None, None, None, None


@allowed(
    pressure=share("of the quantized weight"),
    temperature=at_least(0.0, "of the softmax; 0 is hard rounding"),
    straight_through=Choice("identity", "with_scale"),
)
def anneal(
    weight: Tensor,
    *,
    temperature: float,
    pressure: float = 1.0,
    codebook: Codebook = "ternary",
    group_size: int = 128,
    straight_through: StraightThrough = "identity",
) -> Tensor:
    """What a layer computes with in training: the weight, softly quantized, mixed with the weight itself.

    Args:
        weight: latent weights, any shape; half precision is computed in float32.
        temperature: at least 0; 0 is hard rounding with a straight-through gradient.
        pressure: share of the quantized weight, 0 to 1; at 0 the very tensor ``weight`` comes back.
        codebook: see :func:`levels_of`; default ternary.
        group_size: weights that share a scale: so many of the last dimension, -1 a whole row of it, 0 all. Default 128,
            as in the paper's experiments (its code's default is 0).
        straight_through: gradient at temperature 0: ``"identity"`` (default, what is usually meant), or
            ``"with_scale"``, the identity and the gradient through the scale, as in the official code.

    Returns:
        Like ``weight``, differentiable once.

    Raises:
        ValueError: a setting is out of range, or the last dimension is not divisible by ``group_size``.

    Examples:
        >>> w = torch.tensor([[0.1, -0.9, 2.0, 1.0]])
        >>> anneal(w, temperature=0.0, group_size=-1)
        tensor([[ 0., -1.,  1.,  1.]])
        >>> anneal(w, temperature=0.3, group_size=-1)
        tensor([[ 0.0470, -0.9350,  1.0000,  0.9656]])
    """
    levels = levels_of(codebook)
    check_group_size(weight.shape, group_size)
    if pressure == 0.0:
        return weight
    out: Tensor = _Anneal.apply(  # type: ignore[no-untyped-call]
        weight, pressure, temperature, levels, group_size, straight_through == "with_scale"
    )
    return out


# -- hard ---------------------------------------------------------------------------------------------


def to_codes(weight: Tensor, *, codebook: Codebook = "ternary", group_size: int = 128) -> tuple[Tensor, Tensor]:
    """Hard quantization: the number of the nearest level of each weight, and the scale of each group.

    Args:
        weight: any shape.
        codebook: see :func:`levels_of`.
        group_size: as in :func:`anneal`.

    Returns:
        Codes, uint8, like ``weight``; scales (groups, 1), float32 at least.

    Raises:
        ValueError: ``weight`` holds NaN or infinite entries, or a setting does not fit.

    Examples:
        >>> codes, scales = to_codes(torch.tensor([[0.1, -0.9, 2.0, 1.0]]), group_size=-1)
        >>> codes, scales
        (tensor([[1, 0, 2, 2]], dtype=torch.uint8), tensor([[1.]]))
    """
    levels = levels_of(codebook)
    grouped = _grouped(weight.detach(), group_size)
    scale = _scales(grouped)
    if not bool(scale.isfinite().all()):
        raise ValueError("the weight holds NaN or infinite entries; there is no code for them")
    table = grouped.new_tensor(levels)
    codes = torch.bucketize(_nearest(grouped / scale, levels), table)
    return codes.to(torch.uint8).reshape(weight.shape), scale


def from_codes(codes: Tensor, scales: Tensor, *, codebook: Codebook = "ternary", dtype: torch.dtype) -> Tensor:
    """The weights of :func:`to_codes`'s codes and scales.

    Args:
        codes: uint8, any shape.
        scales: (groups, 1).
        codebook: that of the codes.
        dtype: of the weights.

    Returns:
        Like ``codes``, of type ``dtype``.

    Examples:
        >>> from_codes(torch.tensor([[1, 0, 2]], dtype=torch.uint8), torch.tensor([[0.5]]), dtype=torch.float32)
        tensor([[ 0.0000, -0.5000,  0.5000]])
    """
    table = scales.new_tensor(levels_of(codebook))
    grouped = table[codes.reshape(len(scales), -1).int()]
    return grouped.mul_(scales).reshape(codes.shape).to(dtype)


def quantize_weight(weight: Tensor, *, codebook: Codebook = "ternary", group_size: int = 128) -> Tensor:
    """The hard weight: what a layer computes with in evaluation and after freezing; bit for bit :func:`from_codes`.

    Quantizing twice is not quantizing once: the scale of a quantized group is smaller, since its zeros count.

    Args:
        weight: any shape; NaN stays NaN.
        codebook: see :func:`levels_of`.
        group_size: as in :func:`anneal`.

    Returns:
        Like ``weight``; no gradient.

    Examples:
        >>> quantize_weight(torch.tensor([[0.1, -0.9, 2.0, 1.0]]), group_size=-1)
        tensor([[ 0., -1.,  1.,  1.]])
    """
    grouped = _grouped(weight.detach(), group_size)
    scale = _scales(grouped)
    hard = _nearest(grouped / scale, levels_of(codebook)).mul_(scale)
    return hard.reshape(weight.shape).to(weight.dtype)


# -- the temperature to begin with ---------------------------------------------------------------------


def optimal_temperature(codebook: Codebook = "ternary", *, low: float = 0.1, high: float = 2.0) -> float:
    """The temperature at which softly quantized normal weights differ least from themselves, in mean square.

    The weights are N(0, pi / 2), so that their mean absolute value, the scale, is 1.

    Args:
        codebook: see :func:`levels_of`.
        low: lower end of the search; default 0.1, the code's.
        high: upper end; default 2, the code's.

    Returns:
        0.3508853 for ternary weights; the code's search stops at 0.3508856.

    Raises:
        ValueError: the ends are not ``0 < low < high``.

    Examples:
        >>> round(optimal_temperature(), 5)
        0.35089
    """
    if not 0.0 < low < high < math.inf:
        raise ValueError(f"the search needs 0 < low < high, got low={low}, high={high}")
    return _optimal_temperature(levels_of(codebook), low, high)


@functools.lru_cache
def _optimal_temperature(levels: tuple[float, ...], low: float, high: float) -> float:
    z = torch.linspace(-10.0, 10.0, 4001, dtype=torch.float64)
    density = torch.exp(-z.square() / math.pi)

    def error(temperature: float) -> float:
        return float(((_expected(z, 1.0, levels, temperature, slope=False)[0] - z).square() * density).sum())

    golden = (math.sqrt(5.0) - 1.0) / 2.0
    a, b = low, high
    while b - a > 1e-9:  # golden section: the error has one minimum
        left, right = b - golden * (b - a), a + golden * (b - a)
        a, b = (a, right) if error(left) < error(right) else (left, b)
    return (a + b) / 2.0
