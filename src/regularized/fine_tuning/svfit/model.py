"""SVFit on a whole model, without any other library: injection, parameter groups, tiny files, merging, and the term.

On top of PEFT, with its files and its ``Trainer`` support, see :mod:`regularized.fine_tuning.svfit.peft`.
"""

import difflib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from regularized.fine_tuning.svfit.identity import basis_witness, check_basis, check_weight, weight_fingerprint
from regularized.fine_tuning.svfit.layer import (
    Decay,
    Rank,
    SingularValues,
    SingularValueShift,
    SVFitLayer,
    check_adaptable,
    check_svfit_settings,
    default_rank,
    directions_of,
)
from regularized.mechanisms.surgery import NoEffectWarning
from regularized.mechanisms.svd import SVD, weight_matrix
from regularized.training.terms import Term

__all__ = [
    "SVFit",
    "inject_svfit",
    "load_svfit_state_dict",
    "merge_svfit",
    "svfit_layers",
    "svfit_lora",
    "svfit_param_groups",
    "svfit_state_dict",
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
    modules = dict(model.named_modules())
    _known(also_train, modules, "also_train")
    if target_modules is None:
        kept = tuple(also_train)
        found = {
            name: module
            for name, module in modules.items()
            if isinstance(module, nn.Linear) and not any(name == k or name.startswith(f"{k}.") for k in kept)
        }
        if not found:
            warnings.warn(f"{type(model).__name__} has no linear layer: nothing adapted", NoEffectWarning, stacklevel=2)
    else:
        _known(target_modules, modules, "target_modules")
        found = {name: m for name, m in modules.items() if any(_matches(name, target) for target in target_modules)}
    if "" in found:
        raise ValueError("the model is itself the layer and cannot be replaced in place; use SVFitLayer(model)")
    if inside := [name for name in found if isinstance(modules[name.rpartition(".")[0]], SVFitLayer)]:
        raise ValueError(f"adapted already: {inside[:3]}; merge_svfit(model) or unload_svfit(model) first")
    directions = {
        name: directions_of(module, rank, energy=energy, nuclear=nuclear, decay=decay, name=name)
        for name, module in found.items()
    }
    _place(model, modules, directions)
    for name in also_train:
        for key, module in modules.items():
            if _matches(key, name):
                module.requires_grad_(True)
    return list(directions)


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


def svfit_lora(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """The adapter as a LoRA of scale 1, exactly: ``B A = U diag(shift) V^T``.

    Args:
        model: a model after :func:`inject_svfit`.

    Returns:
        For each adapted layer A (r, i) and B (o, r).

    Examples:
        >>> model = nn.Sequential(nn.Linear(6, 4))
        >>> _ = inject_svfit(model, rank=2)
        >>> a, b = svfit_lora(model)["0"]
        >>> a.shape, b.shape
        (torch.Size([2, 6]), torch.Size([4, 2]))
    """
    return {name: layer.directions.lora() for name, layer in svfit_layers(model)}


def svfit_state_dict(model: nn.Module, *, basis: bool = False) -> dict[str, Tensor]:
    """The adapter alone: one number for each direction, and what it takes to find out whether it fits a model.

    Args:
        model: a model after :func:`inject_svfit`.
        basis: store the singular vectors too (``r (o + i)`` numbers a layer). Needed where the decomposition does not
            determine them: singular values that are equal, or nearly so, at the cut.

    Returns:
        Tensors only, for ``safetensors.torch.save_file``. For each layer ``shift``, the ``fingerprint`` of the weight
        and the ``witness`` of the basis; with ``basis`` also ``left``, ``values``, ``right`` and ``gap``.

    Raises:
        ValueError: the singular values at a cut are nearly equal and ``basis`` is False.

    Examples:
        >>> model = nn.Sequential(nn.Linear(6, 4))
        >>> _ = inject_svfit(model, rank=2)
        >>> sorted(svfit_state_dict(model))
        ['0.fingerprint', '0.shift', '0.witness']
    """
    state: dict[str, Tensor] = {}
    for name, layer in svfit_layers(model):
        d = layer.directions
        witness = basis_witness(d.left, d.right)
        if not basis:
            check_basis(witness, d.left, d.right, gap=d.gap, name=name)
        code = weight_fingerprint(weight_matrix(layer.base_layer))
        state[f"{name}.shift"] = d.shift.detach().clone()
        state[f"{name}.fingerprint"] = torch.tensor(list(bytes.fromhex(code)), dtype=torch.uint8)
        state[f"{name}.witness"] = witness
        if basis:
            parts = {"left": d.left, "values": d.values, "right": d.right}
            state |= {f"{name}.{part}": tensor.clone() for part, tensor in parts.items()}
            state[f"{name}.gap"] = torch.tensor(d.gap)
    return state


def load_svfit_state_dict(model: nn.Module, state: Mapping[str, Tensor], *, decay: Decay = "shift") -> list[str]:
    """Adapt a base model as :func:`svfit_state_dict` says, in place.

    Args:
        model: the base model that the adapter was trained on, without an adapter.
        state: what :func:`svfit_state_dict` gave.
        decay: see :class:`SingularValueShift`, for further training.

    Returns:
        Names of the adapted layers.

    Raises:
        ValueError: a layer is missing, its weight is not the one of the training, or without a stored basis its
            decomposition is another one; the model is left without adapter.

    Examples:
        >>> trained, base = nn.Sequential(nn.Linear(6, 4)), nn.Sequential(nn.Linear(6, 4))
        >>> _ = base.load_state_dict(trained.state_dict())
        >>> _ = inject_svfit(trained)
        >>> load_svfit_state_dict(base, svfit_state_dict(trained))
        ['0']
    """
    names = sorted(key.removesuffix(".shift") for key in state if key.endswith(".shift"))
    modules = dict(model.named_modules())
    if absent := [name for name in names if name not in modules]:
        raise ValueError(f"the adapter is for layers that this model does not have: {absent[:3]}")
    for name in names:  # first all weights, which is quick, then the decompositions
        check_adaptable(modules[name], name)
        fingerprint = bytes(state[f"{name}.fingerprint"].tolist()).hex()
        check_weight(fingerprint, weight_matrix(modules[name], f"layer {name!r}"), name=name)
    directions = {}
    for name in names:
        shift, weight = state[f"{name}.shift"], weight_matrix(modules[name])
        if f"{name}.left" in state:
            parts = (state[f"{name}.{part}"].to(weight.device) for part in ("left", "values", "right"))
            d = SingularValueShift(SVD(*parts), decay=decay, gap=float(state[f"{name}.gap"]))
        else:
            d = SingularValueShift.of(weight, len(shift), decay=decay, name=name)
            check_basis(state[f"{name}.witness"], d.left, d.right, gap=d.gap, name=name)
        d.set_shift(shift.to(d.trained.device))
        directions[name] = d
    _place(model, modules, directions)
    return names


class SVFit(Term):
    """SVFit in the loop: injected before the optimizer is built, merged at the end, no loss of its own.

    Args:
        rank: see :class:`SingularValueShift`.
        energy: see :func:`svfit_rank`.
        nuclear: see :func:`svfit_rank`.
        target_modules: see :func:`inject_svfit`.
        also_train: see :func:`inject_svfit`.
        decay: see :class:`SingularValueShift`.
        lr: learning rate of the singular values, see :func:`svfit_param_groups`; default that of the optimizer.

    Raises:
        ValueError: as :func:`inject_svfit`.

    Examples:
        >>> model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> term = SVFit(rank="full", target_modules=["0"], also_train=["2"], lr=3e-2)
        >>> term.attach(model)
        >>> term.merge(model)
    """

    contributes = False

    def __init__(
        self,
        *,
        rank: Rank | None = None,
        energy: float | None = None,
        nuclear: float | None = None,
        target_modules: Sequence[str] | None = None,
        also_train: Sequence[str] = (),
        decay: Decay = "shift",
        lr: float | None = None,
    ) -> None:
        super().__init__()
        rank = default_rank(rank, energy, nuclear)
        check_svfit_settings(rank, energy=energy, nuclear=nuclear, decay=decay)
        self.settings: dict[str, Any] = {
            "rank": rank,
            "energy": energy,
            "nuclear": nuclear,
            "target_modules": target_modules,
            "also_train": also_train,
            "decay": decay,
        }
        self.lr = lr

    def attach(self, model: nn.Module) -> None:
        """Adapt the model; one that is adapted already stays as it is."""
        if next(svfit_layers(model), None) is None:
            inject_svfit(model, **self.settings)

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """The singular values, without weight decay."""
        return svfit_param_groups(model, lr=self.lr)

    def merge(self, model: nn.Module) -> None:
        """Leave a plain model."""
        merge_svfit(model)


def _place(model: nn.Module, modules: Mapping[str, nn.Module], directions: Mapping[str, SingularValueShift]) -> None:
    """Freeze the model and put the adapted layers in, once all of them could be made."""
    model.requires_grad_(False)
    for name, d in directions.items():
        model.set_submodule(name, SVFitLayer(modules[name], d))


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _known(targets: Sequence[str], modules: Mapping[str, nn.Module], option: str) -> None:
    """Refuse names that no module has, with the nearest ones."""
    if isinstance(targets, str):
        raise ValueError(f"{option} must be a list of names, got the string {targets!r}; write [{targets!r}]")
    for target in targets:
        if not any(_matches(name, target) for name in modules if name):
            parts = sorted({name.rpartition(".")[2] for name in modules} | set(modules))
            near = difflib.get_close_matches(target, parts, n=3, cutoff=0.4)
            raise ValueError(f"{option}: no module is called {target!r}; near are {near or parts[:10]}")
