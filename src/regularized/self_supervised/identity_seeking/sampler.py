"""Batches of frame pairs: of several videos, the crops of two frames that are not far apart."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from regularized.mechanisms.ranges import allowed, count
from regularized.training.data import share
from regularized.training.identity import fingerprint
from regularized.training.randomness import mix
from regularized.training.step import Batch

__all__ = ["FramePairs"]


class FramePairs:
    """Two frames of each of several videos, as batches of the loop.

    Each batch has ``inputs`` with ``first`` and ``second``, the crops, and ``group_a`` and ``group_b``, their videos.
    Which videos and frames it has is a function of the seed, the epoch, and the number of the batch.

    Args:
        crops: (N, ...) images, or features.
        video: (N,) video of each crop.
        frame: (N,) number of the frame that it was cut from, within its video.
        videos_per_batch: how many videos a batch has; more are more negatives.
        max_gap: how far apart the two frames may be, in frame numbers.
        batches_per_epoch: default one for each ``videos_per_batch`` videos, so that each video comes once.
        seed: of the draws.

    Attributes:
        skipped: videos that have no two frames within ``max_gap``, which are never drawn.

    Raises:
        ValueError: lengths differ, or no video has two frames that are near enough.

    Examples:
        >>> frames = FramePairs(torch.arange(8.0)[:, None], torch.tensor([0] * 4 + [1] * 4),
        ...     torch.tensor([0, 0, 1, 1] * 2), videos_per_batch=2, max_gap=1)
        >>> (batch,) = frames.batches(0)
        >>> {name: len(part) for name, part in batch.inputs.items()}
        {'first': 4, 'second': 4, 'group_a': 4, 'group_b': 4}
    """

    @allowed(videos_per_batch=count(1), max_gap=count(1, "frames", "with a gap of 0 both crops are one image"))
    def __init__(
        self,
        crops: Tensor,
        video: Tensor,
        frame: Tensor,
        *,
        videos_per_batch: int,
        max_gap: int,
        batches_per_epoch: int | None = None,
        seed: int = 0,
    ) -> None:
        if not len(crops) == len(video) == len(frame):
            raise ValueError(
                f"each crop has a video and a frame, got {len(crops)} crops, {len(video)} videos and {len(frame)} "
                "frames"
            )
        self.crops = crops
        self.video = video
        self.frame = frame
        self.videos_per_batch = videos_per_batch
        self.max_gap = max_gap
        self.seed = seed
        self._rows: dict[int, dict[int, Tensor]] = {}
        self._pairs: dict[int, list[tuple[int, int]]] = {}
        self.skipped = 0
        for one in video.unique().tolist():
            inside = torch.nonzero(video == one).squeeze(1)
            frames = {f: inside[frame[inside] == f] for f in frame[inside].unique().tolist()}
            near = [(a, b) for a in frames for b in frames if a < b <= a + max_gap]
            if near:
                self._rows[one], self._pairs[one] = frames, near
            else:
                self.skipped += 1
        if not self._pairs:
            raise ValueError(
                f"none of {self.skipped} videos has two frames that are at most max_gap={max_gap} apart; is `frame` "
                "counted in frames of the film? Then give a larger max_gap"
            )
        self._length = batches_per_epoch or -(-len(self._pairs) // videos_per_batch)

    def __len__(self) -> int:
        return self._length

    def batches(self, epoch: int, *, start: int = 0, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """The batches of an epoch; of several processes each takes its part of the videos of a batch.

        Args:
            epoch: its number.
            start: first batch.
            rank: number of the process.
            world: how many there are.
        """
        videos = list(self._pairs)
        order = torch.randperm(len(videos), generator=torch.Generator().manual_seed(mix(self.seed, epoch))).tolist()
        for number in range(start, len(self)):
            places = range(number * self.videos_per_batch, (number + 1) * self.videos_per_batch)
            # Each video once an epoch, and from the front again where an epoch is longer than that.
            chosen = [videos[order[place % len(videos)]] for place in places][: len(videos)]
            yield self._batch(chosen[share(len(chosen), rank, world)], mix(self.seed, epoch, number, rank))

    def _batch(self, videos: list[int], seed: int) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        sides: tuple[list[Tensor], list[Tensor]] = ([], [])
        for video in videos:
            near = self._pairs[video]
            frames = near[int(torch.randint(len(near), (), generator=generator))]
            # Either of the two may come first: time has no direction here.
            turned = bool(torch.rand((), generator=generator) < 0.5)
            for side, frame in zip(sides, frames[::-1] if turned else frames, strict=True):
                side.append(self._rows[video][frame])
        a, b = (torch.cat(side) for side in sides)
        return Batch(
            {"first": self.crops[a], "second": self.crops[b], "group_a": self.video[a], "group_b": self.video[b]}
        )

    def identity(self) -> dict[str, Any]:
        """What a run that goes on compares with: the crops and how pairs are drawn."""
        return {
            "kind": type(self).__name__,
            "content": fingerprint([self.crops, self.video, self.frame]),
            "videos_per_batch": self.videos_per_batch,
            "max_gap": self.max_gap,
            "seed": self.seed,
        }
