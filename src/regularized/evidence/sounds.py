"""Sounds that runs of an experiment make: kept as WAV beside the store, played in the report, never in the ledger.

An experiment returns :class:`~regularized.evidence.experiment.Audible` measurements; the rest is done as with
:mod:`~regularized.evidence.pictures`: ``encode`` in the process of the run, ``keep`` in the user's data folder, ``of``
a result those of its first seed.
"""

import base64
import io
import shutil
import wave
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regularized.evidence.results import ReproduceResult
from regularized.evidence.store import home

__all__ = ["RATE", "Sound", "encode", "keep", "of", "save"]

RATE = 16_000
"""Samples a second."""


@dataclass(frozen=True, slots=True)
class Sound:
    """One sound of a result.

    Args:
        arm: whose run made it.
        name: what it is.
        path: the WAV.
    """

    arm: str
    name: str
    path: Path


def encode(sounds: Mapping[str, NDArray[Any]]) -> dict[str, str]:
    """WAV files of 16 bit as base64 text.

    Args:
        sounds: (n,) samples at 16 kHz by name, in [-1, 1]; what lies beyond is clipped.

    Raises:
        ValueError: another shape, or a name that cannot be a file's.

    Examples:
        >>> list(encode({"silence": np.zeros(3)}))
        ['silence']
    """
    encoded = {}
    for name, samples in sounds.items():
        array = np.asarray(samples, dtype=np.float64)
        if array.ndim != 1:
            raise ValueError(f"sound {name!r} must be (n,), got {array.shape}")
        if not name.replace("_", "").isalnum():
            raise ValueError(f"the name of a sound may hold letters, digits and underscores, got {name!r}")
        buffer = io.BytesIO()
        with wave.open(buffer, "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(RATE)
            file.writeframes((32767 * array.clip(-1.0, 1.0)).round().astype("<i2").tobytes())
        encoded[name] = base64.b64encode(buffer.getvalue()).decode("ascii")
    return encoded


def keep(encoded: Mapping[str, str], *, slug: str, scale: str, code_key: str, arm: str, seed: int) -> None:
    """Write the sounds of one run to the user's data folder, over those of an earlier one."""
    folder = _folder(slug, scale, code_key) / arm / str(seed)
    if encoded:
        folder.mkdir(parents=True, exist_ok=True)
    for name, text in encoded.items():
        (folder / f"{name}.wav").write_bytes(base64.b64decode(text))


def of(result: ReproduceResult) -> list[Sound]:
    """Sounds of the first seed, in the order of the arms; none where the runs made none."""
    folder = _folder(result.slug, result.scale, result.code_key)
    return [
        Sound(arm, path.stem, path)
        for arm in result.arms
        for path in sorted((folder / arm / str(result.seeds[0])).glob("*.wav"))
    ]


def save(result: ReproduceResult, folder: Path) -> list[Path]:
    """Copy them to ``sounds/ARM_NAME.wav`` in a folder."""
    files = []
    for sound in of(result):
        target = folder / "sounds" / f"{sound.arm}_{sound.name}.wav"
        target.parent.mkdir(exist_ok=True)
        files.append(Path(shutil.copyfile(sound.path, target)))
    return files


def _folder(slug: str, scale: str, code_key: str) -> Path:
    return home() / "sounds" / slug / scale / code_key
