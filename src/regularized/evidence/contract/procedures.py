"""Checks of whole procedures."""

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regularized.evidence.contract.loop import distance, equal
from regularized.evidence.contract.subjects import NotApplicable, ProcedureSubject

__all__ = ["PROCEDURE_CHECKS"]


def _learned(subject: ProcedureSubject, build: Callable[[], Any], epochs: int) -> Mapping[str, Tensor]:
    torch.manual_seed(0)
    procedure = build()
    torch.manual_seed(1)  # building may draw more or less; training must not depend on that
    if epochs:
        subject.train(procedure, epochs)
    return {name: tensor.clone() for name, tensor in subject.weights(procedure).items()}


def check_it_bites(subject: ProcedureSubject) -> None:
    """Training changes the weights, and with the idea switched off they end elsewhere."""
    start, on, plain = (
        _learned(subject, build, epochs)
        for build, epochs in ((subject.build, 0), (subject.build, 2), (subject.plain, 2))
    )
    assert distance(start, on) > 0, "training changes nothing"
    assert distance(on, plain) > 1e-6, "with the idea switched off, training ends in the same place"


def check_deterministic(subject: ProcedureSubject) -> None:
    """Two equal runs give equal weights: all randomness is seeded."""
    first, second = (_learned(subject, subject.build, 1) for _ in range(2))
    assert equal(first, second), "two runs with the same seed differ"


def check_resume(subject: ProcedureSubject) -> None:
    """Saved after an epoch and loaded into a fresh procedure, the next epoch is bit for bit that of the first one."""
    torch.manual_seed(0)
    whole = subject.build()
    subject.train(whole, 1)
    with tempfile.TemporaryDirectory() as folder:
        torch.save(whole.state_dict(), Path(folder) / "state.pt")
        state = torch.load(Path(folder) / "state.pt", weights_only=True)
    torch.manual_seed(1)
    resumed = subject.build()
    resumed.load_state_dict(state)
    # One after the other, from the same global random state: a procedure draws from its own state or from this one.
    torch.manual_seed(2)
    subject.train(whole, 1)
    torch.manual_seed(2)
    subject.train(resumed, 1)
    a, b = subject.weights(whole), subject.weights(resumed)
    assert equal(a, b), f"the resumed procedure differs by {distance(a, b):.3g}"


def check_fsdp2(subject: ProcedureSubject) -> None:
    """Weights in shards are an option of the Trainer, and of no procedure."""
    raise NotApplicable(
        "a procedure has a loop of its own, with whole weights: it takes no Compute(sharding=...), and refuses "
        "networks in shards where it takes any"
    )


def check_fp16(subject: ProcedureSubject) -> None:
    """A scaled loss is an option of the Trainer, and of no procedure."""
    raise NotApplicable("a procedure has a loop of its own, without a scaled loss: it takes no Compute(precision=...)")


def check_compile_step(subject: ProcedureSubject) -> None:
    """A compiled step is an option of the Trainer, and of no procedure."""
    raise NotApplicable(
        "a procedure has a loop of its own, whose steps stay as they are: it takes no Compute(compile=...)"
    )


PROCEDURE_CHECKS: Mapping[str, Callable[[ProcedureSubject], None]] = {
    "it_bites": check_it_bites,
    "deterministic": check_deterministic,
    "resume": check_resume,
    "fsdp2": check_fsdp2,
    "fp16": check_fp16,
    "compile_step": check_compile_step,
}
