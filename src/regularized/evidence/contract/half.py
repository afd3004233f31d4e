"""Half precision in :class:`~regularized.training.trainer.Trainer`, with a scaled loss."""

import torch
from torch import Tensor

from regularized.evidence.contract.subjects import Subject
from regularized.evidence.contract.trainer_runs import apart, whole_run
from regularized.training.options import Compute
from regularized.training.step import Step
from regularized.training.terms import Term

__all__ = ["check_fp16"]

_EXACT, _HALF = Compute(device="cpu"), Compute(device="cpu", precision="fp16")
_SCALE = 64.0  # so small that no sound step overflows: one that is left out would end elsewhere


class _Overflow(Term):
    """A gradient in the second step that overflows with any scale above 30; the value is always zero."""

    def forward(self, step: Step) -> Tensor:
        """Zero."""
        value = step.logits.sum()
        return (value - value.detach()) * (1e38 if step.progress.step == 1 else 0.0)


def check_fp16(subject: Subject) -> None:
    """In float16 with a scaled loss, training stays near the float32 one, and finite where a step is left out."""
    exact = whole_run(subject, epochs=1, compute=_EXACT)
    low = whole_run(subject, epochs=1, compute=_HALF, loss_scale=_SCALE)
    worst, name = apart(exact, low)
    assert worst < 0.1, f"fp16: {name!r} ends {worst:.3g} away from float32 after one epoch"
    after = whole_run(subject, epochs=1, compute=_HALF, also={"overflow": _Overflow()}, loss_scale=_SCALE)
    spoilt = [name for name, tensor in after.items() if not bool(torch.isfinite(tensor).all())]
    assert not spoilt, f"not finite after a step that was left out: {', '.join(spoilt)}"
