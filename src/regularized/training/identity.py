"""What a run is recognised by when it is resumed: its optimizer, its data, and the settings that shape it.

Two kinds of differences are told apart. Where the position of a checkpoint would *mean something else* (other data,
another order, another optimizer), it is refused. What can be changed on the way (rates, momentum, clipping) is taken
from the run that goes on, with a warning that names both values.
"""

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["changed_settings", "differences", "fingerprint", "optimizer_settings", "schedule_name"]

_WHOLE = 64 * 2**20  # bytes; of a larger tensor so many are read, in pieces spread evenly over it
_PIECES = 64


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """Checksum of shapes, types and content; of tensors of more than 64 MiB, of 64 pieces of 1 MiB spread over each.

    Examples:
        >>> fingerprint([torch.zeros(2)]) == fingerprint([torch.zeros(2)])
        True
        >>> fingerprint([torch.zeros(2)]) == fingerprint([torch.zeros(1, 2)])
        False
    """
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tuple(tensor.shape)} {tensor.dtype};".encode())
        plain = tensor.detach().resolve_conj().resolve_neg().contiguous().view(-1).view(torch.uint8)
        size, piece = plain.numel(), _WHOLE // _PIECES
        if size <= _WHOLE:
            starts, piece = [0], size
        else:
            starts = [i * (size - piece) // (_PIECES - 1) for i in range(_PIECES)]
        for start in starts:
            digest.update(plain[start : start + piece].cpu().numpy().tobytes())
    return digest.hexdigest()


def optimizer_settings(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Class and hyperparameters of an optimizer as plain values, for a checkpoint; take them before the first step.

    Examples:
        >>> found = optimizer_settings(torch.optim.SGD([torch.ones(2)], lr=0.1, momentum=0.9))
        >>> found["class"], found["groups"][0]["momentum"]
        ('SGD', 0.9)
    """
    return {
        "class": type(optimizer).__name__,
        "groups": [
            {key: _plain(value) for key, value in group.items() if key != "params"} for group in optimizer.param_groups
        ],
    }


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    return value if value is None or isinstance(value, bool | int | float | str) else type(value).__name__


def schedule_name(schedule: Any) -> str:
    """A schedule in words: with its values where it is one of ours or a number, else the name of the function.

    Examples:
        >>> from regularized.training.progress import as_schedule, linear
        >>> schedule_name(as_schedule(0.5)), schedule_name(linear)
        ('_Constant(value=0.5)', 'linear')
    """
    text = repr(schedule) if dataclasses.is_dataclass(schedule) else ""
    own_name = getattr(schedule, "__qualname__", type(schedule).__name__)
    return text if text and " at 0x" not in text else own_name


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """What differs between a checkpoint and a run, in words, one a key.

    Examples:
        >>> differences({"samples": 24, "seed": 0}, {"samples": 23, "seed": 0})
        ['samples is 24 there and 23 here']
    """
    words = []
    for key in dict.fromkeys((*there, *here)):
        a, b = there.get(key), here.get(key)
        if a != b:
            words.append("the content differs" if key == "content" else f"{key} is {a} there and {b} here")
    return words


def changed_settings(
    there: Sequence[Mapping[str, Any]], here: Sequence[Mapping[str, Any]]
) -> list[tuple[int, str, Any, Any]]:
    """Hyperparameters that differ: number of the parameter group, key, value of the checkpoint, value of this run.

    Examples:
        >>> changed_settings([{"lr": 0.1, "momentum": 0.9}], [{"lr": 0.1, "momentum": 0.5}])
        [(0, 'momentum', 0.9, 0.5)]
    """
    return [
        (number, key, before.get(key), value)
        for number, (before, now) in enumerate(zip(there, here, strict=True))
        for key, value in now.items()
        if before.get(key) != value
    ]
