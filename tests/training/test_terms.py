import pytest
import torch
from torch import nn
from torch.nn import functional as F

from regularized.training import Batch, CrossEntropy, Loss, Progress, Step

NOW = Progress(0, 1)


def mean(term, x, y, model=None):
    batch = Batch.of((x, y))
    return term(Step(model or nn.Identity(), batch, NOW)) / term.count(batch)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(6,), (2, 3)])
def test_labels_equal_torch(smoothing, shape):
    """Fails on a wrong reduction, a lost ignored label, or classes in the wrong dimension."""
    torch.manual_seed(0)
    z, y = torch.randn(*shape, 5, dtype=torch.float64), torch.randint(0, 5, shape)
    y.view(-1)[2] = -100
    ours = mean(CrossEntropy(label_smoothing=smoothing), z, y)
    torch.testing.assert_close(ours, F.cross_entropy(z.view(-1, 5), y.view(-1), label_smoothing=smoothing))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_soft_targets_equal_torch(smoothing):
    """Fails if soft targets are counted by their entries rather than their rows."""
    torch.manual_seed(0)
    z, q = torch.randn(6, 5, dtype=torch.float64), torch.rand(6, 5, dtype=torch.float64).softmax(-1)
    ours = mean(CrossEntropy(label_smoothing=smoothing), z, q)
    torch.testing.assert_close(ours, F.cross_entropy(z, q, label_smoothing=smoothing))


def test_shift_predicts_the_next_position():
    """Fails if labels are shifted the wrong way, or the last position is counted."""
    torch.manual_seed(0)
    z, y = torch.randn(2, 4, 5), torch.randint(0, 5, (2, 4))
    y[0, 2] = 9
    ours = mean(CrossEntropy(shift=True, ignore_index=9), z, y)
    expected = F.cross_entropy(z[:, :-1].reshape(-1, 5), y[:, 1:].reshape(-1), ignore_index=9)
    torch.testing.assert_close(ours, expected)


def test_loss_is_the_sum_of_what_the_function_gives():
    """Fails if the term takes a mean of its own."""
    z, y = torch.arange(4.0).view(4, 1), torch.zeros(4)
    assert mean(Loss(lambda z, y: (z.squeeze(-1) - y).square()), z, y) == 3.5
