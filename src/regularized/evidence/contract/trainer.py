"""Checks of terms in :class:`~regularized.training.trainer.Trainer`: what only the real loop can get wrong."""

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import nn

from regularized.evidence.contract.loop import BATCH, EPOCHS, SAMPLES, distance
from regularized.evidence.contract.subjects import Subject
from regularized.evidence.contract.trainer_processes import check_fsdp2, check_trainer_processes
from regularized.evidence.contract.trainer_runs import Moment, interrupted_run, whole_run
from regularized.training.data import TensorData
from regularized.training.options import Checkpoints
from regularized.training.trainer import Trainer

__all__ = ["TRAINER_CHECKS"]

_INTERRUPTIONS: tuple[tuple[Moment, int], ...] = (
    ("forward", 1),
    ("before_step", 1),
    ("before_step", 4),
)
"""Where in a step, and in which: in the first epoch, which has no checkpoint yet, and in the second."""


def check_resume(subject: Subject) -> None:
    """Interrupted in the middle of an epoch and resumed from its checkpoint, training ends bit for bit the same."""

    def build(folder: Path | None) -> tuple[nn.Module, Trainer, TensorData]:
        torch.manual_seed(0)
        model = subject.model()
        tensors = subject.data(SAMPLES, 0)
        trainer = Trainer(
            model,
            terms=subject.terms(),
            optimizer=subject.optimizer,
            checkpoints=None if folder is None else Checkpoints(folder, every=1),
        )
        return model, trainer, TensorData(tensors["inputs"], tensors["targets"], batch_size=BATCH, seed=3)

    whole, trainer, data = build(None)
    trainer.fit(data, epochs=EPOCHS)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _, first, data = build(folder)
        first.fit(data, epochs=EPOCHS, max_steps=SAMPLES // BATCH + 1)
        resumed, second, data = build(folder)
        second.fit(data, epochs=EPOCHS, resume=True)
    apart = distance(dict(whole.named_parameters()), dict(resumed.named_parameters()))
    assert apart == 0.0, f"the resumed run differs by {apart:.3g}"


def check_interrupted(subject: Subject) -> None:
    """Interrupted inside a step, also before the first checkpoint, the same Trainer goes on to bit for bit the same."""
    whole = whole_run(subject)
    for moment, at in _INTERRUPTIONS:
        with tempfile.TemporaryDirectory() as folder:
            resumed = interrupted_run(subject, Path(folder), moment=moment, at=at)
        assert whole.keys() == resumed.keys()
        differing = [name for name, tensor in whole.items() if not torch.equal(tensor, resumed[name])]
        assert not differing, f"interrupted in step {at}, at {moment!r}: {differing} end elsewhere"


TRAINER_CHECKS: Mapping[str, Callable[[Subject], None]] = {
    "resume": check_resume,
    "interrupted": check_interrupted,
    "trainer_processes": check_trainer_processes,
    "fsdp2": check_fsdp2,
}
