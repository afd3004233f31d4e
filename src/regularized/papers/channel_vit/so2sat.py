"""So2Sat LCZ42 (Zhu et al. 2020), version 3, random split: places of 32 x 32 pixels, radar and optical, 17 classes."""

import importlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from regularized.evidence.requirements import need_files, need_package

__all__ = ["so2sat"]

_WANTED = {
    f"so2sat/random/{part}.h5": "So2Sat LCZ42 version 3, random split (mediatum.ub.tum.de/1613658)"
    for part in ("training", "testing")
}


def so2sat(part: str) -> tuple[Tensor, Tensor]:
    """One part of the set, read as half precision: about 13 GB for training.

    Args:
        part: ``"training"`` or ``"testing"``.

    Returns:
        (N, 18, 32, 32) float16, eight channels of Sentinel-1 and ten bands of Sentinel-2; (N,) int64.

    Raises:
        Unavailable: the files are not here, or h5py is not installed.
    """
    need_package("h5py", "pip install h5py")
    return read_so2sat(need_files(_WANTED) / "so2sat" / "random" / f"{part}.h5")


def read_so2sat(path: Path, *, rows: int = 4096) -> tuple[Tensor, Tensor]:
    """One file, a few rows at a time; sizes as of :func:`so2sat`."""
    with importlib.import_module("h5py").File(path) as file:
        radar, optical, labels = file["sen1"], file["sen2"], file["label"]
        x = np.empty((len(labels), radar.shape[-1] + optical.shape[-1], *radar.shape[1:3]), dtype=np.float16)
        for start in range(0, len(labels), rows):
            some = slice(start, start + rows)
            both = np.concatenate([radar[some], optical[some]], axis=-1)
            x[some] = np.moveaxis(both, -1, 1).clip(-6e4, 6e4)
        return torch.from_numpy(x), torch.from_numpy(np.asarray(labels).argmax(axis=1).astype(np.int64))
