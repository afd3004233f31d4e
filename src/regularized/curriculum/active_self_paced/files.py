"""A folder that holds the state of an annotation: safetensors and JSON."""

from pathlib import Path
from typing import Any

from regularized.training import checkpoint  # safetensors, which nothing else here needs

__all__ = ["read_state", "write_state"]

_STATE = "state"


def write_state(folder: Path | str, state: dict[str, Any]) -> Path:
    """Write the state beside the old one first, and put it in its place when it is whole."""
    final = Path(folder)
    partial = final.with_name(final.name + ".part")
    partial.mkdir(parents=True, exist_ok=True)
    checkpoint.write_part(partial, _STATE, state)
    for file in final.glob(f"{_STATE}.*") if final.exists() else ():
        file.replace(file.with_name(file.name + ".old"))
    final.mkdir(parents=True, exist_ok=True)
    for file in partial.iterdir():
        file.replace(final / file.name)
    partial.rmdir()
    for file in final.glob("*.old"):
        file.unlink()
    return final


def read_state(folder: Path | str) -> dict[str, Any]:
    """What :func:`write_state` wrote."""
    state: dict[str, Any] = checkpoint.load(Path(folder), _STATE)
    return state
