"""Neurons cut off in the order of their score: what goes with those of the rule, what with those of the noise.

:mod:`regularized.understanding.grokking.scores` has the paper and its symbols.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from regularized.mechanisms.pruning import pruned
from regularized.mechanisms.ranges import allowed, share

__all__ = ["neuron_masks", "prune_by_score_", "pruning_sweep"]

# Shapes: N neurons, p numbers in a cycle, n training samples, m operands (2 for pairs).

_TENTHS = tuple(k / 10 for k in range(10))


@allowed(fraction=share("the share of neurons that goes"))
def neuron_masks(
    model: nn.Module,
    scores: Tensor,
    *,
    fraction: float,
    first: str = "fc1",
    second: str = "fc2",
    norm: str | None = None,
) -> dict[str, Tensor]:
    """Which weights stay when the neurons of lowest score go: rows of one layer, columns of the next.

    For :func:`regularized.mechanisms.pruning.pruned`, inside which the pruned network can be trained on. Other orders
    are other scores: ``-scores`` takes the highest away, ``torch.rand(N)`` any, ``weight.norm(dim=1)`` the smallest.

    Args:
        model: holds both layers.
        scores: (N,) one for each neuron; equal ones go in their order.
        fraction: share of the neurons that goes, in [0, 1]; ``round(fraction * N)`` of them.
        first: name of the linear layer into the neurons; its bias is pruned too, if it has one.
        second: name of the linear layer out of them; its bias stays.
        norm: name of a normalisation of the neurons between the layers: its shift would keep a pruned neuron alive.

    Returns:
        Bool masks by name of parameter; True stays.

    Raises:
        ValueError: ``fraction`` out of range, layers of other shapes, or the model normalises N features and ``norm``
            does not say where.

    Examples:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> neuron_masks(model, torch.tensor([0.9, 0.1, 0.5]), fraction=1 / 3, first="0", second="2")["0.bias"]
        tensor([ True, False,  True])
    """
    into, out = model.get_submodule(first), model.get_submodule(second)
    weights = [getattr(layer, "weight", None) for layer in (into, out)]
    shapes = [tuple(w.shape) if isinstance(w, Tensor) else None for w in weights]
    if not (isinstance(into, nn.Linear) and isinstance(out, nn.Linear)) or scores.shape != (into.out_features,):
        raise ValueError(
            f"{first!r} must be a linear layer with as many rows as there are scores, and {second!r} one with as many "
            f"columns; got scores {tuple(scores.shape)}, weights {shapes[0]} and {shapes[1]}"
        )
    if out.in_features != into.out_features:
        raise ValueError(f"{second!r} must have {into.out_features} columns, one for each neuron; it has {shapes[1]}")
    _check_normalised(model, into.out_features, norm)
    stays = torch.ones(len(scores), dtype=torch.bool, device=scores.device)
    stays[scores.argsort(stable=True)[: round(fraction * len(scores))]] = False
    stays = stays.to(into.weight.device)
    masks = {f"{first}.weight": stays[:, None].expand_as(into.weight)}
    masks[f"{second}.weight"] = stays.expand_as(out.weight)
    if into.bias is not None:
        masks[f"{first}.bias"] = stays
    if norm is not None:
        masks |= {f"{norm}.{name}": stays for name, p in model.get_submodule(norm).named_parameters()}
    return masks


def _check_normalised(model: nn.Module, width: int, norm: str | None) -> None:
    """Refuse a normalisation of the neurons that nobody named: its shift speaks for a neuron that is pruned."""
    found = []
    for name, module in model.named_modules():
        sizes = getattr(module, "num_features", None), getattr(module, "normalized_shape", None)
        if width in sizes or (width,) in sizes:
            found.append(name)
    if norm is None and found:
        raise ValueError(
            f"the model normalises its {width} neurons in {found}, whose shift would keep pruned ones alive; say "
            f"norm={found[0]!r}"
        )
    if norm is not None and norm not in found:
        raise ValueError(f"norm={norm!r} is no normalisation of {width} neurons; the model has {found}")


def prune_by_score_(
    model: nn.Module,
    scores: Tensor,
    *,
    fraction: float,
    first: str = "fc1",
    second: str = "fc2",
    norm: str | None = None,
) -> int:
    """Set the neurons of lowest score to zero, in place; arguments and errors as in :func:`neuron_masks`.

    Args:
        model: changed in place; shapes stay.
        scores: (N,).
        fraction: share of the neurons that goes.
        first: layer into the neurons.
        second: layer out of them.
        norm: normalisation of the neurons, if there is one.

    Returns:
        How many neurons were pruned.

    Examples:
        >>> from regularized.understanding.grokking.scores import neuron_ipr
        >>> from regularized.understanding.grokking.modular_arithmetic import QuadraticMLP
        >>> net = QuadraticMLP(7, width=10)
        >>> prune_by_score_(net, neuron_ipr(*net.neuron_maps(), p=7), fraction=0.4)
        4
    """
    masks = neuron_masks(model, scores, fraction=fraction, first=first, second=second, norm=norm)
    with pruned(model, masks):
        pass
    return int((~masks[f"{first}.weight"][:, 0]).sum())


def pruning_sweep(
    model: nn.Module,
    measure: Callable[[nn.Module], Mapping[str, float]],
    scores: Tensor,
    *,
    fractions: Sequence[float] = _TENTHS,
    **layers: Any,
) -> list[dict[str, float]]:
    """What a network can do with more and more of its neurons pruned; the network itself is left alone.

    Args:
        model: trained network.
        measure: for example a :class:`MemorizationProbe`.
        scores: (N,) neurons of low score go first.
        fractions: shares of the neurons that go; default 0, 0.1, ... 0.9.
        **layers: ``first``, ``second`` and ``norm`` of :func:`neuron_masks`.

    Returns:
        A record for each fraction: ``"fraction"`` and the measurements.

    Examples:
        >>> from regularized.understanding.grokking import MemorizationProbe, ModularArithmetic, neuron_ipr
        >>> from regularized.understanding.grokking.modular_arithmetic import QuadraticMLP
        >>> net, task = QuadraticMLP(7, width=10), ModularArithmetic(7)
        >>> records = pruning_sweep(net, MemorizationProbe(task), torch.rand(10), fractions=[0.0, 1.0])
        >>> [record["fraction"] for record in records]
        [0.0, 1.0]
    """
    records = []
    for fraction in fractions:
        smaller = copy.deepcopy(model)
        prune_by_score_(smaller, scores, fraction=fraction, **layers)
        records.append({"fraction": float(fraction), **measure(smaller)})
    return records
