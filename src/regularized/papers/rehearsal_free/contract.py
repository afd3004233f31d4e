"""What the contract suite checks of rehearsal-free learning: its terms in the middle of a sequence, and a sequence."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from regularized.continual.rehearsal_free.loss import sigmoid_loss
from regularized.continual.rehearsal_free.term import Classifier, ContinualLoss, Importance, WeightAnchor
from regularized.continual.sequence import TaskSequence
from regularized.continual.tasks import Task, class_groups, class_incremental
from regularized.evidence.contract import Classification, NotApplicable, ProcedureSubject, Subject, plain

TASK = Classification()


def _loss(classifier: Classifier, distil: float) -> ContinualLoss:
    """Two classes are known, the others have just begun."""
    loss = ContinualLoss(TASK.classes, known=(0, 1), classifier=classifier, distil=distil)
    loss.task_start(Task(1, (2, 3), None))
    return loss


def _anchored() -> Mapping[str, nn.Module]:
    return {"task": _loss("softmax", 1.0), "anchor": WeightAnchor(weight=0.3, pretrained=True)}


def _off() -> Mapping[str, nn.Module]:
    return {"task": _loss("softmax", 0.0), "anchor": WeightAnchor(weight=0.0, pretrained=True)}


def _sigmoids() -> Mapping[str, nn.Module]:
    return {"task": _loss("sigmoid", 1.0)}


def _part() -> tuple[Callable[..., Any], tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(8, 4, generator=generator).requires_grad_()
    return sigmoid_loss, (logits, TASK.data(8, 1)["targets"], torch.randn(8, 2, generator=generator))


def sequence(importance: Importance, weight: float) -> TaskSequence:
    """A sequence of two tasks of two classes."""
    points = TASK.data(48, 0)
    data = (points["inputs"], points["targets"])
    return TaskSequence(
        TASK.model(),
        class_incremental(data, class_groups(TASK.classes, 2), test=data, batch_size=4),
        terms={"task": ContinualLoss(TASK.classes), "anchor": WeightAnchor(weight=weight, importance=importance)},
        optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        epochs=2,
    )


def _train(procedure: TaskSequence, tasks: int) -> None:
    procedure.fit(until=procedure.done + tasks)


def _weights(procedure: TaskSequence) -> Mapping[str, Tensor]:
    return {**procedure.model.state_dict(), "accuracy": procedure.record.whole.nan_to_num(-1.0)}


def subjects() -> list[Subject | ProcedureSubject]:
    """Softmax with both distillation and anchor; sigmoids; sequences with EWC and SI."""
    always = NotApplicable("the sigmoid loss takes the place of the task; without its teacher it still is another loss")
    found: list[Subject | ProcedureSubject] = [
        Subject("softmax, L2", TASK.model, _anchored, plain, TASK.data, off=_off, part=_part),
        Subject("sigmoids", TASK.model, _sigmoids, plain, TASK.data, off=always, part=_part),
    ]
    kinds: dict[str, Importance] = {"EWC": "fisher", "SI": "path"}
    for name, importance in kinds.items():
        build, without = (partial(sequence, importance, weight) for weight in (2.0, 0.0))
        found.append(ProcedureSubject(f"a sequence with {name}", build, without, _train, _weights))
    return found
