"""Bad inputs of `rehearsal_free`: each is answered by what was given, what is allowed, and how to mend it."""

import pytest
import torch
from tests.bad_input import assert_refused, refused
from torch import nn

from regularized.continual.forgetting import Forgetting, global_forgetting
from regularized.continual.rehearsal_free import (
    ContinualLoss,
    WeightAnchor,
    diagonal_fisher,
    feature_distillation,
    select_parameters,
    sigmoid_loss,
)
from regularized.continual.tasks import Task, class_groups, class_incremental
from regularized.evidence.models import mlp
from regularized.training.progress import Progress
from regularized.training.step import Batch, Step

FIRST, SECOND = Task(0, (0, 1), None), Task(1, (2, 3), None)


def begun(**options):
    model, loss = mlp([3, 6, 4]), ContinualLoss(4, **options)
    loss.attach(model)
    loss.task_start(FIRST)
    return model, loss


def value(model, loss, labels):
    y = torch.tensor(labels)
    return loss(Step(model, Batch(torch.ones(len(y), 3), y), Progress(0, 1)))


def _not_ended():
    begun()[1].task_start(SECOND)


def _not_ended_anchor():
    anchor = WeightAnchor(weight=1.0)
    anchor.attach(mlp([3, 6, 4]))
    anchor.task_start(FIRST)
    anchor.task_start(SECOND)


def _class_twice():
    _, loss = begun()
    loss.task_end(FIRST)
    loss.task_start(Task(1, (1, 2), None))


def _teacher_trains():
    model, loss = begun()
    loss.task_end(FIRST)
    loss.task_start(SECOND)
    loss.previous.module.train()
    value(model, loss, [2, 3])


def _no_task():
    value(mlp([3, 6, 4]), ContinualLoss(4), [0])


def _other_head():
    value(mlp([3, 6, 7]), begun()[1], [0])


def _zero_fisher():
    class Detached(nn.Linear):
        def forward(self, x):
            return super().forward(x).detach()

    diagonal_fisher(Detached(3, 2), [(torch.ones(2, 3), torch.tensor([0, 1]))], ["weight"])


def _other_shapes():
    WeightAnchor(weight=1.0, pretrained={"0.weight": torch.zeros(6, 2)}).attach(mlp([3, 6, 4]))


ROWS = [
    refused("end_task was not called", _not_ended, RuntimeError, ("no anchor for task 1", "task_end")),
    refused("nor for an anchor", _not_ended_anchor, RuntimeError, ("no anchor for task 1", "task_end")),
    refused("a class in two tasks", _class_twice, ValueError, ("class 1", "task 1", "disjoint")),
    refused(
        "a label of no task", lambda: value(*begun(), [0, 3]), ValueError, ("label 3", "[0, 1]", "its task's `classes`")
    ),
    refused("a class beyond the head", lambda: ContinualLoss(3, known=(3,)), ValueError, ("class 3", "0 to 2")),
    refused("a class named twice", lambda: ContinualLoss(3, known=(1, 1)), ValueError, ("named twice", "(1, 1)")),
    refused("no task has begun", _no_task, RuntimeError, ("no task has begun", "fit(..., task=task)")),
    refused("a head of another size", _other_head, ValueError, ("7 columns", "given 4")),
    refused(
        "a pattern that selects nothing",
        lambda: select_parameters(mlp([3, 6, 4]), "attn"),
        ValueError,
        ("'attn' selects no trainable parameter", "'qkv'", "0.weight"),
    ),
    refused(
        "a pattern that selects the head as well",
        lambda: select_parameters(mlp([3, 6, 4]), "weight$"),
        UserWarning,
        ("parameters of the head '2'", "left out"),
    ),
    refused("no such head", lambda: select_parameters(mlp([3, 4]), head="fc"), ValueError, ("head 'fc'", "there are")),
    refused("all Fisher information is zero", _zero_fisher, ValueError, ("zero for every weight", "detached")),
    refused(
        "no data for Fisher information",
        lambda: diagonal_fisher(nn.Linear(1, 2), [], ["weight"]),
        ValueError,
        ("at least one",),
    ),
    refused(
        "a teacher of more classes",
        lambda: sigmoid_loss(torch.zeros(2, 3), torch.tensor([0, 1]), torch.zeros(2, 4)),
        ValueError,
        ("(2, 4)", "no more than the 3 classes"),
    ),
    refused("a teacher in training mode", _teacher_trains, RuntimeError, ("train mode", "frozen network")),
    refused("anchors of other shapes", _other_shapes, ValueError, ("0.weight (6, 2)", "0.bias is missing", "(6, 3)")),
    refused(
        "features of another shape",
        lambda: feature_distillation(torch.zeros(2, 3), torch.zeros(2, 4)),
        ValueError,
        ("(2, 3)", "(2, 4)", "in front of the head"),
    ),
    refused("features without a name", lambda: ContinualLoss(3, feature_weight=1.0), ValueError, ("needs features",)),
    refused("half a sigmoid teacher", lambda: ContinualLoss(3, distil=0.5), ValueError, ("0 or 1", "0.5", "softmax")),
    refused("an unknown loss", lambda: ContinualLoss(3, classifier="bce"), ValueError, ("classifier", "sigmoid")),
    refused("a negative strength", lambda: WeightAnchor(weight=-1.0), ValueError, ("weight", "-1")),
    refused("groups that do not add up", lambda: class_groups(5, 2), ValueError, ("[2, 2]", "make 5")),
    refused(
        "tasks that share a class",
        lambda: class_incremental((torch.zeros(2, 1), torch.tensor([0, 1])), [(0, 1), (1,)]),
        ValueError,
        ("class 1 is in two tasks",),
    ),
    refused("no test data", lambda: Forgetting([FIRST]), ValueError, ("task 0 has no test data",)),
    refused("one task alone", lambda: global_forgetting(torch.ones(1, 1), [2]), ValueError, ("N >= 2", "(1, 1)")),
]


@pytest.mark.parametrize(("call", "error", "says"), ROWS)
def test_bad_input(call, error, says):
    """Fails when one of them passes silently, or its message lacks what mends it."""
    assert_refused(call, error, says)
