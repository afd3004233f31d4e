"""Images as numbers: of a folder with a folder for each class, or held as Pillow's.

Public names: :func:`folder`, :func:`is_image`, :func:`pixels`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from regularized.evidence.experiment import Unavailable

__all__ = ["folder", "is_image", "pixels"]

_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"}


def is_image(value: Any) -> bool:
    """Whether this is an image of Pillow."""
    return type(value).__module__.partition(".")[0] == "PIL"


def pixels(images: Sequence[Any]) -> Tensor:
    """Images of Pillow as (N, 1 or 3, H, W) float32 in [0, 1].

    Raises:
        ValueError: they differ in size, or some are grey and others are not.

    Examples:
        >>> from PIL import Image
        >>> pixels([Image.new("RGB", (8, 6), "white")]).shape
        torch.Size([1, 3, 6, 8])
    """
    arrays = [np.asarray(image.convert("L" if image.mode in ("1", "L", "I", "I;16") else "RGB")) for image in images]
    if len(shapes := {array.shape for array in arrays}) > 1:
        raise ValueError(f"all images must have one size and either grey or colour; found {sorted(shapes)[:5]}")
    stacked = torch.as_tensor(np.stack(arrays))
    return (stacked[:, None] if stacked.ndim == 3 else stacked.permute(0, 3, 1, 2)).float() / 255.0


def folder(path: Path) -> tuple[Tensor, Any]:
    """Pixels and names of the classes of a folder that holds a folder of images for each class.

    Raises:
        ValueError: there are not two classes, or a file cannot be read.
        Unavailable: Pillow is missing.
    """
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise Unavailable("images need Pillow: pip install pillow") from error
    classes = sorted(entry for entry in path.iterdir() if entry.is_dir())
    files = [(file, of.name) for of in classes for file in sorted(of.iterdir()) if file.suffix.lower() in _SUFFIXES]
    if len({name for _, name in files}) < 2:
        raise ValueError(f"{path} must hold a folder of images for each of two classes or more; it has {len(classes)}")
    images = []
    for file, _ in files:
        try:
            with Image.open(file) as image:
                image.load()
                images.append(image)
        except (OSError, UnidentifiedImageError) as error:
            raise ValueError(f"{file} cannot be read as an image ({error}); remove it or convert it") from error
    return pixels(images), np.array([name for _, name in files])
