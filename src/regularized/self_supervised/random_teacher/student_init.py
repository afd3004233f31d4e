"""Where a student starts: at its teacher, far from it, or between; all drawn from generators that the caller seeds."""

import math
from typing import TypeVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from regularized.mechanisms.frozen import check_apart
from regularized.mechanisms.ranges import allowed, at_least, share
from regularized.self_supervised.random_teacher.layer import BottleneckHead

__all__ = ["draw_weights", "interpolate_init", "neighbourhood_init"]

Network = TypeVar("Network", bound=nn.Module)


@torch.no_grad()
def draw_weights(model: Network, *, generator: torch.Generator) -> Network:
    """Draw all weights of a model anew, from one generator.

    Matrices and convolutions are Kaiming normal for ReLU by the fan out, as the official encoders; biases zero;
    normalisation 1 and 0. Heads draw their own. The stream is the CPU's, so the weights do not depend on the device.

    Args:
        model: changed in place; buffers stay.
        generator: on the CPU.

    Returns:
        The model.

    Raises:
        TypeError: a submodule with parameters of its own is none of these, so nothing is known of its scale.

    Examples:
        >>> a, b = (draw_weights(nn.Linear(3, 2), generator=torch.Generator().manual_seed(0)) for _ in range(2))
        >>> torch.equal(a.weight, b.weight)
        True
    """
    heads = [part for part in model.modules() if isinstance(part, BottleneckHead)]
    of_heads = {id(part) for head in heads for part in head.modules()}
    for name, part in model.named_modules():
        if isinstance(part, BottleneckHead):
            part.reset_parameters(generator)
        elif id(part) in of_heads:
            continue
        elif isinstance(part, nn.Linear | _ConvNd):
            drawn = torch.empty(part.weight.shape)
            nn.init.kaiming_normal_(drawn, mode="fan_out", nonlinearity="relu", generator=generator)
            part.weight.copy_(drawn)
            if part.bias is not None:
                part.bias.zero_()
        elif isinstance(part, _NormBase | nn.GroupNorm | nn.LayerNorm):
            if part.weight is not None:
                part.weight.fill_(1.0)
            if part.bias is not None:
                part.bias.zero_()
        elif any(True for _ in part.parameters(recurse=False)):
            raise TypeError(
                f"draw_weights does not know how to initialise {name or 'the model'!r} ({type(part).__name__}); draw "
                "its parameters yourself, or build the whole model under torch.random.fork_rng() with a seed"
            )
    return model


@allowed(alpha=share(remedy="0 copies the teacher, 1 is independent of it"))
def interpolate_init(teacher: nn.Module, fresh: Network, alpha: float, *, variance_preserving: bool = False) -> Network:
    """Start a student between its teacher and fresh weights, ``(1 - alpha) theta_T + alpha theta_fresh``.

    Every parameter is interpolated, those of normalisation and biases too; buffers stay those of the fresh network.

    Args:
        teacher: the random teacher.
        fresh: an independent network of the same structure; changed in place, it becomes the student.
        alpha: distance from the teacher, in [0, 1]; 0 is an exact copy, 1 leaves the fresh weights.
        variance_preserving: divide by ``sqrt((1 - alpha)^2 + alpha^2)``, so that weights that were drawn independently
            keep their variance on the way; default False (official).

    Returns:
        ``fresh``, now the student.

    Raises:
        ValueError: ``alpha`` outside [0, 1]; the networks share memory, or a parameter differs in name or shape.

    Examples:
        >>> teacher, fresh = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        >>> teacher.weight.data, fresh.weight.data = torch.tensor([[1.0]]), torch.tensor([[2.0]])
        >>> interpolate_init(teacher, fresh, 0.25).weight.item()
        1.25
    """
    factor = math.hypot(1.0 - alpha, alpha) if variance_preserving else 1.0
    return _combine(teacher, fresh, 1.0 - alpha, alpha, factor)


@allowed(eps=at_least(0.0))
def neighbourhood_init(teacher: nn.Module, fresh: Network, eps: float, *, variance_preserving: bool = False) -> Network:
    """Start a student beside its teacher, ``theta_T + eps theta_fresh``.

    Args:
        teacher: the random teacher.
        fresh: an independent network of the same structure; changed in place, it becomes the student.
        eps: size of the step, >= 0.
        variance_preserving: divide by ``sqrt(1 + eps^2)``; default False (official).

    Returns:
        ``fresh``, now the student.

    Raises:
        ValueError: ``eps`` negative or not finite; the networks share memory, or a parameter differs in name or shape.

    Examples:
        >>> teacher, fresh = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        >>> teacher.weight.data, fresh.weight.data = torch.tensor([[1.0]]), torch.tensor([[2.0]])
        >>> neighbourhood_init(teacher, fresh, 0.25).weight.item()
        1.5
    """
    return _combine(teacher, fresh, 1.0, eps, math.hypot(1.0, eps) if variance_preserving else 1.0)


@torch.no_grad()
def _combine(teacher: nn.Module, fresh: Network, a: float, b: float, factor: float) -> Network:
    """``(a theta_T + b theta_fresh) / factor``, written into the fresh network."""
    check_apart(teacher, fresh, names=("teacher", "fresh network"))
    theirs, ours = dict(teacher.named_parameters()), dict(fresh.named_parameters())
    for name in [*theirs, *ours]:
        shapes = [tuple(p[name].shape) if name in p else None for p in (theirs, ours)]
        if shapes[0] != shapes[1]:
            teacher_has, fresh_has = ("no such parameter" if s is None else f"shape {s}" for s in shapes)
            raise ValueError(
                f"teacher and fresh network must have one architecture to be interpolated; the first difference is "
                f"{name!r}: the teacher has {teacher_has}, the fresh network {fresh_has}"
            )
    for name, target in ours.items():
        # `0 * x` is no copy where x is infinite or -0.0; both ends are exact.
        if b == 0.0:
            target.copy_(theirs[name])
        elif a != 0.0:
            target.copy_((a * theirs[name].to(target) + b * target) / factor)
    return fresh
