"""Pictures that runs of an experiment make: kept as PNG beside the store, shown in the report, never in the ledger.

An experiment returns :class:`~regularized.evidence.experiment.Illustrated` measurements. Worker, runner and report do
the rest::

    encode(images) -> name -> PNG as text         in the process of the run
    keep(encoded, ...)                            in the user's data folder, by code, scale, arm and seed
    of(result) -> [Picture, ...]                  those of a result's first seed, also where its runs were made earlier
"""

import base64
import io
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regularized.evidence.results import ReproduceResult
from regularized.evidence.store import home

__all__ = ["Picture", "encode", "keep", "of", "save"]


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture of a result.

    Args:
        arm: whose run made it.
        name: what it shows.
        path: the PNG.
    """

    arm: str
    name: str
    path: Path


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
        if not name.replace("_", "").isalnum():
            raise ValueError(f"the name of an image may hold letters, digits and underscores, got {name!r}")
        buffer = io.BytesIO()
        Image.fromarray((255.0 * array.clip(0.0, 1.0)).round().astype(np.uint8)).save(buffer, format="PNG")
        encoded[name] = base64.b64encode(buffer.getvalue()).decode("ascii")
    return encoded


def keep(encoded: Mapping[str, str], *, slug: str, scale: str, code_key: str, arm: str, seed: int) -> None:
    """Write the pictures of one run to the user's data folder, over those of an earlier one."""
    folder = _folder(slug, scale, code_key) / arm / str(seed)
    if encoded:
        folder.mkdir(parents=True, exist_ok=True)
    for name, text in encoded.items():
        (folder / f"{name}.png").write_bytes(base64.b64decode(text))


def of(result: ReproduceResult) -> list[Picture]:
    """Pictures of the first seed, in the order of the arms; none where the runs made none."""
    folder = _folder(result.slug, result.scale, result.code_key)
    return [
        Picture(arm, path.stem, path)
        for arm in result.arms
        for path in sorted((folder / arm / str(result.seeds[0])).glob("*.png"))
    ]


def save(result: ReproduceResult, folder: Path) -> list[Path]:
    """Copy them to ``images/ARM_NAME.png`` in a folder."""
    files = []
    for picture in of(result):
        target = folder / "images" / f"{picture.arm}_{picture.name}.png"
        target.parent.mkdir(exist_ok=True)
        files.append(Path(shutil.copyfile(picture.path, target)))
    return files


def _folder(slug: str, scale: str, code_key: str) -> Path:
    return home() / "images" / slug / scale / code_key
