"""Selfie: patches are cut out, and the network learns which of them goes into which hole.

:mod:`regularized.self_supervised.selfie.loss` has the symbols.
"""

import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from regularized.mechanisms.patches import Split, patch_grid, patchify, random_split, take
from regularized.mechanisms.ranges import allowed, count
from regularized.self_supervised.selfie.layer import AttentionPool, GridPositions
from regularized.self_supervised.selfie.loss import selection_accuracy, selection_logits, selection_loss

__all__ = ["Quiz", "Selfie", "load_trunk"]


class Quiz(NamedTuple):
    """What came of a batch."""

    loss: Tensor
    """Scalar with its graph."""
    accuracy: Tensor
    """Scalar, detached: share of the holes that got their own patch; 1 / T by chance."""
    split: Split
    """Which patches were context and which cut out."""


class Selfie(nn.Module):
    """The quiz as a loss, for a loop of your own or for :class:`~regularized.self_supervised.pretraining.Pretraining`.

    The trunk sees each patch on its own as a small image. Later the same trunk, with the rest of the classifier behind
    it, sees whole images: ``nn.Sequential(selfie.trunk, ...)``; everything else here is thrown away.

    A step costs about what a supervised step of the trunk costs on the same images, and the pooling.

    Not for images with much flat background: patches that look alike cannot be told apart. Look at ``accuracy`` early:
    at chance there is nothing to transfer.

    With batch normalisation in the trunk, statistics are those of all patches of the batch, and the summary knows a
    little of what was cut out; so it is in the paper.

    Args:
        trunk: network from (n, C, P, P) to features (n, D, h, w), which are averaged over h and w, or (n, D). It must
            take whole images as well, if it is to be used for them.
        dim: D, width of its features.
        patch_size: P; the paper: 8 at 32 pixels, 32 at 224.
        grid: rows and columns of patches of an image; N their product.
        num_targets: T, patches of an image that are cut out, from 2 to N - 1; default a quarter, rounded down (a
            re-implementation: 4 of 16; the paper's figure shows 3 of 9).
        pool: module from (B, N - T, D) to (B, D); default an
            :class:`~regularized.self_supervised.selfie.AttentionPool` of the paper's size.
        factored_positions: see :class:`~regularized.self_supervised.selfie.GridPositions`; default False.
        context_positions: add the places of the visible patches before they are pooled; default True (paper). Without
            it the summary is of a bag of patches (a re-implementation).

    Attributes:
        trunk: the patch network.
        pool: attention pooling.
        positions: embeddings of the places.

    Raises:
        ValueError: a setting outside its range; at a call, images of another grid, or a trunk whose output is of
            another width or kind.

    Warns:
        UserWarning: once, at the first batch: patches that cannot be told apart, or a trunk that leaves one pixel of a
            patch.

    Examples:
        >>> import torch
        >>> trunk = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU())
        >>> pool = AttentionPool(8, depth=1, heads=2, hidden=16)
        >>> selfie = Selfie(trunk, dim=8, patch_size=4, grid=(4, 4), pool=pool)
        >>> optimizer = torch.optim.SGD(selfie.parameters(), lr=0.1)
        >>> for images in torch.randn(8, 1, 16, 16).split(4):
        ...     selfie(images).loss.backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> classifier = nn.Sequential(selfie.trunk, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
        >>> classifier(images).shape
        torch.Size([4, 10])
    """

    @allowed(dim=count(1), num_targets=count(2, "or there is nothing to choose between").or_none("a quarter"))
    def __init__(
        self,
        trunk: nn.Module,
        *,
        dim: int,
        patch_size: int,
        grid: tuple[int, int],
        num_targets: int | None = None,
        pool: nn.Module | None = None,
        factored_positions: bool = False,
        context_positions: bool = True,
    ) -> None:
        super().__init__()
        patches = grid[0] * grid[1]
        targets = patches // 4 if num_targets is None else num_targets
        if not 2 <= targets < patches:
            raise ValueError(
                f"num_targets must be from 2, or there is nothing to choose between, to {patches - 1}, or there is no "
                f"context; got {targets} of {patches} patches"
            )
        self.trunk = trunk
        self.pool: nn.Module = AttentionPool(dim) if pool is None else pool
        self.positions: GridPositions = GridPositions(grid, dim, factored=factored_positions)
        self.dim = dim
        self.patch_size = patch_size
        self.grid = grid
        self.num_targets: int = targets
        self.context_positions = context_positions
        self._looked = False

    def features(self, images: Tensor) -> Tensor:
        """(B, C, H, W) to features of the patches (B, N, D), in raster order."""
        if (got := patch_grid(images.shape[2], images.shape[3], self.patch_size)) != self.grid:
            raise ValueError(
                f"grid is {self.grid[0]} x {self.grid[1]}, but images of {images.shape[2]} x {images.shape[3]} have "
                f"{got[0]} x {got[1]} patches of {self.patch_size} pixels; give that grid, or resize the images"
            )
        patches = patchify(images, self.patch_size)
        out: Tensor = self.trunk(patches.flatten(0, 1))
        if out.ndim not in (2, 4) or out.shape[1] != self.dim:
            raise ValueError(
                f"the trunk must give (n, {self.dim}, h, w) or (n, {self.dim}), as dim={self.dim} says; it gave "
                f"{tuple(out.shape)}"
            )
        if not self._looked:
            self._look(patches, out)
        pooled = out.mean(dim=(2, 3)) if out.ndim == 4 else out
        return pooled.view(*patches.shape[:2], self.dim)

    def logits(self, features: Tensor, split: Split) -> Tensor:
        """Features of all patches (B, N, D) to how well each that was cut out fits into each hole (B, T, T)."""
        table = self.positions.table()
        context = take(features, split.visible)
        if self.context_positions:
            context = context + table[split.visible]
        return selection_logits(self.pool(context), table[split.hidden], take(features, split.hidden))

    def forward(self, images: Tensor, progress: Any = None, *, split: Split | None = None) -> Quiz:
        """Loss of a batch.

        Args:
            images: (B, C, H, W), normalised and augmented as whole images.
            progress: not looked at; so that :class:`~regularized.self_supervised.pretraining.Pretraining` can call it.
            split: which patches are cut out (``hidden``); default drawn from the device's global generator.
        """
        features = self.features(images)
        if split is None:
            batch, patches = features.shape[:2]
            split = random_split(batch, patches, self.num_targets, device=features.device)
        logits = self.logits(features, split)
        return Quiz(selection_loss(logits), selection_accuracy(logits), split)

    def _look(self, patches: Tensor, out: Tensor) -> None:
        """Once, at the first batch, where a wait for the device does no harm."""
        self._looked = True
        if out.ndim == 4 and out.shape[2] * out.shape[3] == 1 and self.patch_size > 1:
            warnings.warn(
                f"of a patch of {self.patch_size} x {self.patch_size} pixels the trunk leaves one: most of its last "
                "layers see padding; take larger patches, or fewer strides before the cut",
                stacklevel=4,
            )
        flat = patches.flatten(2)
        same = (flat.unsqueeze(2) == flat.unsqueeze(1)).all(dim=3).sum(dim=2) > 1
        if share := float(same.float().mean()):
            warnings.warn(
                f"{share:.0%} of the patches of the first batch have a twin in their image (flat background): cut out "
                "together they cannot be told apart, so the loss has a floor above 0. Crop or augment the images, or "
                "take larger patches",
                stacklevel=4,
            )

    def extra_repr(self) -> str:
        """Settings, for ``repr``."""
        return f"patch_size={self.patch_size}, grid={self.grid}, num_targets={self.num_targets}"


def load_trunk(trunk: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Take over the weights and statistics of a pretrained trunk, all of them or none.

    Args:
        trunk: the same stages of the classifier.
        state: ``selfie.trunk.state_dict()``.

    Raises:
        ValueError: names or shapes differ; the message lists them.

    Examples:
        >>> import torch
        >>> ours, theirs = nn.Conv2d(1, 2, 3), nn.Conv2d(1, 2, 3)
        >>> load_trunk(ours, theirs.state_dict())
        >>> torch.equal(ours.weight, theirs.weight)
        True
    """
    own = trunk.state_dict()
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [
        f"{name} {tuple(state[name].shape)} for {tuple(own[name].shape)}"
        for name in own.keys() & state.keys()
        if own[name].shape != state[name].shape
    ]
    if missing or unexpected or shapes:
        raise ValueError(
            f"the weights are not those of this trunk: missing {missing}, unexpected {unexpected}, of another shape "
            f"{sorted(shapes)}; build the same stages, and give selfie.trunk.state_dict()"
        )
    trunk.load_state_dict(state)
