"""Checkpoints: safetensors and JSON, written whole or not at all, checked before they are believed.

A checkpoint is a folder ``step-00001234``::

    model.safetensors      the model's state_dict, usable by itself
    terms.safetensors      what the terms remember
    training.safetensors   optimizer, position, history, early stopping, and what the run is recognised by
    *.json                 the structure around the tensors
    rank-00000.*           random state of each process
    manifest.json          SHA-256 of every file

It is written beside its final name and renamed at the end, so that a process killed at any moment leaves the previous
checkpoints and at most a ``.partial`` folder behind. Nothing in it is ever unpickled.
"""

import hashlib
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

__all__ = [
    "CheckpointError",
    "checkpoints",
    "flatten",
    "latest",
    "load",
    "load_optimizer",
    "name_of",
    "publish",
    "remove",
    "step_of",
    "unflatten",
    "write_part",
]

logger = logging.getLogger(__name__)

FORMAT = 2
MANIFEST = "manifest.json"
PARTS = (".safetensors", ".json")


class CheckpointError(RuntimeError):
    """A checkpoint is damaged, or does not belong to this run; the message says which and what to do."""


class OtherFormatError(CheckpointError):
    """A checkpoint was written by a version of this library that writes another format."""


def flatten(tree: Any) -> tuple[Any, dict[str, Tensor]]:
    """Take the tensors out of nested dictionaries, lists and tuples.

    Tensors that are the same memory (tied weights) are stored once. Tuples stay tuples, keys keep their type.

    Returns:
        A JSON-able structure and the tensors by name, both for :func:`unflatten`.

    Raises:
        TypeError: something else than tensors, containers, numbers, strings, booleans and None.

    Examples:
        >>> spec, tensors = flatten({"state": {0: (torch.ones(2), 0.9)}})
        >>> list(tensors)
        ['state.0.0']
        >>> unflatten(spec, tensors)
        {'state': {0: (tensor([1., 1.]), 0.9)}}
    """
    tensors: dict[str, Tensor] = {}
    seen: dict[tuple[Any, ...], str] = {}

    def pack(value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            value = value.detach()
            key = (value.data_ptr(), value.shape, value.stride(), value.dtype, value.device)
            if key not in seen:
                name = path or "value"
                while name in tensors:  # two keys of different types, 1 and "1", read the same
                    name += "'"
                seen[key] = name
                tensors[name] = torch.view_as_real(value) if value.is_complex() else value
            return {"complex" if value.is_complex() else "tensor": seen[key]}
        if value is None or isinstance(value, bool | int | str):
            return value
        if isinstance(value, float):
            return value if math.isfinite(value) else {"float": str(value)}
        below = f"{path}." if path else ""
        if isinstance(value, Mapping):
            return {"dict": [[pack(k, path), pack(v, f"{below}{k}")] for k, v in value.items()]}
        if isinstance(value, tuple | list):
            kind = "tuple" if isinstance(value, tuple) else "list"
            return {kind: [pack(v, f"{below}{i}") for i, v in enumerate(value)]}
        raise TypeError(
            f"{path or 'the state'} is a {type(value).__name__}, which a checkpoint cannot hold; use tensors, numbers, "
            "strings, lists, tuples or dictionaries"
        )

    return pack(tree, ""), tensors


def unflatten(spec: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of :func:`flatten`.

    Raises:
        CheckpointError: the structure names a tensor that is not there, or is no such structure.

    Examples:
        >>> unflatten({"tuple": [1, {"float": "inf"}]}, {})
        (1, inf)
    """
    if spec is None or isinstance(spec, bool | int | float | str):
        return spec
    try:
        [(kind, value)] = spec.items()
        if kind in ("tensor", "complex"):
            if value not in tensors:
                raise CheckpointError(f"the checkpoint lacks the tensor {value!r}")
            return torch.view_as_complex(tensors[value]) if kind == "complex" else tensors[value]
        if kind == "float":
            return float(value)
        if kind == "dict":
            return {unflatten(k, tensors): unflatten(v, tensors) for k, v in value}
        if kind in ("list", "tuple"):
            return (tuple if kind == "tuple" else list)(unflatten(v, tensors) for v in value)
    except CheckpointError:
        raise
    except (
        AttributeError,
        TypeError,
        ValueError,
        RuntimeError,
    ) as error:  # too deep a structure is a RuntimeError, too
        raise CheckpointError(f"the checkpoint has an entry that is none ({type(error).__name__}: {error})") from error
    raise CheckpointError(f"the checkpoint has an entry of unknown kind {kind!r}; was it written by a newer version?")


def write_part(folder: Path, name: str, tree: Any) -> None:
    """Write one part of a checkpoint, ``name.safetensors`` and ``name.json``, through to the disk.

    Examples:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> write_part(folder, "model", torch.nn.Linear(2, 1).state_dict())
        >>> list(load(folder, "model"))
        ['weight', 'bias']
    """
    spec, tensors = flatten(tree)
    own: dict[str, Tensor] = {}
    storages: set[int] = set()
    for key, tensor in tensors.items():
        tensor = tensor.cpu().contiguous()
        pointer = tensor.untyped_storage().data_ptr()
        # Views of one storage (rows of one buffer, say) are tensors of their own in the file.
        own[key] = tensor.clone() if pointer in storages else tensor
        storages.add(pointer)
    save_file(own, folder / f"{name}.safetensors")
    (folder / f"{name}.json").write_text(json.dumps(spec, allow_nan=False), encoding="utf-8")
    for suffix in ("safetensors", "json"):
        _sync(folder / f"{name}.{suffix}")


def publish(partial: Path, final: Path, *, keep: int) -> None:
    """Seal a written folder with its manifest, give it its name in one move, and delete all but the newest ``keep``.

    Examples:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> (folder / "partial").mkdir()
        >>> write_part(folder / "partial", "model", {"weight": torch.ones(2)})
        >>> publish(folder / "partial", folder / "step-00000010", keep=3)
        >>> load(latest(folder), "model")
        {'weight': tensor([1., 1.])}
    """
    files = {p.name: {"sha256": _sha256(p), "bytes": p.stat().st_size} for p in sorted(partial.iterdir())}
    (partial / MANIFEST).write_text(json.dumps({"format": FORMAT, "files": files}, indent=1), encoding="utf-8")
    _sync(partial / MANIFEST)
    _sync(partial)
    remove(final)  # a damaged checkpoint of the same step, which a resumed run has reached again
    os.replace(partial, final)
    _sync(final.parent)
    # A later step can only be a damaged one that was passed over: it must not push out what is intact. The start is
    # kept until there is something better to go on from.
    reached = [path for path in checkpoints(final.parent) if step_of(path) <= step_of(final)]
    for old in reached[:-keep]:
        remove(old)
    if step_of(final) > 0:
        remove(final.with_name(name_of(0)))


def remove(path: Path) -> None:
    """Delete a checkpoint; of one that is a symbolic link only the link. Does nothing where there is none.

    Examples:
        >>> remove(Path("/nowhere/step-00000001"))
    """
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def name_of(step: int) -> str:
    """Name of the checkpoint after so many optimizer steps.

    Examples:
        >>> name_of(1234)
        'step-00001234'
    """
    return f"step-{step:08d}"


def step_of(path: Path) -> int:
    """Optimizer steps of a checkpoint, from its name; -1 where it is no such name.

    Examples:
        >>> step_of(Path("runs/step-00001234")), step_of(Path("runs/notes"))
        (1234, -1)
    """
    found = re.fullmatch(r"step-(\d+)", path.name)
    return int(found.group(1)) if found else -1


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first; they may be damaged.

    Examples:
        >>> checkpoints(Path("/nowhere"))
        []
    """
    found = folder.glob("step-*") if folder.is_dir() else []
    return sorted((p for p in found if step_of(p) >= 0 and p.is_dir()), key=step_of)


def latest(folder: Path) -> Path | None:
    """The newest intact checkpoint of a folder, or None where there is none at all.

    A damaged one, or one of another version's format, is left where it is, with a warning, and the next older is tried.

    Raises:
        CheckpointError: there are checkpoints, but none can be used.

    Examples:
        >>> latest(Path("/nowhere")) is None
        True
    """
    found = checkpoints(folder)
    foreign = None
    for path in reversed(found):
        try:
            verify(path)
        except CheckpointError as error:
            foreign = error if foreign is None and isinstance(error, OtherFormatError) else foreign
            logger.warning("%s; trying the checkpoint before it", error)
        else:
            return path
    if foreign is not None:
        raise OtherFormatError(f"no checkpoint in {folder} can be read; nothing was loaded or deleted. {foreign}")
    if found:
        raise CheckpointError(
            f"all {len(found)} checkpoint(s) in {folder} are damaged (newest: {found[-1].name}); nothing was loaded or "
            "deleted. Restore them from a backup, or start anew in another folder"
        )
    return None


def verify(path: Path) -> None:
    """Compare every file of a checkpoint with the manifest.

    Raises:
        OtherFormatError: another version wrote it.
        CheckpointError: a file is missing, truncated, changed or not listed, or the manifest is damaged.

    Examples:
        >>> try:
        ...     verify(Path("/nowhere"))
        ... except CheckpointError as error:
        ...     "no readable manifest" in str(error)
        True
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        version = manifest["format"]
        if isinstance(version, int) and version != FORMAT:
            age, mend = ("a newer", "update it") if version > FORMAT else ("an older", "use that version")
            raise OtherFormatError(
                f"checkpoint {path} has format {version}, this version of regularized reads format {FORMAT}: it was "
                f"written by {age} one. To go on from it {mend}; or start anew in another folder"
            )
        entries = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"checkpoint {path} has no readable manifest ({type(error).__name__}: {error})"
        ) from error
    if version != FORMAT:
        raise CheckpointError(f"checkpoint {path} is damaged: its manifest has the format {version!r}")
    for name, (size, digest) in entries.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"checkpoint {path} is damaged: {name} is missing")
        if file.stat().st_size != size:
            raise CheckpointError(f"checkpoint {path} is damaged: {name} has {file.stat().st_size} of {size} bytes")
        if _sha256(file) != digest:
            raise CheckpointError(f"checkpoint {path} is damaged: the content of {name} has changed")
    unlisted = {p.name for p in path.iterdir() if p.suffix in PARTS} - {MANIFEST, *entries}
    if unlisted or not entries:
        raise CheckpointError(
            f"checkpoint {path} is damaged: its manifest does not list {sorted(unlisted) or 'a file'}"
        )


def load(path: Path, name: str) -> Any:
    """One part of a checkpoint, its tensors on the CPU.

    Raises:
        CheckpointError: the part is missing or unreadable.
    """
    try:
        spec = json.loads((path / f"{name}.json").read_text(encoding="utf-8"))
        return unflatten(spec, load_file(path / f"{name}.safetensors"))
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise CheckpointError(f"part {name!r} of checkpoint {path} cannot be read: {error}") from error


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load an optimizer's state exactly.

    torch casts state to the type of its parameter, so that float32 moments of a bfloat16 parameter would be rounded;
    they are put back as they were saved.

    Examples:
        >>> optimizer = torch.optim.SGD([torch.ones(2)], lr=0.1)
        >>> load_optimizer(optimizer, optimizer.state_dict())
    """
    optimizer.load_state_dict(dict(state))
    order = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    for parameter, number in zip(order, numbers, strict=True):
        for key, value in state["state"].get(number, {}).items():
            now = optimizer.state[parameter].get(key)
            if isinstance(value, Tensor) and isinstance(now, Tensor) and now.dtype != value.dtype:
                optimizer.state[parameter][key] = value.to(now.device)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Write a file or folder through to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
