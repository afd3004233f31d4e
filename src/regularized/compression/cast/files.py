"""Sparse models on disk: of each N:M weight the values that stay, and their places in as few bits as they need.

A 2:4 weight takes half of its values and one bit for each entry: in bfloat16 9/16 of the dense bytes, in float32 17/32.
The places are those of the hardware's own metadata, two bits a value; kernels lay them out in an order of their own,
which torch makes when the model is loaded (:mod:`regularized.compression.cast.deployment`).
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from regularized.compression.cast.pattern import Pattern, check_pattern, follows_pattern, semi_structured_mask
from regularized.mechanisms.sealed_files import load_sealed, save_sealed

__all__ = ["load_sparse", "pack_sparse", "save_sparse", "unpack_sparse"]

_FORMAT = 1
_VALUES, _PLACES = ":values", ":places"  # no name of a parameter holds a colon


def _bits(m: int) -> int:
    """Of a place in a group, rounded up so that a whole number of places fills a byte."""
    return next(bits for bits in (1, 2, 4, 8) if 2**bits >= m)


@torch.no_grad()
def pack_sparse(weight: Tensor, pattern: Pattern = (2, 4)) -> tuple[Tensor, Tensor]:
    """The values of an N:M weight that stay, and their places.

    Args:
        weight: (R, C) of which at most N entries of each group are not zero.
        pattern: (N, M), M at most 256; default (2, 4).

    Returns:
        (R, C N / M) values, row by row, and their places in their groups as uint8, several in a byte (four for M = 4,
        the first in the lowest bits).

    Raises:
        ValueError: the weight does not have the pattern, or there is none.

    Examples:
        >>> values, places = pack_sparse(torch.tensor([[0.0, 5.0, 0.0, 7.0, 1.0, 2.0, 0.0, 0.0]]))
        >>> values, places  # 1, 3, 0, 1 in two bits each
        (tensor([[5., 7., 1., 2.]]), tensor([77], dtype=torch.uint8))
    """
    check_pattern(pattern)
    if not follows_pattern(weight, pattern):
        raise ValueError(
            f"a weight of shape {tuple(weight.shape)} does not have the pattern {pattern[0]}:{pattern[1]}; call "
            "cast.finalize() first, or multiply it by semi_structured_mask(weight)"
        )
    m = pattern[1]
    mask = semi_structured_mask(weight, pattern)
    values = weight[mask].view(len(weight), -1)
    places = mask.unflatten(1, (-1, m)).nonzero()[:, -1]
    bits = _bits(m)
    each = 8 // bits
    padded = torch.nn.functional.pad(places, (0, -len(places) % each)).view(-1, each)
    shifts = torch.arange(0, 8, bits, device=weight.device)
    return values, (padded << shifts).sum(1).to(torch.uint8)


@torch.no_grad()
def unpack_sparse(values: Tensor, places: Tensor, pattern: Pattern = (2, 4)) -> Tensor:
    """The weight that :func:`pack_sparse` was given, bit for bit.

    Args:
        values: (R, C N / M).
        places: uint8, as of :func:`pack_sparse`.
        pattern: (N, M); default (2, 4).

    Returns:
        (R, C).

    Raises:
        ValueError: there are not as many places as values.

    Examples:
        >>> unpack_sparse(torch.tensor([[5.0, 7.0, 1.0, 2.0]]), torch.tensor([77], dtype=torch.uint8))
        tensor([[0., 5., 0., 7., 1., 2., 0., 0.]])
    """
    check_pattern(pattern)
    n, m = pattern
    bits = _bits(m)
    if len(places) != -(-values.numel() * bits // 8) or values.ndim != 2 or values.shape[1] % n:
        raise ValueError(
            f"values of shape {tuple(values.shape)} and {len(places)} bytes of places are no {n}:{m} weight; give both "
            "as pack_sparse(weight, pattern) made them, and the same pattern"
        )
    shifts = torch.arange(0, 8, bits, device=places.device)
    at = ((places[:, None].long() >> shifts) & (2**bits - 1)).flatten()[: values.numel()].view(-1, n)
    groups = values.new_zeros(len(at), m)
    return groups.scatter_(1, at, values.reshape(-1, n)).view(len(values), -1)


def save_sparse(model: nn.Module, folder: str | Path, pattern: Pattern = (2, 4)) -> list[str]:
    """Write the state of a model, with its N:M weights packed, as ``sparse.safetensors`` and ``sparse.json``.

    Args:
        model: after :meth:`~regularized.compression.cast.CAST.finalize`.
        folder: where to; made if it is not there.
        pattern: (N, M); default (2, 4).

    Returns:
        Names of the packed weights; all others are written as they are.

    Raises:
        ValueError: no weight has the pattern, or there is none.

    Examples:
        >>> import tempfile
        >>> folder, model = tempfile.mkdtemp(), nn.Linear(8, 4)
        >>> model.weight.data.mul_(semi_structured_mask(model.weight)).shape
        torch.Size([4, 8])
        >>> save_sparse(model, folder)
        ['weight']
        >>> other = load_sparse(nn.Linear(8, 4), folder)
        >>> torch.equal(other.weight, model.weight)
        True
    """
    check_pattern(pattern)
    # Of tied weights one name is written; loading fills the others with it.
    state = dict([*model.named_parameters(), *_buffers(model)])
    linear = {
        f"{name}.weight".removeprefix(".") for name, module in model.named_modules() if isinstance(module, nn.Linear)
    }
    packed = [name for name, tensor in state.items() if name in linear and follows_pattern(tensor, pattern)]
    if not packed:
        raise ValueError(
            f"no linear layer of {type(model).__name__} has {pattern[0]}:{pattern[1]} weights; call cast.finalize() "
            "first"
        )
    tensors = {name: tensor.detach() for name, tensor in state.items() if name not in packed}
    for name in packed:
        tensors[name + _VALUES], tensors[name + _PLACES] = pack_sparse(state[name].detach(), pattern)
    save_sealed(folder, "sparse", tensors, {"pattern": list(pattern), "packed": packed}, version=_FORMAT)
    return packed


@torch.no_grad()
def load_sparse(model: nn.Module, folder: str | Path) -> nn.Module:
    """Fill a model with what :func:`save_sparse` wrote, bit for bit.

    Args:
        model: of the same architecture; filled in place.
        folder: where the two files are.

    Returns:
        The model.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, or is of another architecture; the model is left as it was.

    Examples:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> names = save_sparse(nn.Linear(4, 1).apply(lambda m: m.weight.data.mul_(torch.tensor([1, 1, 0, 0]))), folder)
        >>> (load_sparse(nn.Linear(4, 1), folder).weight[0, 2:] == 0).all().item()
        True
    """
    settings, tensors = load_sealed(folder, "sparse", version=_FORMAT)
    pattern = tuple(settings["pattern"])
    state = {name: tensor for name, tensor in tensors.items() if not name.endswith((_VALUES, _PLACES))}
    for name in settings["packed"]:
        state[name] = unpack_sparse(tensors[name + _VALUES], tensors[name + _PLACES], pattern)
    own = dict([*model.named_parameters(), *_buffers(model)])
    wrong = sorted(own.keys() ^ state.keys()) or [name for name in own if own[name].shape != state[name].shape]
    if wrong:
        raise ValueError(f"{folder} is of another architecture than {type(model).__name__}: {wrong[:3]} do not fit")
    for name, tensor in own.items():
        tensor.copy_(state[name])
    return model


def _buffers(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Those that belong to the state."""
    kept = model.state_dict(keep_vars=True)
    return [(name, buffer) for name, buffer in model.named_buffers() if name in kept]
