"""SVFit on a whole model, without any other library: injection, parameter groups, merging.

On top of PEFT, with its files and its ``Trainer`` support, see :mod:`regularized.fine_tuning.svfit.peft`.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from regularized.fine_tuning.svfit.layer import (
    Decay,
    Rank,
    SingularValues,
    SingularValueShift,
    SVFitLayer,
    check_svfit_settings,
    default_rank,
    directions_of,
)
from regularized.mechanisms.surgery import NoEffectWarning, match_modules

__all__ = [
    "inject_svfit",
    "merge_svfit",
    "place_svfit",
    "svfit_layers",
    "svfit_param_groups",
    "unload_svfit",
]

_LEAST_RATE = 1e-4


def inject_svfit(
    model: nn.Module,
    *,
    rank: Rank | None = None,
    energy: float | None = None,
    nuclear: float | None = None,
    target_modules: Sequence[str] | None = None,
    also_train: Sequence[str] = (),
    decay: Decay = "shift",
) -> list[str]:
    """Replace layers of a model by :class:`SVFitLayer`, in place, and freeze the rest. Build the optimizer afterwards.

    Args:
        model: any model.
        rank: see :class:`SingularValueShift`; ``"full"`` by default.
        energy: see :func:`svfit_rank`.
        nuclear: see :func:`svfit_rank`.
        target_modules: names of the layers, or their last parts, such as ``["q_proj", "v_proj"]`` (the paper's count of
            parameters fits query and value projections). None, the default, takes every linear layer.
        also_train: names of submodules to train whole, a new head for instance.
        decay: see :class:`SingularValueShift`.

    Returns:
        Names of the adapted layers.

    Raises:
        ValueError: a name matches nothing, a layer is adapted already, or as for :class:`SVFitLayer`; the model is
            left as it was.

    Warns:
        NoEffectWarning: there is no linear layer.

    Examples:
        >>> model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> inject_svfit(model, rank="full", target_modules=["0"], also_train=["2"])
        ['0']
        >>> sum(p.numel() for p in model.parameters() if p.requires_grad)
        14
        >>> merge_svfit(model)
        ['0']
    """
    rank = default_rank(rank, energy, nuclear)
    check_svfit_settings(rank, energy=energy, nuclear=nuclear, decay=decay)
    whole = match_modules(model, also_train, option="also_train")
    found = match_modules(model, target_modules)
    if target_modules is None:
        if isinstance(model, nn.Linear):
            raise ValueError("the model is itself the layer and cannot be replaced in place; use SVFitLayer(model)")
        kept = tuple(also_train)
        found = {n: m for n, m in found.items() if not any(n == k or n.startswith(f"{k}.") for k in kept)}
        if not found:
            warnings.warn(f"{type(model).__name__} has no linear layer: nothing adapted", NoEffectWarning, stacklevel=2)
    if inside := [name for name in found if isinstance(model.get_submodule(name.rpartition(".")[0]), SVFitLayer)]:
        raise ValueError(f"adapted already: {inside[:3]}; merge_svfit(model) or unload_svfit(model) first")
    directions = {
        name: directions_of(module, rank, energy=energy, nuclear=nuclear, decay=decay, name=name)
        for name, module in found.items()
    }
    place_svfit(model, directions)
    for module in whole.values():
        module.requires_grad_(True)
    return list(directions)


def place_svfit(model: nn.Module, directions: Mapping[str, SingularValueShift]) -> None:
    """Freeze the model and put adapted layers in, once all of them could be made.

    Args:
        model: changed in place.
        directions: of the weight of each layer, by its name.
    """
    model.requires_grad_(False)
    for name, d in directions.items():
        model.set_submodule(name, SVFitLayer(model.get_submodule(name), d))


def svfit_layers(model: nn.Module) -> Iterator[tuple[str, SVFitLayer]]:
    """The adapted layers of a model, by name."""
    for name, module in model.named_modules():
        if isinstance(module, SVFitLayer):
            yield name, module


def svfit_param_groups(model: nn.Module, *, lr: float | None = None, weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """The trained singular values as one parameter group, with settings of their own.

    Args:
        model: a model after :func:`inject_svfit`, or after ``inject`` of :mod:`regularized.fine_tuning.svfit.peft`.
        lr: their learning rate, much larger than that of other adapters (1e-2 to 3e-2 with Adam in our experiments),
            since it moves singular values; default that of the optimizer.
        weight_decay: default 0 (the sources mention none).

    Returns:
        One group; none where nothing is adapted.

    Warns:
        UserWarning: a learning rate below 1e-4, or weight decay that pulls the singular values themselves to 0.

    Examples:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(6, 4))
        >>> _ = inject_svfit(model)
        >>> optimizer = torch.optim.AdamW(svfit_param_groups(model, lr=1e-2))
    """
    trained = [pair for m in model.modules() if isinstance(m, SingularValues) for pair in m.trained_values()]
    if not trained:
        return []
    if lr is not None and lr < _LEAST_RATE:
        warnings.warn(
            f"lr={lr:g}: a singular value barely moves at a learning rate below {_LEAST_RATE:g}; start at 1e-2",
            stacklevel=2,
        )
    if weight_decay > 0 and any(decay == "sigma" for _, decay in trained):
        warnings.warn(
            f"weight_decay={weight_decay:g} with decay='sigma' pulls the pretrained singular values to 0; use "
            "decay='shift', where it pulls the change to 0, or no weight decay",
            stacklevel=2,
        )
    group: dict[str, Any] = {"params": [p for p, _ in trained], "weight_decay": weight_decay}
    return [group if lr is None else {**group, "lr": lr}]


def merge_svfit(model: nn.Module) -> list[str]:
    """Put the shifted weights into the plain layers, in place: nothing is left of the adapter, parameters stay frozen.

    Args:
        model: a model after :func:`inject_svfit`; one without adapted layers is left as it is.

    Returns:
        Names of the merged layers.

    Examples:
        >>> model = nn.Sequential(nn.Linear(6, 4))
        >>> _ = inject_svfit(model)
        >>> _ = merge_svfit(model)
        >>> sorted(model.state_dict())
        ['0.bias', '0.weight']
    """
    layers = list(svfit_layers(model))
    for name, layer in layers:
        model.set_submodule(name, layer.merged())
    return [name for name, _ in layers]


def unload_svfit(model: nn.Module) -> list[str]:
    """Take the adapter off, in place: the layers are the original ones again, bit for bit.

    Args:
        model: a model after :func:`inject_svfit`.

    Returns:
        Names of the restored layers.

    Examples:
        >>> model = nn.Sequential(nn.Linear(6, 4))
        >>> _ = inject_svfit(model)
        >>> unload_svfit(model)
        ['0']
    """
    layers = list(svfit_layers(model))
    for name, layer in layers:
        model.set_submodule(name, layer.base_layer)
    return [name for name, _ in layers]
