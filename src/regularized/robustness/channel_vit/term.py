"""Hierarchical channel sampling in the loop.

:mod:`regularized.robustness.channel_vit.layer` has the paper and its symbols.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from regularized.mechanisms.ranges import allowed
from regularized.robustness.channel_vit.layer import Channels
from regularized.robustness.channel_vit.sampling import MODE, Mode, apply_choice, as_ids, draw_channels, present_planes
from regularized.training.step import Batch, Step
from regularized.training.terms import Term

__all__ = ["SampleChannels"]


class SampleChannels(Term):
    """One choice of channels an optimizer step, for all its micro-batches and processes.

    It changes the batch and adds nothing to the loss. The inputs are images (B, n, H, W), a pair of images and channel
    ids, or a mapping with ``x`` and, if need be, ``channels``. The draws come from a generator of its own, which
    checkpoints restore.

    Args:
        mode: ``"select"`` (default) leaves channels out, for a network that is called with images and ids; ``"mask"``
            zeroes them and scales the others, for any other.
        seed: of the draws; default 0.

    Raises:
        ValueError: no such mode; at a step: no channel present, or micro-batches of one step with different numbers of
            channels.
        TypeError: at a step: inputs of another form.

    Examples:
        >>> from functools import partial
        >>> from regularized.robustness.channel_vit import ChannelViT
        >>> from regularized.training import CrossEntropy, TensorData, Trainer
        >>> net = ChannelViT(4, num_classes=3, img_size=8, patch_size=4, embed_dim=16, depth=1, num_heads=2)
        >>> trainer = Trainer(
        ...     net,
        ...     terms={"task": CrossEntropy(), "channels": SampleChannels()},
        ...     optimizer=partial(torch.optim.AdamW, lr=1e-3),
        ... )
        >>> data = TensorData(torch.randn(20, 4, 8, 8), torch.randint(3, (20,)), batch_size=10)
        >>> _ = trainer.fit(data, epochs=1)
    """

    sharding = "forward"
    contributes = False

    @allowed(mode=MODE)
    def __init__(self, mode: Mode = "select", *, seed: int = 0) -> None:
        super().__init__()
        self.mode: Mode = mode
        self.generator: torch.Generator = torch.Generator().manual_seed(seed)
        self._kept: list[int] | None = None
        self._of = 0

    def transform(self, batch: Batch) -> Batch:
        """The batch with the channels of this step; before its first micro-batch they are drawn."""
        if not self.training:
            return batch
        x, channels = _images(batch.inputs)
        if self._kept is None:
            self._of = len(present_planes(None, x))
            self._kept = draw_channels(self._of, self.generator)
        if x.shape[1] != self._of:
            raise ValueError(
                f"the micro-batches of one step have {self._of} and {x.shape[1]} channels; put images with the same "
                "channels into a step"
            )
        x, ids = apply_choice(self.mode, x, as_ids(channels, x), self._kept)
        return replace(batch, inputs=_like(batch.inputs, x, ids, named=self.mode == "select"))

    def after_step(self, step: Step) -> None:
        """The choice of this step is used up."""
        self.reset()

    def reset(self) -> None:
        """Forget the choice, and draw at the next step, as at the start."""
        self._kept = None


def _images(inputs: Any) -> tuple[Tensor, Channels | None]:
    if isinstance(inputs, Tensor):
        return inputs, None
    if isinstance(inputs, Mapping) and isinstance(inputs.get("x"), Tensor):
        return inputs["x"], inputs.get("channels")
    if isinstance(inputs, tuple) and 1 <= len(inputs) <= 2 and isinstance(inputs[0], Tensor):
        return inputs[0], inputs[1] if len(inputs) == 2 else None
    raise TypeError(
        "SampleChannels takes images (B, n, H, W), a pair (images, channels), or a mapping with 'x' and perhaps "
        f"'channels'; got {type(inputs).__name__}{sorted(inputs) if isinstance(inputs, Mapping) else ''}"
    )


def _like(inputs: Any, x: Tensor, ids: Tensor, *, named: bool) -> Any:
    """Inputs of the same form; with ids wherever channels may be missing (``named``)."""
    if isinstance(inputs, Mapping):
        return {**inputs, "x": x, **({"channels": ids} if named else {})}
    if named:
        return (x, ids)
    return x if isinstance(inputs, Tensor) else (x, *inputs[1:])
