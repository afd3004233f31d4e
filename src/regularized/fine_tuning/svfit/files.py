"""An SVFit adapter alone: as tensors for a tiny file, which finds its directions in the base weight again, and as LoRA.

Whether a file meets the weight and the basis that it was learned in is checked, see
:mod:`regularized.fine_tuning.svfit.identity`.
"""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from regularized.fine_tuning.svfit.identity import basis_witness, check_basis, check_weight, weight_fingerprint
from regularized.fine_tuning.svfit.layer import Decay, SingularValueShift, check_adaptable
from regularized.fine_tuning.svfit.model import place_svfit, svfit_layers
from regularized.mechanisms.svd import SVD, weight_matrix

__all__ = ["load_svfit_state_dict", "svfit_lora", "svfit_state_dict"]


def svfit_state_dict(model: nn.Module, *, basis: bool = False) -> dict[str, Tensor]:
    """The adapter alone: one number for each direction, and what it takes to find out whether it fits a model.

    Args:
        model: a model after :func:`~regularized.fine_tuning.svfit.inject_svfit`.
        basis: store the singular vectors too (``r (o + i)`` numbers a layer). Needed where the decomposition does not
            determine them: singular values that are equal, or nearly so, at the cut.

    Returns:
        Tensors only, for ``safetensors.torch.save_file``. For each layer ``shift``, the ``fingerprint`` of the weight
        and the ``witness`` of the basis; with ``basis`` also ``left``, ``values``, ``right`` and ``gap``. For all of
        them together a ``checksum``.

    Raises:
        ValueError: the singular values at a cut are nearly equal and ``basis`` is False.

    Examples:
        >>> from regularized.fine_tuning.svfit import inject_svfit
        >>> model = nn.Sequential(nn.Linear(6, 4))
        >>> _ = inject_svfit(model, rank=2)
        >>> sorted(svfit_state_dict(model))
        ['0.fingerprint', '0.shift', '0.witness', 'checksum']
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
    return {**state, "checksum": _checksum(state)}


def load_svfit_state_dict(model: nn.Module, state: Mapping[str, Tensor], *, decay: Decay = "shift") -> list[str]:
    """Adapt a base model as :func:`svfit_state_dict` says, in place.

    Args:
        model: the base model that the adapter was trained on, without an adapter.
        state: what :func:`svfit_state_dict` gave.
        decay: see :class:`~regularized.fine_tuning.svfit.SingularValueShift`, for further training.

    Returns:
        Names of the adapted layers.

    Raises:
        ValueError: the state is damaged; a layer is missing, its weight is not the one of the training, or without a
            stored basis its decomposition is another one; the model is left without adapter.

    Examples:
        >>> from regularized.fine_tuning.svfit import inject_svfit
        >>> trained, base = nn.Sequential(nn.Linear(6, 4)), nn.Sequential(nn.Linear(6, 4))
        >>> _ = base.load_state_dict(trained.state_dict())
        >>> _ = inject_svfit(trained)
        >>> load_svfit_state_dict(base, svfit_state_dict(trained))
        ['0']
    """
    content = {name: tensor for name, tensor in state.items() if name != "checksum"}
    if "checksum" not in state or not torch.equal(state["checksum"].cpu(), _checksum(content)):
        raise ValueError(
            "the adapter's checksum is missing or differs: it is damaged, was edited, or rounded to another type. Save "
            "or download it again"
        )
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
    place_svfit(model, directions)
    return names


def svfit_lora(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """The adapter as a LoRA of scale 1, exactly: ``B A = U diag(shift) V^T``.

    Args:
        model: a model after :func:`~regularized.fine_tuning.svfit.inject_svfit`.

    Returns:
        For each adapted layer A (r, i) and B (o, r).

    Examples:
        >>> from regularized.fine_tuning.svfit import inject_svfit
        >>> model = nn.Sequential(nn.Linear(6, 4))
        >>> _ = inject_svfit(model, rank=2)
        >>> a, b = svfit_lora(model)["0"]
        >>> a.shape, b.shape
        (torch.Size([2, 6]), torch.Size([4, 2]))
    """
    return {name: layer.directions.lora() for name, layer in svfit_layers(model)}


def _checksum(state: Mapping[str, Tensor]) -> Tensor:
    """(32,) uint8, SHA-256 of names, types and values."""
    digest = hashlib.sha256()
    for name in sorted(state):
        values = state[name].detach().cpu().contiguous()
        digest.update(f"{name}{values.dtype}{tuple(values.shape)}".encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy().data)
    return torch.tensor(list(digest.digest()), dtype=torch.uint8)
