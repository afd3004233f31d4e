"""Identity seeking as a pretext: an encoder, and the contrast of two frames."""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor, nn

from regularized.self_supervised.identity_seeking.loss import InterFrameContrastive
from regularized.training.progress import Coefficient, Progress, Schedule, as_schedule

__all__ = ["IdentitySeeking", "Sought"]


class Sought(NamedTuple):
    """Scalars of a step.

    Attributes:
        loss: what is minimised.
        reliability: mean probability of the matched pairs.
    """

    loss: Tensor
    reliability: Tensor


class IdentitySeeking(nn.Module):
    """What :class:`~regularized.self_supervised.pretraining.Pretraining` trains on batches of :class:`FramePairs`.

    Args:
        encoder: crops to (n, d) features. It is all that is kept afterwards.
        contrast: default :class:`InterFrameContrastive` with its defaults.
        q: how much reliability counts, a number or a function of progress; default that of ``contrast``. From random
            weights all pairs are unreliable and gradients with q = 1 are small: ``piecewise({0.2: 1.0}, initial=0.0)``
            begins with plain InfoNCE.

    Raises:
        TypeError: ``q`` is neither a number nor a function.

    Examples:
        >>> import torch
        >>> pretext = IdentitySeeking(nn.Linear(4, 2))
        >>> batch = {"first": torch.randn(3, 4), "second": torch.randn(5, 4)}
        >>> pretext(batch, Progress(0, 10)).loss.shape
        torch.Size([])
    """

    def __init__(
        self, encoder: nn.Module, contrast: InterFrameContrastive | None = None, *, q: Coefficient | None = None
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.contrast = contrast or InterFrameContrastive()
        self.q: Schedule = as_schedule(self.contrast.q if q is None else q, name="q")

    def forward(self, inputs: Mapping[str, Tensor], progress: Progress) -> Sought:
        """The contrast of one batch.

        Args:
            inputs: ``first`` and ``second``, crops of two frames; ``group_a`` and ``group_b``, their videos.
            progress: position in the training.
        """
        self.contrast.q = self.q(progress)
        first, second = self.encoder(inputs["first"]), self.encoder(inputs["second"])
        out = self.contrast(first, second, inputs.get("group_a"), inputs.get("group_b"))
        reliability = out.reliability.mean() if len(out.reliability) else out.loss.detach()
        return Sought(out.loss, reliability)
