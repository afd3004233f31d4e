"""Checks of terms in :class:`~regularized.training.trainer.Trainer`: what only the real loop can get wrong."""

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from regularized.evidence.contract.loop import BATCH, EPOCHS, SAMPLES, distance
from regularized.evidence.contract.subjects import NotApplicable, Subject
from regularized.evidence.contract.trainer_runs import Moment, interrupted_run, whole_run
from regularized.evidence.processes import run_launched
from regularized.mechanisms.distributed import leave_process_group
from regularized.training.data import TensorData
from regularized.training.options import Checkpoints
from regularized.training.step import Batch, call_model
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


def check_trainer_processes(subject: Subject) -> None:
    """The Trainer in two processes, with a last batch of one sample, ends where one process does."""
    refusal = _refusal_of_nothing(subject)
    _compare_processes(subject, samples=2 * BATCH + 1 if refusal is None else 2 * BATCH + 2)
    if refusal is not None:
        raise NotApplicable(
            f"the model takes no batch without samples ({refusal}); with one for each process they agree"
        )


def _refusal_of_nothing(subject: Subject) -> str | None:
    """What the model says to a batch without samples, which a process has where the last batch has one; None: it works.

    Such a model must refuse in all processes, or drop the last batch: that is the Trainer's business and tested there.
    """
    torch.manual_seed(0)
    model = subject.model()
    inputs = Batch.of({name: tensor[:0] for name, tensor in subject.data(BATCH, 0).items()}).inputs
    try:
        call_model(model, inputs)
    except (ValueError, RuntimeError) as error:
        return str(error)
    return None


def _compare_processes(subject: Subject, *, samples: int) -> None:
    whole = whole_run(subject, samples=samples)
    with tempfile.TemporaryDirectory() as folder:
        run_launched(_train_and_save, subject, samples, folder)
        for rank in range(2):
            mine: Mapping[str, Tensor] = torch.load(Path(folder) / f"{rank}.pt", weights_only=True)
            assert mine.keys() == whole.keys()
            for name, tensor in whole.items():
                worst = float((tensor.double() - mine[name].double()).abs().max()) if tensor.numel() else 0.0
                assert worst < 1e-4, f"rank {rank}: {name!r} differs from one process by {worst:.3g}"


def _train_and_save(subject: Subject, samples: int, folder: str) -> None:
    state = whole_run(subject, samples=samples)
    torch.save(state, Path(folder) / f"{dist.get_rank()}.pt")
    leave_process_group()


TRAINER_CHECKS: Mapping[str, Callable[[Subject], None]] = {
    "resume": check_resume,
    "interrupted": check_interrupted,
    "trainer_processes": check_trainer_processes,
}
