"""The loss in the loop: order of classes, the previous model, no needless pass, state."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from regularized.continual.rehearsal_free import ContinualLoss, distillation, feature_distillation, sigmoid_loss
from regularized.continual.tasks import Task
from regularized.evidence.models import mlp
from regularized.mechanisms.taps import Taps
from regularized.training.progress import Progress
from regularized.training.step import Batch, Step

FIRST, SECOND = Task(0, (4, 1), None), Task(1, (0, 3), None)


def network():
    torch.manual_seed(0)
    return mlp([3, 6, 5])


def data(task):
    y = torch.tensor(task.classes).repeat(4)
    return torch.randn(len(y), 3, generator=torch.Generator().manual_seed(task.number)), y


def value(loss, model, task):
    x, y = data(task)
    with Taps(model, loss.taps) as taps:
        return loss(Step(model, Batch(x, y), Progress(0, 1), taps.states))


def after_first(model, **options):
    """The loss on its second task, and the model as it was between the two."""
    loss = ContinualLoss(5, **options)
    loss.attach(model)
    loss.task_start(FIRST)
    with torch.no_grad():
        model[0].weight.add_(0.1)
    loss.task_end(FIRST)
    before = copy.deepcopy(model)
    with torch.no_grad():
        model[0].weight.mul_(1.5)
    loss.task_start(SECOND)
    return loss, before


def test_without_distillation_it_is_cross_entropy_over_the_classes_seen():
    """Bit for bit. Fails when unseen classes are in the softmax, or columns are taken for labels."""
    model = network()
    loss, _ = after_first(model, classifier="softmax", distil=0.0)
    x, _ = data(SECOND)
    columns = torch.tensor([4, 1, 0, 3])
    expected = F.cross_entropy(model(x)[:, columns], torch.tensor([2, 3]).repeat(4), reduction="sum")
    assert torch.equal(value(loss, model, SECOND), expected)
    assert loss.previous is None


@pytest.mark.parametrize("classifier", ["sigmoid", "softmax", "local"])
def test_the_previous_model_is_that_of_the_end_of_the_last_task(classifier):
    """Fails when the teacher is the model at the start, or the present one, or in another order of classes."""
    model = network()
    loss, before = after_first(model, classifier=classifier, distil=1.0)
    (x, _), columns = data(SECOND), torch.tensor([4, 1, 0, 3])
    z, teacher = model(x)[:, columns], before(x)[:, columns[:2]].detach()
    places = torch.tensor([2, 3]).repeat(4)
    expected = {
        "sigmoid": lambda: sigmoid_loss(z, places, teacher),
        "softmax": lambda: F.cross_entropy(z, places, reduction="none") + distillation(z, teacher),
        "local": lambda: F.cross_entropy(z[:, 2:], places - 2, reduction="none") + distillation(z, teacher),
    }[classifier]()
    torch.testing.assert_close(value(loss, model, SECOND), expected.sum())


def test_features_are_those_of_the_named_module_in_both_models():
    """Fails when the present model's features stand for the previous ones."""
    model = network()
    loss, before = after_first(model, distil=0.0, feature_weight=0.3, features="1")
    plain, _ = after_first(network(), distil=0.0)
    x, _ = data(SECOND)
    expected = 0.3 * feature_distillation(model[:2](x), before[:2](x)).sum()
    with torch.no_grad():
        difference = value(loss, model, SECOND) - value(plain, model, SECOND)
    torch.testing.assert_close(difference, expected.detach())


def test_the_first_task_needs_no_second_pass():
    """Fails when the copy is asked before there is a previous model."""
    model, loss = network(), ContinualLoss(5)
    loss.attach(model)
    loss.task_start(FIRST)
    calls = []
    loss.previous.module.register_forward_hook(lambda *_: calls.append(1))
    value(loss, model, FIRST)
    assert not calls
    loss.task_end(FIRST)
    loss.task_start(SECOND)
    value(loss, model, SECOND)
    assert len(calls) == 1


def test_known_classes_are_old_from_the_start():
    """A classifier that exists already learns more classes. Fails when it is not its own teacher."""
    model, loss = network(), ContinualLoss(5, known=(4, 1))
    loss.attach(model)
    loss.task_start(SECOND)
    x, _ = data(SECOND)
    columns = torch.tensor([4, 1, 0, 3])
    z = model(x)[:, columns]
    expected = sigmoid_loss(z, torch.tensor([2, 3]).repeat(4), z[:, :2].detach()).sum()
    torch.testing.assert_close(value(loss, model, SECOND), expected)


def test_no_gradient_reaches_the_previous_model_and_its_mode_stays():
    """Fails when the copy is trained, or follows `train()`."""
    model = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Linear(6, 5))
    loss, _ = after_first(model)
    loss.train()
    statistics = loss.previous.module[1].running_mean.clone()
    value(loss, model, SECOND).backward()
    assert all(p.grad is None for p in loss.previous.parameters())
    assert torch.equal(loss.previous.module[1].running_mean, statistics)


def test_state_goes_on_in_the_middle_of_a_sequence():
    """Fails when order, old classes or the previous model are not saved."""
    model = network()
    loss, _ = after_first(model)
    expected = value(loss, model, SECOND)
    fresh = ContinualLoss(5)
    fresh.attach(copy.deepcopy(model))
    fresh.load_state_dict(loss.state_dict())
    assert torch.equal(value(fresh, model, SECOND), expected)
    assert (fresh.seen.num_old, fresh.seen.open) == (2, 1)
