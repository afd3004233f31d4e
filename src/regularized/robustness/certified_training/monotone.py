"""Interval rules of what never falls in any entry (both ends go through), and of what moves or averages entries."""

import builtins
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regularized.robustness.certified_training.interval import Interval
from regularized.robustness.certified_training.rules import Rule, interval_rule

__all__ = ["as_interval"]


def as_interval(value: Any, like: Interval) -> Interval:
    """A box as it is; a tensor or number as a point."""
    if isinstance(value, Interval):
        return value
    return Interval.point(torch.as_tensor(value, dtype=like.example.dtype, device=like.example.device))


# -- ReLU, the one activation that the penalties look at ----------------------------------------------


@interval_rule(nn.ReLU)
def _relu_module(module: nn.ReLU, box: Interval) -> Interval:
    return box.relu()


@interval_rule(torch.relu, torch.relu_, F.relu, "relu", "relu_")
def _relu(box: Interval, inplace: bool = False) -> Interval:
    return box.relu()


# -- both ends ----------------------------------------------------------------------------------------


@interval_rule(
    *(nn.Sigmoid, nn.LogSigmoid, nn.Tanh, nn.Softplus, nn.Softsign, nn.Hardtanh, nn.ReLU6, nn.Hardsigmoid, nn.SELU),
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
    *(nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d),
)
def _ends_of_module(module: nn.Module, box: Interval) -> Interval:
    if getattr(module, "inplace", False):  # the ends belong to the box, which others look at
        return box.map(lambda end: module.forward(end.clone()))
    return box.map(module.forward)


@interval_rule(nn.ELU, nn.CELU)
def _elu(module: nn.ELU | nn.CELU, box: Interval) -> Interval:
    if module.alpha < 0:
        raise ValueError(f"{module} is not monotone, and its interval rule needs alpha >= 0")
    return _ends_of_module(module, box)


@interval_rule(nn.LeakyReLU)
def _leaky_relu_module(module: nn.LeakyReLU, box: Interval) -> Interval:
    return _leaky_relu(box, module.negative_slope)


@interval_rule(F.leaky_relu)
def _leaky_relu(box: Interval, negative_slope: float = 0.01, inplace: bool = False) -> Interval:
    if negative_slope < 0:
        raise ValueError(f"a leaky ReLU of slope {negative_slope:g} is not monotone; its interval rule needs >= 0")
    return box.map(lambda end: F.leaky_relu(end, negative_slope))


@interval_rule(torch.clamp, torch.clip, "clamp", "clip")
def _clamp(box: Interval, min: float | None = None, max: float | None = None) -> Interval:
    return box.map(lambda end: torch.clamp(end, min, max))


def _ends(function: Callable[..., Any]) -> Rule:
    """The rule of a function that never falls in its first argument, whatever the others are."""

    def rule(box: Interval, *args: Any, **kwargs: Any) -> Interval:
        return box.map(lambda end: function(end, *args, **kwargs))

    return rule


_FALLING_NOWHERE: tuple[Callable[..., Any], ...] = (
    *(torch.sigmoid, torch.tanh, torch.exp, F.sigmoid, F.tanh, F.softplus),
    *(F.max_pool1d, F.max_pool2d, F.max_pool3d, torch.max_pool1d, torch.max_pool2d, torch.max_pool3d),
    *(F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d),
    *(torch.amax, torch.amin),
)
for _function in (F.hardtanh, F.relu6, F.hardsigmoid, F.selu):  # which can be asked to work in place
    interval_rule(_function)(_ends(lambda end, *args, _f=_function, **kwargs: _f(end.clone(), *args, **kwargs)))
for _function in _FALLING_NOWHERE:
    interval_rule(_function)(_ends(_function))
for _name in ("sigmoid", "tanh", "exp", "amax", "amin"):
    interval_rule(_name)(_ends(getattr(Tensor, _name)))


def _ends_of_two(function: Callable[[Tensor, Tensor], Tensor]) -> Rule:
    def rule(one: Any, other: Any) -> Interval:
        known = one if isinstance(one, Interval) else other
        a, b = as_interval(one, known), as_interval(other, known)
        return Interval.between(function(a.lower, b.lower), function(a.upper, b.upper))

    return rule


interval_rule(torch.maximum, "maximum")(_ends_of_two(torch.maximum))
interval_rule(torch.minimum, "minimum")(_ends_of_two(torch.minimum))


# -- moved and averaged entries -----------------------------------------------------------------------


@interval_rule(
    *(nn.Identity, nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle),
    *(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d),
    *(nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d),
    *(nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d),
)
def _moved_by_module(module: nn.Module, box: Interval) -> Interval:
    return box.rearrange(module.forward)


@interval_rule(nn.Upsample)
def _upsample(module: nn.Upsample, box: Interval) -> Interval:
    if module.mode == "bicubic":
        raise ValueError("bicubic upsampling has negative weights, and no interval rule; use mode='bilinear'")
    return box.rearrange(module.forward)


@interval_rule(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
def _dropout_module(module: nn.Dropout, box: Interval) -> Interval:
    return _dropout(box, module.p, module.training)


@interval_rule(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d)
def _dropout(box: Interval, p: float = 0.5, training: bool = True, inplace: bool = False) -> Interval:
    if training and p:
        raise ValueError(
            f"dropout with p={p:g} is active, and would draw another mask for the bounds than for the forward pass; "
            "set its p to 0, or put it into evaluation mode"
        )
    return box


@interval_rule(F.pad)
def _pad(box: Interval, pad: Any, mode: str = "constant", value: float | None = None) -> Interval:
    if mode == "constant" and value:
        return box.map(lambda end: F.pad(end, pad, mode, value))
    return box.rearrange(lambda part: F.pad(part, pad, mode))


def _moved(function: Callable[..., Any]) -> Rule:
    """The rule of a function that is linear in its first argument, with coefficients >= 0."""

    def rule(box: Interval, *args: Any, **kwargs: Any) -> Interval:
        return box.rearrange(lambda part: function(part, *args, **kwargs))

    return rule


_MOVING: tuple[Callable[..., Any], ...] = (
    *(torch.flatten, torch.reshape, torch.permute, torch.transpose, torch.squeeze, torch.unsqueeze, torch.unflatten),
    *(torch.mean, torch.sum, torch.flip, torch.roll),
    *(F.avg_pool1d, F.avg_pool2d, F.avg_pool3d),
    *(F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d),
)
for _function in _MOVING:
    interval_rule(_function)(_moved(_function))
for _name in (
    *("flatten", "reshape", "permute", "transpose", "squeeze", "unsqueeze", "unflatten", "contiguous"),
    *("expand", "repeat", "mean", "sum", "flip", "roll", "clone", "t", "narrow", "select"),
):
    interval_rule(_name)(_moved(getattr(Tensor, _name)))
interval_rule("view")(_moved(Tensor.reshape))  # a radius that is expanded over the batch cannot always be viewed
interval_rule(operator.getitem)(_moved(operator.getitem))


def _joined(function: Callable[..., Tensor]) -> Rule:
    def rule(boxes: Sequence[Any], dim: int = 0) -> Interval:
        known = next(box for box in boxes if isinstance(box, Interval))
        every = [as_interval(box, known) for box in boxes]
        if any(box.has_ends for box in every):
            return Interval.between(function([b.lower for b in every], dim), function([b.upper for b in every], dim))
        return Interval.around(function([b.centre for b in every], dim), function([b.radius for b in every], dim))

    return rule


interval_rule(torch.cat, torch.concat)(_joined(torch.cat))
interval_rule(torch.stack)(_joined(torch.stack))


# -- what is asked of the shape -----------------------------------------------------------------------


@interval_rule("size")
def _size(box: Interval, dim: int | None = None) -> Any:
    return box.shape if dim is None else box.shape[dim]


@interval_rule("dim")
def _dim(box: Interval) -> int:
    return len(box.shape)


@interval_rule(builtins.getattr)
def _attribute(box: Interval, name: str) -> Any:
    if name in ("shape", "ndim", "dtype", "device"):
        return getattr(box.example, name)
    if name in ("T", "mT"):
        return box.rearrange(lambda part: getattr(part, name))
    raise AttributeError(f"the attribute {name!r} of a tensor has no interval rule; use a method such as reshape")
