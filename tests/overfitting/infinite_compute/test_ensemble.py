"""Means of logits."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from regularized.overfitting.infinite_compute.ensemble import LogitEnsemble, prefix_losses, subset_losses


def random_logits(k=5, n=40, v=7):
    draws = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(k, n, v, generator=draws, dtype=torch.float64)
    return logits, torch.randint(v, (n,), generator=draws)


def test_one_member_is_the_model():
    """Fails when the mean of one is computed with rounding."""
    model, x = nn.Linear(4, 3), torch.randn(5, 4)
    assert torch.equal(LogitEnsemble([model])(x), model(x))


@pytest.mark.filterwarnings("ignore:members 0 and 1")
@pytest.mark.parametrize("copies", [2, 3, 4, 7])
def test_copies_are_the_model(copies):
    """Fails when the mean is a sum, or its weights do not add up to one."""
    model, x = nn.Linear(4, 3), torch.randn(5, 4)
    assert torch.equal(LogitEnsemble([copy.deepcopy(model) for _ in range(copies)])(x), model(x))


def test_mean_of_logits_not_of_probabilities():
    """Fails when softmax comes before the mean, or a member weighs more than another."""
    models, x = [nn.Linear(4, 3) for _ in range(5)], torch.randn(6, 4)
    mean = torch.stack([model(x) for model in models]).mean(dim=0)
    assert torch.allclose(LogitEnsemble(models)(x), mean, atol=1e-6)


def test_geometric_mean():
    """Fails when the loss is not the members' mean less the logarithm of the normaliser, so above their mean."""
    logits, labels = random_logits()
    log_p = logits.log_softmax(dim=-1)
    gap = log_p.mean(dim=0).logsumexp(dim=-1).mean()  # <= 0
    members = torch.stack([F.cross_entropy(one, labels) for one in logits])
    together = prefix_losses(logits, labels)[-1]
    assert together.item() == pytest.approx((members.mean() + gap).item(), rel=1e-12)
    assert together <= members.mean()


def test_prefixes_follow_the_order():
    """Fails when prefixes are averaged over subsets, or begin with two members."""
    logits, labels = random_logits()
    losses = prefix_losses(logits, labels)
    assert losses[0].item() == pytest.approx(F.cross_entropy(logits[0], labels).item())
    assert losses[2].item() == pytest.approx(F.cross_entropy(logits[:3].mean(dim=0), labels).item())
    assert not torch.allclose(losses[:3], prefix_losses(logits.flip(0), labels)[:3])


def test_subsets_never_rise():
    """Fails when a subset is left out: only the average over all of a size is sure to fall with every member."""
    logits, labels = random_logits()
    losses = subset_losses(logits, labels)
    assert bool((losses.diff() <= 1e-12).all())
    assert losses[0].item() == pytest.approx(sum(F.cross_entropy(one, labels).item() for one in logits) / 5)
    assert losses[-1].item() == pytest.approx(prefix_losses(logits, labels)[-1].item())
    assert not math.isclose(losses[1].item(), prefix_losses(logits, labels)[1].item())


def test_it_trains():
    """Fails when the mean is taken without a graph."""
    ensemble = LogitEnsemble([nn.Linear(2, 2), nn.Linear(2, 2)])
    ensemble(torch.ones(3, 2)).sum().backward()
    assert all(p.grad is not None for p in ensemble.parameters())
