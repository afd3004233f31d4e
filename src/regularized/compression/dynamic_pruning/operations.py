"""What is computed: multiplications for each image, which filters were on, and a picture of that.

:mod:`regularized.compression.dynamic_pruning.masks` has the paper and its symbols.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Operations", "convolution_macs"]

# Shapes: B or N images, Ci channels in, Co filters of a layer.


def convolution_macs(kept: Tensor, given: Tensor, *, taps: int, groups: int = 1) -> Tensor:
    """Multiplications of a convolution of which some filters and some input channels are left out.

    For an ordinary convolution it is the paper's ``k_l * k_(l-1) * H' W' K^2``. With groups, each filter counts the
    channels of its own group; the official code rounds ``k_(l-1) / groups`` down, which makes depthwise layers free.

    Args:
        kept: (B, Co) bool, filters that are computed.
        given: (B, Ci) bool, channels that are not empty.
        taps: positions of the output times size of the kernel: H' W' K^2.
        groups: of the convolution; default 1.

    Returns:
        (B,) int64.

    Examples:
        >>> kept, given = torch.tensor([[True, False, True]]), torch.tensor([[True, True]])
        >>> convolution_macs(kept, given, taps=9 * 16)
        tensor([576])
    """
    filters, channels = (mask.reshape(len(mask), groups, -1).sum(dim=2) for mask in (kept, given))
    return (filters * channels).sum(dim=1) * taps


@dataclass(frozen=True, slots=True)
class Operations:
    """What a dynamically pruned network computes for a number of images.

    Args:
        dense: multiplications of the pruned layers for one image, with all filters.
        macs: (N,) int64, those of each image with its filters alone. Predictors, normalisation, biases and all other
            layers are left out, as in the paper.
        kept: for each layer (N, Co) bool, which of its filters were on.
        accuracy: share of the filters that the predictors judge as their targets, in [0, 1]; None where they were not
            asked.

    Examples:
        >>> found = Operations(100, torch.tensor([20, 40]), {"conv": torch.tensor([[True, False], [True, True]])})
        >>> found.reduction, found.shares
        (0.7, {'conv': 0.75})
    """

    dense: int
    macs: Tensor
    kept: Mapping[str, Tensor]
    accuracy: float | None = None

    @property
    def reduction(self) -> float:
        """Share of the multiplications that is saved, mean over the images."""
        return 1.0 - float(self.macs.double().mean()) / self.dense

    @property
    def shares(self) -> dict[str, float]:
        """Mean share of the filters that is on, by layer."""
        return {name: round(float(kept.double().mean()), 6) for name, kept in self.kept.items()}

    def empty_layers(self, share: float = 0.01) -> dict[str, float]:
        """Layers in which more than a share of the images keeps no filter at all, with that share.

        Args:
            share: default 1 %.
        """
        none = {name: float((~kept.any(dim=1)).double().mean()) for name, kept in self.kept.items()}
        return {name: found for name, found in none.items() if found > share}

    def picture(self, labels: Tensor | None = None, *, height: int = 6) -> Tensor:
        """The masks as an image: one row an image or class, one column a filter, light where it is on.

        Filters of a layer are sorted by how often they are on, and layers are set apart by a grey line, so that what
        all images use, what none uses, and what depends on the image are seen at once.

        Args:
            labels: (N,) class of each image: rows are classes then, and the grey of a field says what share of the
                class's images uses the filter. None: a row for each of the N images.
            height: pixels of a row; default 6.

        Returns:
            (rows * height, columns) float64 in [0, 1], on the CPU.

        Examples:
            >>> found = Operations(100, torch.tensor([20, 40]), {"conv": torch.tensor([[True, False], [True, True]])})
            >>> found.picture(height=1)
            tensor([[0., 1.],
                    [1., 1.]], dtype=torch.float64)
        """
        blocks: list[Tensor] = []
        for kept in self.kept.values():
            used = kept.double() if labels is None else _by_class(kept.double(), labels)
            used = used[:, used.mean(dim=0).argsort(stable=True)]
            blocks += [torch.full((len(used), 1), 0.5, dtype=used.dtype), used] if blocks else [used]
        return torch.cat(blocks, dim=1).repeat_interleave(height, dim=0)


def _by_class(used: Tensor, labels: Tensor) -> Tensor:
    classes: Sequence[int] = labels.unique().tolist()
    return torch.stack([used[labels == c].mean(dim=0) for c in classes])
