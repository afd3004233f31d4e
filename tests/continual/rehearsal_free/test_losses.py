"""The losses: closed gradients, limits, and what must not be touched."""

import pytest
import torch
from torch.nn import functional as F

from regularized.continual.rehearsal_free import (
    distillation,
    feature_distillation,
    local_cross_entropy,
    sigmoid_loss,
)

B, OLD, ALL = 6, 3, 5


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(B, ALL, generator=generator, dtype=torch.float64).requires_grad_()


@pytest.fixture
def teacher():
    return torch.randn(B, OLD, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


NEW_LABELS = torch.tensor([3, 4, 3, 4, 4, 3])


def test_sigmoid_loss_is_a_sum_over_classes(logits):
    """Fails on a mean over classes, and on old classes that are left out."""
    p = logits.sigmoid()
    y = F.one_hot(NEW_LABELS, ALL)
    expected = -(y * p.log() + (1 - y) * (1 - p).log()).sum(dim=1)
    torch.testing.assert_close(sigmoid_loss(logits, NEW_LABELS), expected)


def test_a_teacher_that_agrees_leaves_old_logits_alone(logits):
    """Old logits get no gradient, new ones (s(z) - y) / B. Fails when old targets are one-hot."""
    sigmoid_loss(logits, NEW_LABELS, logits[:, :OLD]).mean().backward()
    assert logits.grad[:, :OLD].abs().max() < 1e-15
    expected = (logits.detach().sigmoid() - F.one_hot(NEW_LABELS, ALL))[:, OLD:] / B
    torch.testing.assert_close(logits.grad[:, OLD:], expected)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_gradient_of_softmax_distillation(logits, teacher, temperature):
    """(softmax(z/T) - softmax(z'/T)) / (T B) on old logits, 0 on new ones. Fails with a factor T^2."""
    distillation(logits, teacher, temperature=temperature).mean().backward()
    difference = (logits.detach()[:, :OLD] / temperature).softmax(1) - (teacher / temperature).softmax(1)
    torch.testing.assert_close(logits.grad[:, :OLD], difference / (temperature * B))
    assert not logits.grad[:, OLD:].any()


def test_local_cross_entropy_leaves_old_logits_alone(logits):
    """Fails when old logits stay in the denominator."""
    loss = local_cross_entropy(logits, NEW_LABELS, OLD)
    torch.testing.assert_close(loss, F.cross_entropy(logits[:, OLD:], NEW_LABELS - OLD, reduction="none"))
    loss.sum().backward()
    assert not logits.grad[:, :OLD].any()


def test_features_are_summed_and_the_previous_ones_are_fixed():
    """Fails on a mean over features, and on a gradient into the previous model."""
    now, before = (torch.randn(B, 2, 3, requires_grad=True) for _ in range(2))
    loss = feature_distillation(now, before)
    torch.testing.assert_close(loss, (now - before).square().sum(dim=(1, 2)))
    loss.sum().backward()
    assert before.grad is None
