"""Ranking losses per sample, against formulas written from the paper's code, and measures of rankings.

Mutations tried and seen: positive and negative exchanged, hinge summed over negatives, column 1 as the relevant one.
"""

import builtins
import math
import sys

import pytest
import torch
from torch import Tensor

from regularized.curriculum.ranking_curriculum.evaluation import evaluate_ranking
from regularized.curriculum.ranking_curriculum.reranker_losses import (
    pairwise_cross_entropy_loss,
    pairwise_hinge_loss,
    pairwise_softmax_loss,
    pointwise_cross_entropy_loss,
    two_output_pairwise_loss,
)


def scores(b: int, k: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(10 * b + k)
    return tuple(torch.randn(b, 1 + k, dtype=torch.float64, generator=generator).split([1, k], dim=1))


@pytest.mark.parametrize(("b", "k"), [(1, 1), (5, 1), (4, 3)])
def test_by_hand(b, k):
    """Fails on any changed term: losses entry by entry in plain Python."""
    positive, negative = scores(b, k)
    positive = positive.squeeze(1)
    for row in range(b):
        s, others = positive[row].item(), negative[row].tolist()
        p = math.exp(s) / (math.exp(s) + sum(map(math.exp, others)))
        assert pairwise_softmax_loss(positive, negative)[row].item() == pytest.approx(1 - p, rel=1e-12)
        assert pairwise_cross_entropy_loss(positive, negative)[row].item() == pytest.approx(-math.log(p), rel=1e-12)
        hinge = sum(max(0.0, 0.7 - s + other) for other in others) / k
        assert pairwise_hinge_loss(positive, negative, margin=0.7)[row].item() == pytest.approx(hinge, rel=1e-12)


@pytest.mark.parametrize("loss", [pairwise_softmax_loss, pairwise_cross_entropy_loss, pairwise_hinge_loss])
def test_one_negative_with_or_without_its_dimension(loss):
    """Fails when (B,) and (B, 1) differ, or when only the difference of the scores should matter and does not."""
    positive, negative = scores(6, 1)
    flat = loss(positive.squeeze(1), negative.squeeze(1))
    assert torch.equal(flat, loss(positive.squeeze(1), negative))
    torch.testing.assert_close(flat, loss(positive.squeeze(1) + 5, negative + 5))


@pytest.mark.parametrize("loss", [pairwise_softmax_loss, pairwise_cross_entropy_loss, pairwise_hinge_loss])
def test_gradients_and_extremes(loss):
    """Fails when a gradient is wrong, or a score of 500 makes anything infinite."""
    positive, negative = scores(3, 2)
    assert torch.autograd.gradcheck(
        loss, (positive.squeeze(1).clone().requires_grad_(), negative.clone().requires_grad_())
    )
    far = torch.tensor([500.0, -500.0], requires_grad=True)
    loss(far, -far).sum().backward()
    assert bool(torch.isfinite(far.grad).all())


def test_two_outputs():
    """Fails when output 1 is taken as the relevant one, in either loss."""
    z = torch.tensor([[3.0, -3.0], [0.0, 1.0]], dtype=torch.float64)
    log_p = z.log_softmax(dim=1)
    expected = torch.stack([-log_p[0, 0], -log_p[1, 1]])
    torch.testing.assert_close(pointwise_cross_entropy_loss(z, torch.tensor([2, 0])), expected)
    torch.testing.assert_close(two_output_pairwise_loss(z[:1], z[1:]), expected.sum()[None])


# -- evaluation ---------------------------------------------------------------------------------


def test_measures_are_means_over_judged_queries():
    """Fails when a query without scores is left out of the mean, or a grade below the threshold counts."""
    labels = {"q1": {"a": 1, "b": 3}, "q2": {"c": 3}, "q3": {"d": -1, "e": 3}}
    ranked = {"q1": {"a": 2.0, "b": 1.0}, "q3": {"d": 2.0, "e": 1.0}}
    values = evaluate_ranking(labels, ranked, ["RR", "RR(rel=3)@10", "P@1"])
    assert values == pytest.approx({"RR": (1 + 0 + 0.5) / 3, "RR(rel=3)@10": (0.5 + 0 + 0.5) / 3, "P@1": 1 / 3})


def test_missing_package_names_the_extra(monkeypatch):
    """Fails when a person without ir-measures is not told what to install."""
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("ir_measures"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    monkeypatch.setitem(sys.modules, "ir_measures", None)
    with pytest.raises(ImportError, match=r"regularized\[ranking\]"):
        evaluate_ranking({"q": {"a": 1}}, {})
