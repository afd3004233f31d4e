"""Pretraining with the paper's schedules, that can be interrupted: learning rate, weight decay, momentum."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from regularized.mechanisms.ranges import allowed, at_least, count, positive
from regularized.self_supervised.t_jepa.model import TJEPA
from regularized.self_supervised.t_jepa.report import CollapseReport, collapse_report, warn_of_collapse
from regularized.self_supervised.t_jepa.schedule import cosine_value, warmup_cosine
from regularized.training.data import as_source
from regularized.training.optimizers import Optimizers
from regularized.training.procedure import Epochs, Part, fit_epochs
from regularized.training.progress import Progress
from regularized.training.state import restore, state_of
from regularized.training.step import Batch

__all__ = ["TJEPATraining"]

_STATE = ("jepa", "optimizers", "epochs")


class TJEPATraining:
    """AdamW on the loss of :class:`TJEPA`: warm-up and cosine of the rate, cosine of the weight decay.

    Value i of a schedule holds for step i. The official code steps its schedules behind the optimizer, so that its very
    first update has torch's defaults, rate 1e-3 and decay 1e-2, whatever is asked for.

    Args:
        jepa: what is trained; its ``total_steps`` is the length of the schedules.
        lr: rate behind the warm-up; default 1e-4 (official parser; the run on Jannis has 3.7e-4).
        start_lr: rate of the first step; default 0 (the authors' runs).
        final_lr: rate at the end; default 0 (the same).
        warmup: steps of the rise; default a thirtieth of all (10 of 300 epochs on Jannis).
        weight_decay: at the first step; default 1e-5 (official parser).
        final_weight_decay: at the end; default 1e-2 (the same).
        seed: of order and dropout; default 0.

    Attributes:
        jepa: the networks.
        optimizers: the optimizer, see :class:`~regularized.training.optimizers.Optimizers`.

    Raises:
        ValueError: a setting is outside its range.

    Examples:
        >>> from regularized.self_supervised.t_jepa import TabularTransformer, TargetPredictor
        >>> from regularized.training.data import TensorData
        >>> encoder = TabularTransformer(range(6), dim=8, depth=1, heads=2, feedforward=16)
        >>> predictor = TargetPredictor(7, 8, dim=4, heads=2, feedforward=8)
        >>> training = TJEPATraining(TJEPA(encoder, predictor, total_steps=8), lr=1e-3)
        >>> losses = training.fit(TensorData(torch.rand(40, 6), batch_size=10), epochs=2)
        >>> len(losses), training.report(torch.rand(20, 6)).variance < 1
        (2, True)
    """

    @allowed(
        lr=positive(),
        start_lr=at_least(0.0),
        final_lr=at_least(0.0),
        warmup=count(0, "steps").or_none("a thirtieth of all steps"),
        weight_decay=at_least(0.0),
        final_weight_decay=at_least(0.0),
    )
    def __init__(
        self,
        jepa: TJEPA,
        *,
        lr: float = 1e-4,
        start_lr: float = 0.0,
        final_lr: float = 0.0,
        warmup: int | None = None,
        weight_decay: float = 1e-5,
        final_weight_decay: float = 1e-2,
        seed: int = 0,
    ) -> None:
        self.jepa = jepa
        self.rates: tuple[float, float, float] = (start_lr, lr, final_lr)
        self.decays: tuple[float, float] = (weight_decay, final_weight_decay)
        self.warmup: int = jepa.total_steps // 30 if warmup is None else warmup
        self.device: torch.device = next(jepa.parameters()).device
        fused = self.device.type in ("cpu", "cuda")
        # Rate 1 here, so that the factor of the schedule is the rate itself.
        optimizer = torch.optim.AdamW(jepa.param_groups(weight_decay), lr=1.0, fused=fused)
        self.optimizers: Optimizers = Optimizers([optimizer], schedule=self._rate, names=["the pretraining"])
        self.epochs: Epochs = Epochs(seed)

    def _rate(self, progress: Progress) -> float:
        start, peak, final = self.rates
        total = self.jepa.total_steps
        return warmup_cosine(progress.step, warmup=self.warmup, total=total, peak=peak, start=start, final=final)

    def training_step(self, batch: Any, *, progress: Progress | None = None) -> Tensor:
        """One step on a batch of rows.

        Args:
            batch: (B, D) rows, alone or with labels that are not looked at; see
                :meth:`regularized.training.step.Batch.of`.
            progress: position for the schedules; default the steps done.

        Returns:
            The loss, detached.

        Raises:
            NonFiniteLoss: loss or gradient is not finite.
        """
        step = self.optimizers.steps[0]
        where = Progress(step, self.jepa.total_steps, self.epochs.done) if progress is None else progress
        rows = Batch.of(batch).inputs.to(self.device, non_blocking=True)
        self.jepa.train()
        optimizer = self.optimizers[0]
        start, final = self.decays
        optimizer.param_groups[0]["weight_decay"] = cosine_value(
            where.step, total=self.jepa.total_steps, start=start, final=final
        )
        loss: Tensor = self.jepa(rows)
        optimizer.zero_grad()
        loss.backward()
        self.jepa.before_step()
        self.optimizers.step(0, progress=where, loss=loss)
        self.jepa.after_step()
        return loss.detach()

    def fit(
        self,
        data: Any,
        *,
        epochs: int,
        after_epoch: Callable[["TJEPATraining"], object] | None = None,
        after_step: Callable[["TJEPATraining"], object] | None = None,
    ) -> list[float]:
        """Train until ``epochs`` epochs are done in all; restored by :meth:`load_state_dict` it goes on exactly.

        Args:
            data: what :func:`~regularized.training.data.as_source` takes: ``TensorData``, a ``DataLoader``, batches.
            epochs: epochs in all.
            after_epoch: called with this object after each epoch.
            after_step: called with this object after each step.

        Returns:
            Mean loss of each epoch of this call.

        Raises:
            ValueError: the data are empty or of unknown length, or hold rows that the encoder cannot take.

        Warns:
            UserWarning: the epochs have more steps than ``total_steps``.
        """
        source = as_source(data, seed=self.epochs.seed)
        if len(source) * epochs > self.jepa.total_steps:
            warnings.warn(
                f"{epochs} epochs of {len(source)} steps are more than total_steps={self.jepa.total_steps}: behind it "
                "the rate is final_lr and the average stands still",
                stacklevel=2,
            )
        return fit_epochs(
            self,
            [Part(source, self.training_step)],
            until=epochs,
            record=lambda means: float(means[0]),
            after_epoch=after_epoch,
            after_step=after_step,
        )

    def report(self, x: Tensor) -> CollapseReport:
        """Look at the embeddings of some rows, without the tokens that belong to no column.

        Args:
            x: (N, D), a thousand rows are plenty.

        Warns:
            CollapseWarning: they have collapsed, and the warm-up is over.
        """
        report = collapse_report(self.jepa.embed(x.to(self.device)))
        if self.optimizers.steps[0] > self.warmup:
            warn_of_collapse(report)
        return report

    def state_dict(self) -> dict[str, Any]:
        """Networks, optimizer, masks and position."""
        return state_of(self, *_STATE)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state of :meth:`state_dict`.

        Raises:
            ValueError: it belongs to another training.
        """
        restore(self, state, *_STATE)
