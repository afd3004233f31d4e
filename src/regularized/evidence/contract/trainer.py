"""Checks of terms in :class:`~regularized.training.trainer.Trainer`: what only the real loop can get wrong."""

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import nn

from regularized.evidence.contract.loop import BATCH, EPOCHS, SAMPLES, distance
from regularized.evidence.contract.subjects import Subject
from regularized.training.data import TensorData
from regularized.training.options import Checkpoints
from regularized.training.trainer import Trainer

__all__ = ["TRAINER_CHECKS"]


def _build(subject: Subject, folder: Path | None) -> tuple[nn.Module, Trainer, TensorData]:
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


def check_resume(subject: Subject) -> None:
    """Interrupted in the middle of an epoch and resumed from its checkpoint, training ends bit for bit the same."""
    whole, trainer, data = _build(subject, None)
    trainer.fit(data, epochs=EPOCHS)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _, first, data = _build(subject, folder)
        first.fit(data, epochs=EPOCHS, max_steps=SAMPLES // BATCH + 1)
        resumed, second, data = _build(subject, folder)
        second.fit(data, epochs=EPOCHS, resume=True)
    apart = distance(dict(whole.named_parameters()), dict(resumed.named_parameters()))
    assert apart == 0.0, f"the resumed run differs by {apart:.3g}"


TRAINER_CHECKS: Mapping[str, Callable[[Subject], None]] = {"resume": check_resume}
