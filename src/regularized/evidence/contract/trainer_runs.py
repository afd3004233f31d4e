"""A subject trained by the real loop: whole, in several processes, or interrupted in the middle of a step."""

from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from regularized.evidence.contract.loop import BATCH, EPOCHS, SAMPLES
from regularized.evidence.contract.subjects import Subject, Terms
from regularized.training.data import TensorData
from regularized.training.options import Checkpoints, Compute
from regularized.training.sharded import gathered
from regularized.training.terms import Term
from regularized.training.trainer import Trainer

__all__ = ["Moment", "State", "apart", "final_state", "interrupted_run", "whole_run"]

Moment: TypeAlias = Literal["transform", "forward", "before_step", "after_step"]
State: TypeAlias = dict[str, Tensor]

COMPUTE = Compute()
NONE: Terms = {}


class _Interruption(Exception):
    """What a person does who presses Ctrl-C."""


class _Interrupt(Term):
    """Stops the training once, at a moment of an optimizer step; adds nothing to the loss."""

    def __init__(self, moment: Moment, at: int) -> None:
        super().__init__()
        self.contributes = moment == "forward"
        self._steps = -1  # the number of the present step
        self._at: int | None = at
        if moment == "transform":
            self.transform = self._batch
        elif moment != "forward":
            setattr(self, moment, self._stop)

    def _batch(self, batch: Any) -> Any:
        self._steps += 1
        if self._steps == self._at:
            self._raise()
        return batch

    def _stop(self, step: Any) -> None:
        if step.progress.step == self._at:
            self._raise()

    def forward(self, step: Any) -> Tensor:
        """Zero, without a gradient."""
        self._stop(step)
        return torch.zeros(())

    def _raise(self) -> None:
        self._at = None
        raise _Interruption


def whole_run(
    subject: Subject,
    *,
    samples: int = SAMPLES,
    batch_size: int = BATCH,
    epochs: int = EPOCHS,
    compute: Compute = COMPUTE,
    also: Terms = NONE,
    loss_scale: float | None = None,
) -> State:
    """Train without interruption: one process, or as one of several whose launcher's variables are set.

    Args:
        subject: model, terms, data and optimizer.
        samples: how many; one more than a multiple of the batch size leaves a last batch of one.
        batch_size: of all processes together.
        epochs: how often it sees them.
        compute: device, precision and sharding.
        also: further terms.
        loss_scale: the first one of fp16; default torch's.

    Returns:
        Parameters, buffers and the state of the terms at the end, by name.
    """
    trainer, data = _build(subject, {**subject.terms(), **also}, None, samples, batch_size, compute)
    if trainer.scaler is not None and loss_scale is not None:
        trainer.scaler.start_at(loss_scale)
    trainer.fit(data, epochs=epochs)
    return final_state(trainer)


def interrupted_run(subject: Subject, folder: Path, *, moment: Moment, at: int) -> State:
    """Interrupt a run inside an optimizer step, and let the same ``Trainer`` go on with ``resume=True``.

    What terms keep outside their state in the middle of a step (an open hook, a width that is drawn) must not reach the
    run that goes on: that is what the moment ``reset`` is for. Ends equal, bit for bit, to :func:`whole_run`.

    Args:
        subject: model, terms, data and optimizer.
        folder: of the checkpoints; they are written at the start, and at the ends of epochs.
        moment: where in the step.
        at: number of the step, from 0. Before the end of the first epoch the run starts over.

    Returns:
        The state at the end, as of :func:`whole_run`.
    """
    stop = {"interrupt": _Interrupt(moment, at)}
    # First among the terms, so that the others are left as they are before their own moment; but after their losses
    # and transforms, which are what opens something.
    terms = {**subject.terms(), **stop} if moment in ("transform", "forward") else {**stop, **subject.terms()}
    trainer, data = _build(subject, terms, folder, SAMPLES, BATCH)
    try:
        trainer.fit(data, epochs=EPOCHS)
    except _Interruption:
        trainer.fit(data, epochs=EPOCHS, resume=True)
    else:
        raise ValueError(f"step {at} was never reached: the run has {EPOCHS * SAMPLES // BATCH} steps")
    return final_state(trainer)


def final_state(trainer: Trainer) -> State:
    """Parameters, buffers and the tensors that the terms remember, as whole copies by name."""
    tensors: dict[str, Any] = {**trainer.model.state_dict()}
    tensors |= {f"terms.{name}": value for name, value in trainer.objective.terms.state_dict().items()}
    return {name: value.clone() for name, value in gathered(tensors).items() if isinstance(value, Tensor)}


def apart(ours: State, theirs: State) -> tuple[float, str]:
    """The largest difference of two entries, and its name.

    Raises:
        AssertionError: they hold different things.
    """
    assert ours.keys() == theirs.keys(), f"they hold different things: {sorted(ours.keys() ^ theirs.keys())}"
    differences = {
        name: float((tensor.double() - theirs[name].double()).abs().nan_to_num(torch.inf).max())
        for name, tensor in ours.items()
        if tensor.numel()
    }
    worst = max(differences, key=lambda name: differences[name])
    return differences[worst], worst


def _build(
    subject: Subject, terms: Terms, folder: Path | None, samples: int, batch_size: int, compute: Compute = COMPUTE
) -> tuple[Trainer, TensorData]:
    torch.manual_seed(0)
    model: nn.Module = subject.model()
    tensors = subject.data(samples, 0)
    checkpoints = None if folder is None else Checkpoints(folder)
    trainer = Trainer(model, terms=terms, optimizer=subject.optimizer, checkpoints=checkpoints, compute=compute)
    return trainer, TensorData(tensors["inputs"], tensors["targets"], batch_size=batch_size, seed=3)
