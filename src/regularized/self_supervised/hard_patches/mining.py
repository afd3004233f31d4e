"""Hard patches mining: a slow copy of the model chooses what is hidden, and more and more of it.

:mod:`regularized.self_supervised.hard_patches.loss` has the symbols.
"""

import warnings
from dataclasses import dataclass
from typing import NamedTuple, Self, cast

import torch
from torch import Tensor, nn

from regularized.mechanisms.ema import EMA
from regularized.mechanisms.patches import Split, random_split
from regularized.mechanisms.ranges import allowed, at_least, count, share
from regularized.self_supervised.hard_patches.autoencoder import MaskedAutoencoder
from regularized.self_supervised.hard_patches.loss import absolute_loss, reconstruction_losses, relative_loss
from regularized.self_supervised.hard_patches.masking import HARD, hard_patch_split, hidden_patches
from regularized.training.progress import Coefficient, Progress, Schedule, as_schedule, is_always, linear

__all__ = ["HardPatchMining", "Mined", "epoch_decay"]

EASY_TO_HARD = linear(0.0, 0.5, unit="epoch")
"""The official share of hard patches: ``0.5 (e + 1) / E`` in epoch e of E."""


class Mined(NamedTuple):
    """The losses of a batch."""

    loss: Tensor
    """Scalar with its graph: ``reconstruction + weight * ranking``."""
    reconstruction: Tensor
    """Scalar, detached."""
    ranking: Tensor
    """Scalar, detached: the loss of the loss predictor; 0 where there is none."""
    split: Split
    """What was visible and what hidden."""


@dataclass(frozen=True, slots=True)
class _EpochDecay:
    start: float
    end: float
    epochs: int

    def __call__(self, progress: Progress) -> float:
        return self.start + min(progress.epoch / self.epochs, 1.0) * (self.end - self.start)


@allowed(start=share(), end=share(), epochs=count(1))
def epoch_decay(start: float = 0.999, end: float = 0.9999, *, epochs: int = 100) -> Schedule:
    """The decay of the copy rises in a straight line over the first epochs and stays there.

    Defaults: the official code, whatever the length of the training. With few steps the copy of such a decay hardly
    leaves its start; take one that forgets within an epoch or two.

    Args:
        start: decay in the first epoch, in [0, 1].
        end: decay from epoch ``epochs`` on, in [0, 1].
        epochs: over which it rises.

    Raises:
        ValueError: an option outside its range.

    Examples:
        >>> rule = epoch_decay()
        >>> [round(rule(Progress(0, 1, epoch=e, total_epochs=200)), 5) for e in (0, 50, 150)]
        [0.999, 0.99945, 0.9999]
    """
    return _EpochDecay(start, end, epochs)


class HardPatchMining(nn.Module):
    """A masked autoencoder and its slow copy as one loss, for a loop of your own.

    The copy looks at the whole image, and a share of the hidden patches are those that it expects to be hardest. While
    that share comes to less than one patch the copy does not run. Give the optimizer
    ``model.parameters()``, and call :meth:`after_step` behind each of its steps (not behind each of several
    accumulated batches). Such a loop is :class:`~regularized.self_supervised.pretraining.Pretraining`. Afterwards keep
    ``model.encoder``.

    Costs the copy's forward pass on whole images and a second decoder: 2.3 times a masked autoencoder's step for
    ViT-B by a count of operations, 1.8 with ``predictor_depth=2``.

    Not for short runs of small networks, where it made the representation no better (see the page), nor where time
    is the limit rather than epochs.

    Args:
        model: the autoencoder, with a loss predictor; for ``hard=0`` and ``weight=0`` it may have none.
        mask_ratio: gamma, in (0, 1); default 0.75 (official).
        hard: alpha_t in [0, 1], share of the hidden patches that is chosen; a number or a function of
            :class:`~regularized.training.progress.Progress`. Default: from 0 to 0.5 in a straight line over the epochs
            (official).
        relative: learn the order of the losses (default, official), or their standardised values.
        weight: of the loss predictor's loss, >= 0; default 1 (official).
        decay: share of the copy that stays in a step, in [0, 1]; a number or a function of ``Progress``. Default
            :func:`epoch_decay` (official).
        eps: see :func:`~regularized.self_supervised.hard_patches.relative_loss`.
        generator: draws the masks, on the device of the images; default None, the device's global one.

    Attributes:
        model: the autoencoder that is trained.
        teacher: its slow copy, an :class:`~regularized.mechanisms.ema.EMA`, always in evaluation mode; part of the
            ``state_dict``.

    Raises:
        ValueError: a setting outside its range, a model without the loss predictor that is asked for, or a ratio that
            leaves nothing to see or nothing to predict; at a call, a position behind the end of the training, images
            of another size, or on the CPU scores that are not finite.
        TypeError: ``model`` is no :class:`MaskedAutoencoder`, or the progress no ``Progress``.

    Warns:
        UserWarning: :meth:`after_step` is called before the optimizer's step.

    Examples:
        >>> from regularized.self_supervised.hard_patches.encoder import PatchTransformer
        >>> encoder = PatchTransformer(16, patch_size=4, channels=1, width=32, depth=2, heads=4)
        >>> model = MaskedAutoencoder(encoder, decoder_width=16, decoder_depth=1, decoder_heads=4)
        >>> mining = HardPatchMining(model, decay=0.99)
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.05)
        >>> batches = torch.randn(8, 1, 16, 16).split(4)
        >>> for epoch in range(3):
        ...     for number, images in enumerate(batches):
        ...         progress = Progress(2 * epoch + number, 6, epoch, 3)
        ...         mining(images, progress).loss.backward()
        ...         optimizer.step()
        ...         optimizer.zero_grad()
        ...         mining.after_step(progress)
    """

    @allowed(
        hard=HARD.or_schedule(),
        weight=at_least(0.0, remedy="0 trains no loss predictor"),
        decay=share().or_schedule().or_none("the official rule"),
    )
    def __init__(
        self,
        model: MaskedAutoencoder,
        *,
        mask_ratio: float = 0.75,
        hard: Coefficient = EASY_TO_HARD,
        relative: bool = True,
        weight: float = 1.0,
        decay: Coefficient | None = None,
        eps: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(model, MaskedAutoencoder):
            raise TypeError(
                f"model must be a MaskedAutoencoder, which gives a loss for each patch; got {type(model).__name__}"
            )
        self._hidden = hidden_patches(model.patches, mask_ratio)
        if model.predictor is None and not (weight == 0 and is_always(hard, 0.0)):
            raise ValueError(
                "the model has no loss predictor, which hard patches and their ranking need; build it with "
                "predictor_depth of 1 or more, or say hard=0 and weight=0 for a plain MAE"
            )
        self.model = model
        self.mask_ratio = mask_ratio
        self.hard: Schedule = as_schedule(hard, name="hard")
        self.relative = relative
        self.weight = weight
        self.decay: Schedule = as_schedule(epoch_decay() if decay is None else decay, name="decay")
        self.eps = eps
        self.generator = generator
        self.teacher: EMA | None = None if is_always(hard, 0.0) else EMA(model, decay=1.0)
        self._version = -1  # of the weights at the last call; see after_step
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Set the mode of the model; the slow copy stays in evaluation mode."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def choose(self, images: Tensor, progress: Progress) -> Split:
        """What to hide of a batch at a position of the training; the same number of patches of each image.

        Args:
            images: (B, C, H, W).
            progress: position in the training.
        """
        if not isinstance(progress, Progress):
            raise TypeError(f"progress must be a Progress, which says epoch and total_epochs; got {progress!r}")
        if progress.epoch >= progress.total_epochs:
            raise ValueError(
                f"epoch {progress.epoch} of {progress.total_epochs} is behind the end, where no share of hard patches "
                "is defined; epochs are counted from 0, and total_epochs is the length of the whole training"
            )
        hard = self.hard(progress)
        HARD("hard", hard)
        # Known on the host: no look at the device, and no pass of the copy, while nothing is to be chosen.
        if int(self._hidden * hard) == 0:
            patches = self.model.patches
            return random_split(len(images), patches, self._hidden, generator=self.generator, device=images.device)
        assert self.teacher is not None
        copy = cast(MaskedAutoencoder, self.teacher.module)
        with torch.no_grad():
            scores = copy.scores(images)
        return hard_patch_split(scores, mask_ratio=self.mask_ratio, hard=hard, generator=self.generator)

    def forward(self, images: Tensor, progress: Progress) -> Mined:
        """Losses of a batch.

        Args:
            images: (B, C, H, W), normalised.
            progress: position in the training, for the share of hard patches.
        """
        self._version = self.model.mask_token._version
        split = self.choose(images, progress)
        out = self.model(images, split)
        difficulty = reconstruction_losses(out.patches, self.model.targets(images, split))
        reconstruction = difficulty.mean()
        if self.weight == 0 or out.predicted is None:
            return Mined(reconstruction, reconstruction.detach(), reconstruction.new_zeros(()), split)
        if self.relative:
            ranking = relative_loss(out.predicted, difficulty, eps=self.eps)
        else:
            ranking = absolute_loss(out.predicted, difficulty)
        return Mined(reconstruction + self.weight * ranking, reconstruction.detach(), ranking.detach(), split)

    def after_step(self, progress: Progress) -> None:
        """Move the slow copy; call it behind each step of the optimizer.

        Args:
            progress: that of the step, for the decay.

        Warns:
            UserWarning: the weights are those of the last call, so that the copy would follow one step late.
        """
        if self.model.mask_token._version == self._version:
            warnings.warn(
                "after_step was called, but the weights have not changed since the last loss: call it behind the "
                "optimizer's step (a step that a gradient scaler skips needs no call)",
                stacklevel=2,
            )
        if self.teacher is not None:
            self.teacher.decay = self.decay(progress)
            self.teacher.update(self.model)

    def extra_repr(self) -> str:
        """Settings, for ``repr``."""
        return f"mask_ratio={self.mask_ratio}, relative={self.relative}, weight={self.weight}"
