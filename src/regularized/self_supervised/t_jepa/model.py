"""Both encoders, the predictor and the masks as one module: rows to a loss."""

import warnings
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from regularized.mechanisms.ema import EMA
from regularized.mechanisms.patches import take
from regularized.mechanisms.ranges import Choice, allowed, count, positive, share
from regularized.self_supervised.t_jepa.layer import TabularTransformer, TargetPredictor
from regularized.self_supervised.t_jepa.loss import prediction_loss
from regularized.self_supervised.t_jepa.masks import MaskSizes, draw_masks
from regularized.self_supervised.t_jepa.report import CollapseWarning
from regularized.self_supervised.t_jepa.schedule import average_momentum

__all__ = ["TJEPA"]

_MOMENTUM = share()


@dataclass(frozen=True, slots=True)
class _Momentum:
    start: float
    final: float
    total: int

    def __call__(self, update: int) -> float:
        return average_momentum(update - 1, total=self.total, start=self.start, final=self.final)


class TJEPA(nn.Module):
    """Pretraining of an encoder on rows without labels.

    A step: the averaged encoder represents the whole row, the encoder the context alone, once; the predictor is asked
    for each of the K targets. In a loop of one's own::

        loss = jepa(x)
        loss.backward()
        jepa.before_step()   # clamps the encoder's gradients
        optimizer.step()
        optimizer.zero_grad()
        jepa.after_step()    # moves the average

    :class:`TJEPATraining` does this with the schedules. It costs, in forward passes of the encoder on all tokens, one
    for the average, 3 (R + n_c) / (R + D) for the context, and the predictor; and the memory of the encoder once more.

    Not for tables of a few hundred rows or nearly linear ones, where it was no better than the plain columns, nor
    without a look at :func:`collapse_report`.

    Args:
        encoder: is trained; afterwards :meth:`embed`, or the encoder itself in a :class:`RowClassifier`.
        predictor: of ``encoder``'s tokens and width.
        sizes: of context and target; default ``MaskSizes.of_shares(D)``.
        num_targets: K, targets of a row in a step; default 4 (the authors' runs).
        momentum: share of the average that stays, at the first and behind the last of ``total_steps`` updates; default
            (0.996, 1.0) (official).
        total_steps: updates of the whole training.
        clip: bound on each entry of the encoder's gradients, or None; default 1 (official; the predictor's are free).
        reg_mode: ``"paper"`` (default): tokens of no column are always context, never target. ``"official"``: as in the
            released code, where indices are not shifted by them: they are hidden like a column, and the last R columns
            never occur.
        repeat_targets: see :func:`draw_masks`; default False.
        seed: of the masks.

    Attributes:
        target: the averaged encoder, an :class:`~regularized.mechanisms.ema.EMA` in evaluation mode.
        generator: of the masks, on the CPU.

    Raises:
        ValueError: a setting is outside its range, or encoder, predictor and sizes do not fit each other.

    Warns:
        CollapseWarning: the encoder has no token that belongs to no column.

    Examples:
        >>> encoder = TabularTransformer(range(6), dim=8, depth=1, heads=2, feedforward=16)
        >>> jepa = TJEPA(encoder, TargetPredictor(7, 8, dim=4, heads=2, feedforward=8), total_steps=10)
        >>> x = torch.rand(5, 6)
        >>> jepa(x).shape, jepa.embed(x).shape
        (torch.Size([]), torch.Size([5, 6, 8]))
    """

    @allowed(
        num_targets=count(1),
        total_steps=count(1),
        clip=positive().or_none("gradients as they are"),
        reg_mode=Choice("paper", "official"),
    )
    def __init__(
        self,
        encoder: TabularTransformer,
        predictor: TargetPredictor,
        *,
        total_steps: int,
        sizes: MaskSizes | None = None,
        num_targets: int = 4,
        momentum: tuple[float, float] = (0.996, 1.0),
        clip: float | None = 1.0,
        reg_mode: Literal["paper", "official"] = "paper",
        repeat_targets: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value in zip(("momentum[0]", "momentum[1]"), momentum, strict=True):
            _MOMENTUM(name, value)
        tokens = encoder.reg_tokens + encoder.num_columns
        self.sizes: MaskSizes = MaskSizes.of_shares(encoder.num_columns) if sizes is None else sizes
        if self.sizes.tokens != encoder.num_columns:
            raise ValueError(f"sizes are of {self.sizes.tokens} columns, the encoder has {encoder.num_columns}")
        if len(predictor.positions) != tokens or predictor.embed.in_features != encoder.dim:
            raise ValueError(
                f"the predictor is of {len(predictor.positions)} tokens of width {predictor.embed.in_features}, the "
                f"encoder gives {tokens} of width {encoder.dim}: TargetPredictor({tokens}, {encoder.dim}, ...)"
            )
        if encoder.reg_tokens == 0:
            warnings.warn(
                "reg_tokens=0: by the paper, representations collapse without a token that belongs to no column; watch "
                "collapse_report",
                CollapseWarning,
                stacklevel=3,
            )
        self.encoder = encoder
        self.predictor = predictor
        self.target: EMA = EMA(encoder, decay=_Momentum(*momentum, total_steps))
        self.target.eval()
        self.num_targets = num_targets
        self.total_steps = total_steps
        self.clip = clip
        self.reg_mode = reg_mode
        self.repeat_targets = repeat_targets
        self.generator: torch.Generator = torch.Generator().manual_seed(seed)
        self._warned_of_steps = False

    def train(self, mode: bool = True) -> Self:
        """As of any module; the averaged encoder stays in evaluation mode."""
        super().train(mode)
        self.target.eval()
        return self

    def draw(self, rows: int, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
        """Positions (B, S) that the encoder sees and (K, B, n_t) that are predicted, among all R + D tokens.

        Args:
            rows: B.
            device: of the result.
        """
        context, targets = draw_masks(
            rows,
            self.sizes.tokens,
            self.sizes.draw(self.generator),
            num_targets=self.num_targets,
            generator=self.generator,
            repeat_targets=self.repeat_targets,
            device=device,
        )
        reg = self.encoder.reg_tokens
        if self.reg_mode == "official" or reg == 0:
            return context, targets
        always = torch.arange(reg, device=context.device).expand(rows, reg)
        return torch.cat([always, context + reg], dim=1), targets + reg

    def forward(self, x: Tensor) -> Tensor:
        """Rows (B, D) to the loss, with fresh masks."""
        return self.loss(x, *self.draw(len(x), x.device))

    def loss(self, x: Tensor, context: Tensor, targets: Tensor) -> Tensor:
        """The loss with given masks.

        Args:
            x: (B, D).
            context: (B, S) positions.
            targets: (K, B, n_t) positions.

        Returns:
            Scalar; it reaches encoder and predictor, never the average.
        """
        predicted = self.predictor(self.encoder(x, context), context, targets)
        return prediction_loss(predicted, self.wanted(x, targets))

    @torch.no_grad()
    def wanted(self, x: Tensor, targets: Tensor) -> Tensor:
        """(K, B, n_t, h): what the averaged encoder says at the targets, having seen the whole row."""
        sets, rows, size = targets.shape
        chosen: Tensor = take(self.target(x), targets.transpose(0, 1).reshape(rows, -1))
        return chosen.view(rows, sets, size, -1).transpose(0, 1)

    def before_step(self) -> None:
        """Clamp each entry of the encoder's gradients; call it between ``backward`` and ``optimizer.step``."""
        if self.clip is None:
            return
        gradients = [p.grad for p in self.encoder.parameters() if p.grad is not None]
        torch._foreach_clamp_min_(gradients, -self.clip)
        torch._foreach_clamp_max_(gradients, self.clip)

    def after_step(self) -> None:
        """Move the average towards the encoder; call it after ``optimizer.step``.

        Warns:
            UserWarning: more updates than ``total_steps``, with the last momentum, which by default moves nothing.
        """
        if self.target.updates >= self.total_steps and not self._warned_of_steps:
            self._warned_of_steps = True
            warnings.warn(
                f"after_step was called more often than total_steps={self.total_steps}; the momentum stays at its last "
                "value. Give the number of steps of the whole training",
                stacklevel=2,
            )
        self.target.update(self.encoder)

    @torch.no_grad()
    def embed(self, x: Tensor, *, with_reg: bool = False) -> Tensor:
        """Represent rows by the averaged encoder; waits for the device.

        Args:
            x: (B, D).
            with_reg: the R tokens that belong to no column, too, in front; default False.

        Returns:
            (B, D, h), in the order of ``encoder.tokenizer.columns``; (B, R + D, h) with them.

        Raises:
            ValueError: see :meth:`ColumnTokenizer.check`.
        """
        self.encoder.tokenizer.check(x)
        out: Tensor = self.target(x)
        return out if with_reg else out[:, self.encoder.reg_tokens :]

    def param_groups(self, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """Encoder and predictor for an optimizer: matrices with decay, biases and other vectors without.

        Args:
            weight_decay: of the first group.
        """
        trained = [*self.encoder.parameters(), *self.predictor.parameters()]
        return [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
