"""A network that nobody trains."""

import copy

import pytest
import torch
from torch import nn

from regularized.mechanisms.frozen import Frozen, check_apart


def network():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))


def test_running_statistics_are_evaluation():
    """Fails when dropout or batch statistics are active, or the buffers move."""
    model = network()
    expected_of, x = copy.deepcopy(model).eval(), torch.randn(6, 3)
    before = {name: b.clone() for name, b in model.named_buffers()}
    frozen = Frozen(model.train())
    torch.testing.assert_close(frozen(x), expected_of(x).detach())
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())


def test_no_graph_is_built_even_for_inputs_that_need_one():
    """Fails when the network is only frozen, and its activations are kept for a gradient that nobody wants."""
    assert not Frozen(network())(torch.randn(6, 3, requires_grad=True)).requires_grad


def test_batch_statistics_without_touching_buffers():
    """Fails when the batch is not used, dropout is switched on with it, or num_batches_tracked counts."""
    model, x = network(), 5 + torch.randn(16, 3)
    reference = copy.deepcopy(model).train()
    reference[2].eval()
    before = {name: b.clone() for name, b in model.named_buffers()}
    frozen = Frozen(model, statistics="batch")
    torch.testing.assert_close(frozen(x), reference(x).detach())
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())
    frozen.train().eval()
    torch.testing.assert_close(frozen(x), reference(x).detach())


@pytest.mark.parametrize("statistics", ["running", "batch"])
@pytest.mark.parametrize("tamper", ["train", "eval", "one layer", "requires_grad_"])
def test_whoever_changes_it_is_told(statistics, tamper):
    """Fails when a teacher silently runs in another mode than it was given."""
    model = network()
    frozen = Frozen(model, statistics=statistics)
    frozen(torch.randn(4, 3))
    if tamper == "one layer":
        model[2].train()
    else:
        getattr(model, tamper)()
    if tamper == "eval" and statistics == "running":
        frozen(torch.randn(4, 3))  # that is its mode
        return
    with pytest.raises(RuntimeError, match="frozen network"):
        frozen(torch.randn(4, 3))
    Frozen(model, statistics=statistics)(torch.randn(4, 3))  # wrapped once more it is mended


def test_views_share_memory():
    """Fails when only the identity of parameters is compared."""
    a, b = nn.Linear(3, 3), nn.Linear(3, 3)
    check_apart(a, b)
    b.weight = nn.Parameter(a.weight.detach()[:])
    with pytest.raises(ValueError, match=r"here and there share memory: 'weight' of the here is 'weight' of the there"):
        check_apart(a, b, names=("here", "there"))
    norm, other = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    other.running_mean = norm.running_mean
    with pytest.raises(ValueError, match="running_mean"):
        check_apart(norm, other)
