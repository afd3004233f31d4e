"""Files of tensors with their settings in JSON beside them, sealed by a checksum over both.

A flipped bit in a file of tensors is another number, one in JSON another setting, and both load. The checksum stands in
the JSON, as ``"checksum"``. It tells damage and mixed-up files; it is no protection against an adversary, who can
compute it, too.
"""

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

__all__ = ["check_seal", "load_sealed", "read_settings", "save_sealed", "seal", "write_settings"]

_KEY = "checksum"


def save_sealed(
    folder: str | Path, name: str, tensors: Mapping[str, Tensor], settings: Mapping[str, Any], *, version: int
) -> None:
    """Write ``name.safetensors`` and ``name.json``.

    Args:
        folder: where to; made if it is not there.
        name: of both files, without their endings.
        tensors: by name; written from the CPU, contiguous.
        settings: anything that JSON can hold.
        version: of the files' format; stands in the settings as ``"format"``.

    Examples:
        >>> import tempfile, torch
        >>> folder = tempfile.mkdtemp()
        >>> save_sealed(folder, "bias", {"b": torch.ones(2)}, {"rank": 3}, version=1)
        >>> settings, tensors = load_sealed(folder, "bias", version=1)
        >>> settings["rank"], tensors["b"]
        (3, tensor([1., 1.]))
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.safetensors"
    save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, file)
    write_settings(folder / f"{name}.json", {"format": version, **settings}, file)


def load_sealed(folder: str | Path, name: str, *, version: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What :func:`save_sealed` wrote: settings, and tensors on the CPU.

    Args:
        folder: where the two files are.
        name: of both, without their endings.
        version: the format that can be read.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, or was written in another format.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    settings, file = read_settings(Path(folder) / f"{name}.json"), Path(folder) / f"{name}.safetensors"
    if settings.get("format") != version:
        raise ValueError(f"{folder} has format {settings.get('format')}, this version reads {version}")
    check_seal(settings, file)
    try:
        return settings, load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} holds no tensors: {error}") from error


def write_settings(file: Path, settings: Mapping[str, Any], tensors: Path, *, free: Collection[str] = ()) -> None:
    """Write settings as JSON, with the checksum of them and of a file of tensors that is there already.

    Args:
        file: where to.
        settings: anything that JSON can hold.
        tensors: the file of tensors.
        free: settings that may be changed by hand afterwards.

    Examples:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "a.safetensors").write_bytes(b"numbers")
        >>> write_settings(folder / "a.json", {"rank": 2}, folder / "a.safetensors")
        >>> settings = read_settings(folder / "a.json")
        >>> check_seal(settings, folder / "a.safetensors")
        >>> settings["rank"]
        2
    """
    content = {**settings, _KEY: seal(settings, tensors, free=free)}
    file.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")


def read_settings(file: Path) -> dict[str, Any]:
    """Settings from a file of JSON; :func:`check_seal` says whether to believe them.

    Args:
        file: JSON, an object.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged: no JSON, or not an object.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} is not there")
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged ({type(error).__name__}: {error}); save or download it again") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{file} is damaged: it holds a {type(settings).__name__}, not settings; save it again")
    return settings


def check_seal(settings: Mapping[str, Any], tensors: Path, *, free: Collection[str] = ()) -> None:
    """Refuse settings and tensors that are not those that were written together.

    Args:
        settings: from :func:`read_settings`.
        tensors: the file of tensors.
        free: as at writing.

    Raises:
        FileNotFoundError: there is no file of tensors.
        ValueError: the checksum is missing or differs.
    """
    if not tensors.is_file():
        raise FileNotFoundError(f"{tensors} is not there")
    if settings.get(_KEY) != seal(settings, tensors, free=free):
        what = "do not have the checksum that was saved with them" if _KEY in settings else "have no checksum"
        raise ValueError(
            f"{tensors} and its settings {what}: one of the two files is damaged, was edited, or belongs to another "
            "one. Save or download both again"
        )


def seal(settings: Mapping[str, Any], tensors: Path, *, free: Collection[str] = ()) -> str:
    """The checksum: SHA-256 over settings, whatever their order, and the bytes of a file; hexadecimal.

    Args:
        settings: anything that JSON can hold; an entry ``"checksum"`` does not count.
        tensors: the file of tensors.
        free: settings that do not count.

    Examples:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "a.safetensors"
        >>> _ = file.write_bytes(b"numbers")
        >>> seal({"rank": 2, "note": "x"}, file, free=["note"]) == seal({"checksum": "", "rank": 2}, file)
        True
    """
    counted = {name: value for name, value in settings.items() if name != _KEY and name not in free}
    digest = hashlib.sha256(json.dumps(counted, sort_keys=True).encode())
    with tensors.open("rb") as file:
        digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
