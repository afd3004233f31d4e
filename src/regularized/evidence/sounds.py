"""Sounds that runs of an experiment make: kept as WAV beside the store, played in the report, never in the ledger.

An experiment returns :class:`~regularized.evidence.experiment.Audible` measurements; the rest is done as with all
:mod:`~regularized.evidence.attachments`.
"""

import io
import wave
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regularized.evidence.attachments import Kind, as_text, check_name

__all__ = ["RATE", "encode", "keep", "of", "save"]

RATE = 16_000
"""Samples a second."""


_KIND = Kind("sounds", ".wav")
keep, of, save = _KIND.keep, _KIND.of, _KIND.save


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
        check_name("a sound", name)
        buffer = io.BytesIO()
        with wave.open(buffer, "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(RATE)
            file.writeframes((32767 * array.clip(-1.0, 1.0)).round().astype("<i2").tobytes())
        encoded[name] = as_text(buffer.getvalue())
    return encoded
