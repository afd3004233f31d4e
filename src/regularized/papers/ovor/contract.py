"""What the contract suite checks of OVOR: the loss of a task, and sequences of tasks with both phases."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from regularized.continual.ovor.head import VirtualOutlierRegularizer
from regularized.continual.ovor.loss import outlier_loss
from regularized.continual.ovor.model import OnePrompt
from regularized.continual.ovor.outliers import Around, OutlierSampler
from regularized.continual.ovor.term import HeadPhase, TaskCrossEntropy
from regularized.continual.sequence import TaskSequence
from regularized.continual.tasks import Task, class_groups, class_incremental
from regularized.evidence.contract import Classification, NotApplicable, ProcedureSubject, Subject, plain
from regularized.papers.ovor.networks import SmallViT

TASK = Classification()


def _loss() -> Mapping[str, nn.Module]:
    """Of four classes only three compete."""
    loss = TaskCrossEntropy(TASK.classes + 1)
    loss.task_start(Task(0, tuple(range(TASK.classes)), None))
    return {"task": loss}


def _wide() -> nn.Module:
    return nn.Sequential(TASK.model(), nn.Linear(TASK.classes, TASK.classes + 1))


def _part() -> tuple[Callable[..., Any], tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(2)
    real, outliers = (5.0 * torch.randn(n, 4, generator=generator) for n in (8, 6))
    return partial(outlier_loss, tau_id=-6.0, tau_ood=-2.0), (real.requires_grad_(), outliers)


def sequence(weight: float, around: Around) -> TaskSequence:
    """Three tasks of unequal sizes."""
    y = torch.arange(6).repeat(10)
    x = torch.randn(60, 1, 8, 8, generator=torch.Generator().manual_seed(0)) + y[:, None, None, None] / 3
    vit = SmallViT(size=8, patch=4, channels=1, dim=8, depth=2, heads=2, num_classes=6)
    sampler = OutlierSampler(around=around, k=5, select=6, noises=10, per_class=8, sigma=0.5)
    phase = HeadPhase(VirtualOutlierRegularizer(weight=weight, sampler=sampler), epochs=2, batch_size=8)
    return TaskSequence(
        OnePrompt(vit, 6, layers={0: 2, 1: 4}),
        class_incremental((x, y), class_groups(6, [3, 2, 1]), test=(x, y), batch_size=10),
        terms={"task": TaskCrossEntropy(6), "outliers": phase},
        optimizer=partial(torch.optim.Adam, lr=0.01),
        epochs=2,
    )


def _train(procedure: TaskSequence, tasks: int) -> None:
    procedure.fit(until=procedure.done + tasks)


def _weights(procedure: TaskSequence) -> Mapping[str, Tensor]:
    return {**procedure.model.state_dict(), "accuracy": procedure.record.whole.nan_to_num(-1.0)}


def subjects() -> list[Subject | ProcedureSubject]:
    """Cross-entropy over the classes of a task; sequences of both phases, with outliers of both kinds."""
    always = NotApplicable("it is the loss of the task, and has no coefficient to be 0")
    found: list[Subject | ProcedureSubject] = [
        Subject("classes of the task", _wide, _loss, plain, TASK.data, off=always, part=_part)
    ]
    kinds: dict[str, Around] = {"boundary": "boundary", "origin": "origin"}
    for name, around in kinds.items():
        build, without = (partial(sequence, weight, around) for weight in (1.0, 0.0))
        found.append(ProcedureSubject(f"a sequence with outliers around the {name}", build, without, _train, _weights))
    return found
