"""Initialisation for interval bounds: weights so small that the mean radius stays the same from layer to layer."""

import math

import torch
from torch import nn

from regularized.robustness.certified_training.graph import Graph

__all__ = ["interval_init_"]


@torch.no_grad()
def interval_init_(model: nn.Module) -> list[str]:
    """Draw the weights anew, in place: normal with standard deviation ``sqrt(2 pi) / fan_in``.

    A layer multiplies the radius by ``fan_in * E|w|``, which is then 2, and a ReLU halves it again on average; the
    usual initialisations grow it by the square root of the width. As in the official code the last weight of the
    network keeps its values, as do biases and normalisations, and a layer behind a ReLU of a residual sum, whose radius
    is that of two branches, gets half of the weights.

    Args:
        model: a network that is not trained yet, of operations that have an interval rule.

    Returns:
        Names of the parameters that were drawn.

    Raises:
        ValueError: it has no more than one weight, so nothing would be drawn.
        UnsupportedOperation: an operation has no interval rule.

    Examples:
        >>> model = nn.Sequential(nn.Linear(100, 50), nn.ReLU(), nn.Linear(50, 10))
        >>> interval_init_(model)
        ['0.weight']
        >>> bool((model[0].weight.std() * 100 - math.sqrt(2 * math.pi)).abs() < 0.1)
        True
    """
    behind_additions = {id(getattr(layer, "weight", None)) for layer in Graph(model).layers_behind_additions()}
    weights = [(name, p) for name, p in model.named_parameters() if "weight" in name.rpartition(".")[2]]
    drawn = [(name, weight) for name, weight in weights[:-1] if weight.ndim >= 2]
    if not drawn:
        raise ValueError(
            f"{type(model).__name__} has {len(weights)} weight(s), of which the last keeps its values: there is "
            "nothing to draw"
        )
    for _, weight in drawn:
        weight.normal_(0.0, math.sqrt(2.0 * math.pi) / weight[0].numel())
    for _, weight in weights:
        if id(weight) in behind_additions:
            weight.mul_(0.5)
    return [name for name, _ in drawn]
