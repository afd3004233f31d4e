"""Images of several channels that mean different things: bands of a satellite, directions of a diffusion scan, sensors.

- :func:`landsat`: 6,435 places of one Landsat scene, 3 x 3 pixels in four bands, and what grows there
- :func:`diffusion_scan`: 1,000 voxels of a brain, 3 x 3 pixels in 65 directions, and along which axis its fibres run
- :func:`edges_and_mean`: four channels from a grey image
"""

import importlib
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from regularized.evidence.datasets.folder import data_folder
from regularized.evidence.experiment import Unavailable
from regularized.evidence.requirements import need_package

__all__ = ["diffusion_scan", "edges_and_mean", "landsat"]

_LANDSAT_FILES = ("sat.trn", "sat.tst")
_RDA = "Satellite.rda"
_DEBIAN = Path("/usr/lib/R/site-library/mlbench/data")
# Of the original files, in the order of their numbers; 6 does not occur.
_LAND = ("red soil", "cotton crop", "grey soil", "damp grey soil", "vegetation stubble", "", "very damp grey soil")


@lru_cache(maxsize=1)
def landsat() -> tuple[Tensor, Tensor]:
    """Statlog's Landsat set (UCI): (6435, 4, 3, 3) float32, grey values of two visible and two near-infrared bands.

    Labels are six kinds of land, (6435,) int64. Neighbouring places of the scene share pixels, and their order is
    random, so training and test images overlap whatever the split.

    Found in the folder ``statlog_landsat`` of :func:`~regularized.evidence.datasets.folder.data_folder` (``sat.trn``
    and ``sat.tst``, or ``Satellite.rda``), or in the Debian package ``r-cran-mlbench``; R's file is read by ``rdata``.

    Raises:
        Unavailable: it is in neither, or rdata is not installed.
    """
    folder = data_folder() / "statlog_landsat"
    if all((folder / name).is_file() for name in _LANDSAT_FILES):
        table = np.concatenate([np.loadtxt(folder / name, dtype=np.int64) for name in _LANDSAT_FILES])
        return _as_images(table[:, :36]), _compact(table[:, 36])
    path = next((place / _RDA for place in (folder, _DEBIAN) if (place / _RDA).is_file()), None)
    if path is None:
        raise Unavailable(
            f"the Landsat images are not here. Ways to get them: (1) apt-get install r-cran-mlbench, or unpack {_RDA} "
            f"from it into {folder}, and pip install --no-deps rdata xarray; (2) put {' and '.join(_LANDSAT_FILES)} of "
            f"UCI's Statlog Landsat Satellite into {folder}; REGULARIZED_DATA may name another folder"
        )
    need_package("rdata", "pip install --no-deps rdata xarray")
    frame = importlib.import_module("rdata").read_rda(path, default_encoding="ascii")["Satellite"]
    kinds = np.array([_LAND.index(str(kind)) for kind in frame.iloc[:, 36]])
    return _as_images(frame.iloc[:, :36].to_numpy()), _compact(kinds + 1)


def _as_images(values: NDArray[np.generic]) -> Tensor:
    """(N, 36), pixel by pixel and in each pixel band by band, to (N, 4, 3, 3)."""
    return torch.from_numpy(values.astype(np.float32)).view(-1, 3, 3, 4).permute(0, 3, 1, 2).contiguous()


def _compact(numbers: NDArray[np.int64]) -> Tensor:
    """Classes 1 to 5 and 7 as 0 to 5."""
    return torch.from_numpy(np.where(numbers == 7, 5, numbers - 1).astype(np.int64))


@lru_cache(maxsize=1)
def diffusion_scan() -> tuple[Tensor, Tensor, Tensor]:
    """dipy's crop of a diffusion scan (MRI): (1000, 65, 3, 3) float32, a voxel and its neighbours in its slice.

    The first channel has no gradient, the others have one of 64 directions each; values are logarithms. A label is the
    axis along which the fibres of the voxel run, 0 to 2: that nearest to the main direction of the diffusion tensor,
    which is fitted to all channels of the voxel alone (Basser et al. 1994). So a channel says something only to who
    knows its direction.

    Found in the package dipy, which is not imported; read with nibabel.

    Returns:
        Images, labels (1000,) int64, and the slice of each voxel, (1000,) int64 in 0 ... 9: those of other slices share
        no pixel with it.

    Raises:
        Unavailable: a package is not installed.
    """
    origin = need_package("dipy", "pip install --no-deps dipy nibabel").origin
    need_package("nibabel", "pip install --no-deps nibabel")
    assert origin is not None
    files = Path(origin).parent / "data" / "files"
    volume = np.asarray(importlib.import_module("nibabel").load(files / "small_64D.nii").dataobj)
    strengths = np.load(files / "small_64D.bvals.npy")
    directions = np.nan_to_num(np.load(files / "small_64D.gradients.npy"))  # the first has no direction
    logs = np.log(np.maximum(volume.astype(np.float64), 1.0))

    wide = torch.from_numpy(logs).permute(2, 3, 0, 1)  # slice, channel, row, column
    neighbours = F.pad(wide, (1, 1, 1, 1), mode="replicate").unfold(2, 3, 1).unfold(3, 3, 1)
    images = neighbours.permute(0, 2, 3, 1, 4, 5).flatten(0, 2).float()
    labels = torch.from_numpy(_main_axis(np.moveaxis(logs, 2, 0).reshape(-1, logs.shape[-1]), strengths, directions))
    slices = torch.arange(len(wide)).repeat_interleave(wide.shape[2] * wide.shape[3])
    return images, labels, slices


def _main_axis(
    logs: NDArray[np.float64], strengths: NDArray[np.float64], directions: NDArray[np.float64]
) -> NDArray[np.int64]:
    """Least squares for log S = log S0 - b g^T D g; the largest part of the eigenvector of D's largest eigenvalue."""
    pairs = [(0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (1, 2)]
    columns = [-strengths * directions[:, i] * directions[:, j] * (1 if i == j else 2) for i, j in pairs]
    design = np.stack([*columns, np.ones_like(strengths)], axis=1)
    fitted = np.linalg.lstsq(design, logs.T, rcond=None)[0].T
    tensors = np.empty((len(logs), 3, 3))
    for column, (i, j) in enumerate(pairs):
        tensors[:, i, j] = tensors[:, j, i] = fitted[:, column]
    main = np.linalg.eigh(tensors)[1][:, :, -1]
    axes: NDArray[np.int64] = np.abs(main).argmax(axis=1)
    return axes


def edges_and_mean(images: Tensor) -> Tensor:
    """Four channels of a grey image: itself, its edges across and along (Sobel), and means of 5 x 5 pixels.

    Args:
        images: (N, 1, H, W).

    Returns:
        (N, 4, H, W).

    Examples:
        >>> edges_and_mean(torch.ones(2, 1, 8, 8))[0, 1].abs().max()
        tensor(0.)
    """
    across = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]], dtype=images.dtype)
    edges = F.conv2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), torch.stack([across, across.T])[:, None])
    mean = F.avg_pool2d(F.pad(images, (2, 2, 2, 2), mode="replicate"), 5, stride=1)
    return torch.cat([images, edges, mean], dim=1)
