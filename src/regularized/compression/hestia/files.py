"""Files of a packed model: ``packed.safetensors`` with codes, scales and all else, and ``packed.json``, sealed."""

from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from regularized.compression.hestia.packed import PackedLinear, replace_layer
from regularized.mechanisms.sealed_files import load_sealed, save_sealed

__all__ = ["load_packed", "save_packed"]

NAME = "packed"
FORMAT = 1


def save_packed(model: nn.Module, folder: str | Path) -> None:
    """Write a model with packed layers.

    Args:
        model: after :func:`~regularized.compression.hestia.pack_weights`.
        folder: where to; made if it is not there.

    Raises:
        ValueError: no layer is packed.

    Examples:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> model = nn.Sequential(PackedLinear(8, 4, group_size=-1))
        >>> save_packed(model, folder)
        >>> fresh = nn.Sequential(nn.Linear(8, 4))
        >>> load_packed(fresh, folder)
        >>> torch.equal(fresh[0].packed, model[0].packed)
        True
    """
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, PackedLinear)}
    if not layers:
        raise ValueError("no layer of the model is packed; pack_weights(model) first")
    settings = {
        name: {
            "in_features": layer.in_features,
            "out_features": layer.out_features,
            "bias": layer.bias is not None,
            "levels": list(layer.levels),
            "group_size": layer.group_size,
            "dtype": str(layer.dtype).removeprefix("torch."),
        }
        for name, layer in layers.items()
    }
    tensors, tied = _without_ties(model.state_dict())
    save_sealed(folder, NAME, tensors, {"layers": settings, "tied": tied}, version=FORMAT)


def _without_ties(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each tensor once, and which other names it has."""
    first: dict[tuple[int, tuple[int, ...]], str] = {}
    tied = {}
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tuple(tensor.shape))
        if tensor.numel() and first.setdefault(key, name) != name:
            tied[name] = first[key]
    return {name: tensor for name, tensor in state.items() if name not in tied}, tied


def load_packed(model: nn.Module, folder: str | Path) -> None:
    """Load what :func:`save_packed` wrote into a fresh plain model: its linear layers become packed ones, in place.

    Args:
        model: of the same architecture, before any annealing.
        folder: where the two files are.

    Raises:
        ValueError: a file is missing, damaged, or of another format; or the model has other layers.

    Examples:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> save_packed(nn.Sequential(PackedLinear(8, 4, group_size=-1)), folder)
        >>> model = nn.Sequential(nn.Linear(8, 4))
        >>> load_packed(model, folder)
        >>> type(model[0]).__name__
        'PackedLinear'
    """
    try:
        content, tensors = load_sealed(folder, NAME, version=FORMAT)
        settings = content["layers"]
        built = {
            name: PackedLinear(
                one["in_features"],
                one["out_features"],
                bias=one["bias"],
                codebook=one["levels"],
                group_size=one["group_size"],
                dtype=getattr(torch, one["dtype"]),
            )
            for name, one in settings.items()
        }
        tensors.update({name: tensors[first] for name, first in content["tied"].items()})
    except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"there is no readable packed model in {folder}: {error}") from error
    for name, packed in built.items():
        try:
            layer = cast(nn.Linear, model.get_submodule(name))
        except AttributeError:
            raise ValueError(f"the file holds a layer {name!r}, which the model does not have") from None
        if not isinstance(layer, nn.Linear) or layer.weight.shape != (packed.out_features, packed.in_features):
            raise ValueError(
                f"layer {name!r} is {layer}, the file holds a linear layer of {packed.in_features} to "
                f"{packed.out_features}; build the model as it was there"
            )
    expected = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    for name, packed in built.items():
        del expected[f"{name}.weight"]
        expected |= {f"{name}.{key}": tuple(tensor.shape) for key, tensor in packed.state_dict().items()}
    found = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    if expected != found:
        differing = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
        raise ValueError(f"the model is another one than that of the file: {differing[:5]} differ or are not in both")
    for name, packed in built.items():
        layer = cast(nn.Linear, model.get_submodule(name))
        replace_layer(model, name, packed.to(layer.weight.device).train(layer.training))
    model.load_state_dict(tensors)
