"""What the contract suite checks of AAER: the term on top of FGSM training."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from regularized.evidence.contract import AnySubject, Classification, Subject, Terms
from regularized.robustness.abnormal_examples import AbnormalExamples, AbnormalExamplesLoss, OneStepTraining
from regularized.robustness.attacks import OneStep, Threat
from regularized.training.terms import CrossEntropy

TASK = Classification(features=6, hidden=(16, 16))


def _host() -> Terms:
    """FGSM training: from a zero start, since noise would be other noise in two processes."""
    return {"attack": OneStepTraining(OneStep.fgsm(Threat(2.0, -10.0, 10.0))), "task": CrossEntropy()}


def _on(weight: float = 1.0) -> Terms:
    return {**_host(), "abnormal": AbnormalExamples(weight=weight, output_weight=2.0)}


def _part() -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(0)
    before, after = (torch.randn(12, 4, generator=generator) for _ in range(2))
    labels = torch.arange(12) % 4
    losses = nn.functional.cross_entropy(before, labels, reduction="none")
    return AbnormalExamplesLoss(), (before, losses, after.requires_grad_(), labels)


def subjects() -> list[AnySubject]:
    """The regulariser beside its host alone."""
    return [
        Subject(
            "aaer",
            model=TASK.model,
            terms=_on,
            off=partial(_on, 0.0),
            plain=_host,
            data=TASK.data,
            part=_part,
        )
    ]
