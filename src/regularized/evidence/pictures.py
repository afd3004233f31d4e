"""Pictures that runs of an experiment make: kept as PNG beside the store, shown in the report, never in the ledger.

An experiment returns :class:`~regularized.evidence.experiment.Illustrated` measurements; the rest is done as with all
:mod:`~regularized.evidence.attachments`.
"""

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regularized.evidence.attachments import Kind, as_text, check_name

__all__ = ["encode", "keep", "of", "save"]


_KIND = Kind("images", ".png")
keep, of, save = _KIND.keep, _KIND.of, _KIND.save


def encode(images: Mapping[str, NDArray[Any]]) -> dict[str, str]:
    """PNG files as base64 text.

    Args:
        images: (H, W) grey or (H, W, 3) colour by name, values in [0, 1]; what lies beyond is clipped.

    Raises:
        ValueError: another shape, or a name that cannot be a file's.

    Examples:
        >>> list(encode({"noise": np.zeros((2, 3))}))
        ['noise']
    """
    from PIL import Image

    encoded = {}
    for name, image in images.items():
        array = np.asarray(image, dtype=np.float64)
        if array.ndim != 2 and not (array.ndim == 3 and array.shape[2] == 3):
            raise ValueError(f"image {name!r} must be (H, W) or (H, W, 3), got {array.shape}")
        check_name("an image", name)
        buffer = io.BytesIO()
        Image.fromarray((255.0 * array.clip(0.0, 1.0)).round().astype(np.uint8)).save(buffer, format="PNG")
        encoded[name] = as_text(buffer.getvalue())
    return encoded
