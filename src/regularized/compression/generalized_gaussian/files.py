"""A model's weights, rounded to a step and entropy-coded: two small files that give the same weights back, bit for bit.

``NAME.safetensors`` holds the coded weights, their tables, and everything that is not rounded (biases, normalisation,
buffers) as it is; ``NAME.json`` says which weights there are, with a checksum over both files and one over the rounded
weights. Both are read as data: nothing in them is executed, and nothing is believed before it fits the model.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from regularized.compression.generalized_gaussian.coding import CODER, Coded, Coder, as_tensor, decode, encode
from regularized.compression.generalized_gaussian.quantization import STEP, from_multiples, multiples
from regularized.mechanisms.ranges import allowed
from regularized.mechanisms.sealed_files import load_sealed, save_sealed

__all__ = ["CompressedSize", "load_compressed", "save_compressed"]

_VERSION = 1
_STREAM, _TABLES, _KEPT = "stream", "tables", "kept."


@dataclass(frozen=True, slots=True)
class CompressedSize:
    """What a compressed model takes on disk, in bytes.

    Args:
        files: both files together.
        stream: of it, the coded weights.
        tables: of it, the tables of the coder.
        kept: of it, what was not rounded.
        weights: how many weights and other numbers the model has, tied ones once.
        plain: bytes of all of them as they are in memory.

    Examples:
        >>> size = CompressedSize(files=1000, stream=800, tables=40, kept=60, weights=2000, plain=8000)
        >>> size.bits, size.ratio
        (4.0, 0.125)
    """

    files: int
    stream: int
    tables: int
    kept: int
    weights: int
    plain: int

    @property
    def ratio(self) -> float:
        """Size of the files over that of the plain numbers."""
        return self.files / self.plain

    @property
    def bits(self) -> float:
        """Bits of the files for each weight, everything counted."""
        return 8 * self.files / self.weights


@allowed(step=STEP, coder=CODER)
@torch.no_grad()
def save_compressed(
    folder: str | Path, model: nn.Module, *, step: float = 2.0**-8, coder: Coder = "range", name: str = "weights"
) -> CompressedSize:
    """Write the weights of a model, those with two dimensions or more rounded to multiples of a step.

    Args:
        folder: where to; made if it is not there.
        model: stays as it is. What it would be after loading: :func:`~.quantize` of each rounded weight.
        step: distance of neighbouring values, positive; default 1 / 256. The larger, the smaller the file and the
            coarser the weights: try a few, and measure the model that is loaded.
        coder: ``"range"`` (default), ``"golomb"`` or ``"lzma"``, see
            :mod:`regularized.compression.generalized_gaussian.coding`.
        name: of both files, without their endings.

    Returns:
        The sizes, of the files as they lie on the disk.

    Raises:
        ImportError: the range coder is not installed.
        ValueError: an option is out of range, a weight is not finite or too large for the step, or none has two
            dimensions.

    Examples:
        >>> import tempfile
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
        >>> folder = tempfile.mkdtemp()
        >>> size = save_compressed(folder, model, coder="golomb")
        >>> size.files < size.plain
        True
        >>> load_compressed(folder, model)
        >>> bool((model[0].weight * 256 == (model[0].weight * 256).round()).all())
        True
    """
    numbers, kept = {}, {}
    for key, tensor in _content(model).items():
        if _is_rounded(tensor):
            try:
                numbers[key] = multiples(tensor, step).cpu()
            except ValueError as error:
                raise ValueError(f"{key}: {error}") from None
        else:
            kept[key] = tensor
    if not numbers:
        raise ValueError("the model has no weight of two dimensions or more, so there is nothing to compress")
    coded = encode(list(numbers.values()), coder=coder)
    settings = {
        "coder": coder,
        "step": step,
        "rounded": {key: list(n.shape) for key, n in numbers.items()},
        "digest": _digest(numbers),
    }
    parts = {_STREAM: as_tensor(coded.stream), _TABLES: as_tensor(coded.tables)}
    save_sealed(folder, name, parts | {_KEPT + key: t for key, t in kept.items()}, settings, version=_VERSION)
    content = [*numbers.values(), *kept.values()]
    return CompressedSize(
        files=sum((Path(folder) / f"{name}.{end}").stat().st_size for end in ("safetensors", "json")),
        stream=len(coded.stream),
        tables=len(coded.tables),
        kept=sum(t.nbytes for t in kept.values()),
        weights=sum(t.numel() for t in content),
        plain=sum(t.nbytes for t in _content(model).values()),
    )


@torch.no_grad()
def load_compressed(folder: str | Path, model: nn.Module, *, name: str = "weights") -> None:
    """Read weights that :func:`save_compressed` wrote into a model of the same build.

    Args:
        folder: where the two files are.
        model: changed in place, once everything has been read and fits; rounded weights take its types.
        name: of both files, without their endings.

    Raises:
        FileNotFoundError: a file is missing.
        ImportError: the file was written by the range coder, which is not installed.
        ValueError: the files are damaged, of another version, or of another model.

    Examples:
        >>> import tempfile
        >>> folder, model = tempfile.mkdtemp(), nn.Linear(8, 8)
        >>> _ = save_compressed(folder, nn.Linear(8, 8), step=0.25, coder="golomb")
        >>> load_compressed(folder, model)
        >>> bool((4 * model.weight == (4 * model.weight).round()).all())
        True
    """
    settings, tensors = load_sealed(folder, name, version=_VERSION)
    content = _content(model)
    expected = {key: list(tensor.shape) for key, tensor in content.items() if _is_rounded(tensor)}
    rounded, coder, step = (cast(Any, settings.get(key)) for key in ("rounded", "coder", "step"))
    if rounded != expected:
        raise ValueError(f"{folder} holds the weights of another model: {_difference(rounded, expected)}")
    try:
        CODER("coder", coder)
        STEP("step", step)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the settings in {folder} are damaged: {error}") from None
    keys = {_STREAM, _TABLES} | {_KEPT + key for key in content if key not in expected}
    if tensors.keys() != keys or any(tensors[part].dtype != torch.uint8 for part in (_STREAM, _TABLES)):
        raise ValueError(f"{folder} holds the tensors of another model: {sorted(tensors.keys() ^ keys)[:5]}")
    for key, tensor in content.items():
        if key not in expected:
            given = tensors[_KEPT + key]
            if given.shape != tensor.shape or given.dtype != tensor.dtype:
                raise ValueError(
                    f"{key} has shape {tuple(given.shape)} and type {given.dtype} in {folder}, and "
                    f"{tuple(tensor.shape)} and {tensor.dtype} in the model"
                )
    # Sizes come from the model alone, so that no file decides how much memory is taken.
    sizes = [content[key].numel() for key in rounded]
    coded = Coded(_as_bytes(tensors[_STREAM]), _as_bytes(tensors[_TABLES]))
    found = decode(coded, sizes, coder=coder)
    numbers = {key: part.view(expected[key]) for key, part in zip(rounded, found, strict=True)}
    if settings.get("digest") != _digest(numbers):
        raise ValueError(
            f"the weights in {folder} do not decode to those that were written: a coder of another version? Write the "
            "files again with coder='golomb'"
        )
    for key, tensor in content.items():
        tensor.copy_(from_multiples(numbers[key], step, tensor.dtype) if key in numbers else tensors[_KEPT + key])


def _content(model: nn.Module) -> dict[str, Tensor]:
    """What is saved of a model, by name; what has several names once."""
    found: dict[int, tuple[str, Tensor]] = {}
    for key, value in model.state_dict(keep_vars=True).items():
        if isinstance(value, Tensor):
            found.setdefault(id(value), (key, value.detach()))
    return dict(found.values())


def _is_rounded(tensor: Tensor) -> bool:
    return tensor.ndim > 1 and tensor.is_floating_point() and tensor.numel() > 0


def _digest(numbers: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for key, tensor in numbers.items():
        digest.update(f"{key}{tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def _difference(given: Any, expected: Mapping[str, list[int]]) -> str:
    if not isinstance(given, dict):
        return "it names no weights"
    key = next(key for key in sorted(given.keys() | expected.keys()) if given.get(key) != expected.get(key))
    return f"{key} is {given.get(key, 'not there')}, and {expected.get(key, 'not there')} in the model"


def _as_bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().numpy().tobytes()
