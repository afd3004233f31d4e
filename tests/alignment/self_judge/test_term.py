"""The term beside cross-entropy is the paper's loss of a classifier."""

import torch
from torch import nn

from regularized.alignment.self_judge import PrivilegedView, views_loss
from regularized.evidence.models import mlp
from regularized.training import Batch, CrossEntropy, Progress, Step


def hide(x):
    return torch.cat([x[:, :3], torch.zeros_like(x[:, 3:])], dim=1)


def data():
    g = torch.Generator().manual_seed(0)
    return torch.randn(12, 5, generator=g), torch.randint(4, (12,), generator=g)


def test_with_cross_entropy_it_is_the_whole_loss():
    """Fails when a sum is a mean, or the views change places."""
    torch.manual_seed(0)
    model, (x, y) = mlp([5, 7, 4]), data()
    step = Step(model, Batch(x, y), Progress(0, 1))
    total = (CrossEntropy()(step) + PrivilegedView(hide, alpha=0.4, alpha_kd=1.5)(step)) / 12
    torch.testing.assert_close(total, views_loss(model(x), model(hide(x)), y, alpha=0.4, alpha_kd=1.5))


def test_two_forward_passes():
    """Fails when the teacher's view is computed again instead of shared with the task."""
    torch.manual_seed(0)
    model, (x, y) = mlp([5, 7, 4]), data()
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    step = Step(model, Batch(x, y), Progress(0, 1))
    CrossEntropy()(step)
    PrivilegedView(hide)(step)
    assert len(calls) == 2


def test_dropout_of_the_views_is_independent():
    """Fails when both views get the same mask, for example by a seed that is set again."""
    torch.manual_seed(0)
    model, (x, y) = nn.Sequential(nn.Linear(5, 40), nn.Dropout(0.5), nn.Linear(40, 4)), data()
    step = Step(model, Batch(x, y), Progress(0, 1))
    same = PrivilegedView(lambda inputs: inputs.clone(), alpha=0.0, alpha_kd=1.0)
    assert float(same(step)) > 1e-3
