"""Interval rules of affine maps: centre by the weights, radius by their absolute values; and of arithmetic."""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regularized.robustness.certified_training.interval import Interval
from regularized.robustness.certified_training.monotone import as_interval
from regularized.robustness.certified_training.rules import interval_rule

__all__ = ["affine_layer", "affine_map"]

Apply = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def affine_map(apply: Apply, weight: Tensor, bias: Tensor | None, box: Interval) -> Interval:
    """The image under a map that is linear in the input and in the weight.

    Args:
        apply: ``apply(input, weight, bias)``.
        weight: of the map.
        bias: added to the centre; None where there is none.
        box: what goes in. A radius that is the same for the whole batch, by ``expand``, is computed once.
    """
    radius = box.radius
    if radius.ndim > 1 and len(radius) > 1 and radius.stride(0) == 0:
        out = apply(radius[:1], weight.abs(), None)
        return Interval.around(apply(box.centre, weight, bias), out.expand(len(radius), *out.shape[1:]))
    return Interval.around(apply(box.centre, weight, bias), apply(radius, weight.abs(), None))


def affine_layer(module: nn.Module) -> Apply | None:
    """How a linear or convolutional layer applies a weight and a bias that are not its own; None for other modules."""
    if isinstance(module, nn.Linear):
        return F.linear
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return module._conv_forward
    return None


@interval_rule(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
def _layer(module: nn.Linear | nn.Conv2d, box: Interval) -> Interval:
    apply = affine_layer(module)
    assert apply is not None
    return affine_map(apply, module.weight, module.bias, box)


@interval_rule(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
def _transposed(module: nn.ConvTranspose2d, box: Interval, output_size: list[int] | None = None) -> Interval:
    def apply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        tensors = {"weight": weight}
        if module.bias is not None:
            tensors["bias"] = torch.zeros_like(module.bias) if bias is None else bias
        out: Tensor = torch.func.functional_call(module, tensors, (x, output_size))
        return out

    return affine_map(apply, module.weight, module.bias, box)


@interval_rule(F.linear)
def _linear(box: Interval, weight: Tensor, bias: Tensor | None = None) -> Interval:
    return affine_map(F.linear, weight, bias, box)


@interval_rule(F.conv1d)
def _conv1d(box: Interval, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any) -> Interval:
    return affine_map(lambda x, w, b: F.conv1d(x, w, b, *args, **kwargs), weight, bias, box)


@interval_rule(F.conv2d)
def _conv2d(box: Interval, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any) -> Interval:
    return affine_map(lambda x, w, b: F.conv2d(x, w, b, *args, **kwargs), weight, bias, box)


@interval_rule(torch.matmul, operator.matmul, "matmul", "__matmul__")
def _matmul(one: Any, other: Any) -> Interval:
    if isinstance(one, Interval) and isinstance(other, Interval):
        raise ValueError("the product of two matrices that both depend on the input has no interval rule")
    if isinstance(one, Interval):
        return affine_map(lambda x, w, _: x @ w, other, None, one)
    return affine_map(lambda x, w, _: w @ x, one, None, other)


# -- arithmetic ---------------------------------------------------------------------------------------


def _boxes(one: Any, other: Any) -> tuple[Interval, Interval]:
    known = one if isinstance(one, Interval) else other
    return as_interval(one, known), as_interval(other, known)


@interval_rule(operator.add, operator.iadd, torch.add, "add", "add_", "__add__", "__radd__")
def _add(one: Any, other: Any, *, alpha: float = 1) -> Interval:
    a, b = _boxes(one, other if alpha == 1 else _times(other, alpha))
    if not (isinstance(one, Interval) and isinstance(other, Interval)):
        shift = b.centre if isinstance(one, Interval) else a.centre
        box = a if isinstance(one, Interval) else b
        return _shifted(box, shift)
    if a.has_ends and b.has_ends:
        return Interval.between(a.lower + b.lower, a.upper + b.upper)
    return Interval.around(a.centre + b.centre, a.radius + b.radius)


def _shifted(box: Interval, shift: Tensor) -> Interval:
    if box.has_ends:
        return box.map(lambda end: end + shift)
    centre = box.centre + shift
    return Interval.around(centre, box.radius.expand(centre.shape))


@interval_rule(operator.sub, operator.isub, torch.sub, "sub", "sub_", "__sub__")
def _sub(one: Any, other: Any, *, alpha: float = 1) -> Interval:
    return _add(one, _times(other, -alpha))


@interval_rule(operator.neg, torch.neg, "neg")
def _neg(box: Interval) -> Interval:
    return Interval.around(-box.centre, box.radius)


@interval_rule(operator.mul, operator.imul, torch.mul, "mul", "mul_", "__mul__", "__rmul__")
def _mul(one: Any, other: Any) -> Interval:
    if isinstance(one, Interval) and isinstance(other, Interval):
        corners = torch.stack([x * y for x in (one.lower, one.upper) for y in (other.lower, other.upper)])
        return Interval.between(corners.amin(dim=0), corners.amax(dim=0))
    product = _times(one, other)
    assert isinstance(product, Interval)
    return product


@interval_rule(operator.truediv, torch.div, torch.true_divide, "div", "__truediv__")
def _div(one: Any, other: Any) -> Interval:
    if isinstance(other, Interval):
        raise ValueError("dividing by what depends on the input has no interval rule: it may be 0 in the box")
    return Interval.around(one.centre / other, one.radius / abs(other))


def _times(value: Any, factor: Any) -> Any:
    """A box, or anything else, times a number or tensor that is no box."""
    if isinstance(factor, Interval):
        value, factor = factor, value
    if not isinstance(value, Interval):
        return value * factor
    centre = value.centre * factor
    return Interval.around(centre, (value.radius * abs(factor)).expand(centre.shape))
