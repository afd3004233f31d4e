"""The loss of CREAM: DPO whose labels are as soft as two rankings disagree."""

import math

import pytest
import torch
from torch.nn import functional as F

from regularized.alignment.cream import ConsistencyDPOLoss, consistency_dpo_loss, preference_margin


def pairs(seed=0, count=6):
    generator = torch.Generator().manual_seed(seed)
    return [10 * torch.randn(count, generator=generator, dtype=torch.float64) for _ in range(4)]


def dpo(margin):
    return -F.logsigmoid(margin).mean()


def test_full_agreement_is_dpo_bit_for_bit():
    """Fails when the soft label is 1 - C, or the second term leaves a rounding error: values and gradients."""
    margin = pairs()[0].requires_grad_()
    plain = torch.autograd.grad(F.softplus(-margin).mean(), margin)[0]
    for consistency in (1.0, torch.ones(6, dtype=torch.float64)):
        loss = consistency_dpo_loss(margin, consistency)
        assert torch.equal(loss, F.softplus(-margin).mean())
        assert torch.equal(torch.autograd.grad(loss, margin)[0], plain)
    torch.testing.assert_close(consistency_dpo_loss(margin, 1.0), dpo(margin))


def test_no_agreement_is_dpo_of_exchanged_responses():
    """Fails when the second term has the sign of the first."""
    chosen, rejected, ref_chosen, ref_rejected = pairs()
    loss = ConsistencyDPOLoss(beta=0.3)
    exchanged = loss(rejected, chosen, ref_rejected, ref_chosen, consistency=1.0)
    torch.testing.assert_close(loss(chosen, rejected, ref_chosen, ref_rejected, consistency=0.0), exchanged)


def test_half_agreement_is_symmetric_and_flat_at_zero():
    """Fails when the two terms are weighted alike by accident of C = 1/2 only in value, not in slope."""
    margin = pairs()[0].requires_grad_()
    torch.testing.assert_close(consistency_dpo_loss(margin, 0.5), consistency_dpo_loss(-margin, 0.5))
    zero = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.grad(consistency_dpo_loss(zero, 0.5), zero)[0].item() == 0.0


@pytest.mark.parametrize("consistency", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_at_the_reference_the_loss_is_ln_2_and_the_slope_beta_times_half_minus_c(consistency):
    """Fails when beta multiplies twice or not at all, or the sign of the slope is that of the rejected response."""
    ones = torch.ones(1, dtype=torch.float64)
    chosen, rejected = (-5 * ones).requires_grad_(), (-7 * ones).requires_grad_()
    loss = ConsistencyDPOLoss(beta=0.25)(chosen, rejected, -5 * ones, -7 * ones, consistency=consistency)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-15)
    by_chosen, by_rejected = torch.autograd.grad(loss, (chosen, rejected))
    assert by_chosen.item() == pytest.approx(0.25 * (0.5 - consistency), abs=1e-15)
    assert by_rejected.item() == pytest.approx(-by_chosen.item(), abs=1e-15)


def test_gradient_is_sigmoid_less_consistency_and_none_reaches_the_reference():
    """Fails when labels of the batch are averaged, the sum stands for the mean, or a detach is missing."""
    chosen, rejected, ref_chosen, ref_rejected = (tensor.requires_grad_() for tensor in pairs())
    consistency = torch.linspace(0.1, 1.0, 6, dtype=torch.float64).requires_grad_()
    loss = ConsistencyDPOLoss(beta=0.1)(chosen, rejected, ref_chosen, ref_rejected, consistency=consistency)
    inputs = (chosen, rejected, ref_chosen, ref_rejected, consistency)
    by_chosen, by_rejected, *others = torch.autograd.grad(loss, inputs, allow_unused=True)
    margin = 0.1 * ((chosen - ref_chosen) - (rejected - ref_rejected))
    torch.testing.assert_close(by_chosen, 0.1 * (torch.sigmoid(margin) - consistency) / 6)
    torch.testing.assert_close(by_rejected, -by_chosen)
    assert others == [None] * 3


def test_the_best_margin_is_the_logit_of_the_consistency():
    """Fails when the label smooths in the other direction: a minimum at -logit(C)."""
    for consistency in (0.3, 0.6, 0.9):
        best = torch.tensor([math.log(consistency / (1 - consistency))], dtype=torch.float64)
        values = [consistency_dpo_loss(best + step, consistency).item() for step in (-0.01, 0.0, 0.01)]
        assert values[1] == min(values)


@pytest.mark.parametrize("far", [-1e4, 1e4])
def test_far_margins_stay_finite(far):
    """Fails when the loss is the logarithm of a sigmoid: infinite, or without a gradient."""
    margin = torch.tensor([far], requires_grad=True)
    loss = consistency_dpo_loss(margin, torch.tensor([0.8]))
    (slope,) = torch.autograd.grad(loss, margin)
    assert loss.isfinite()
    assert slope.item() == pytest.approx(0.2 if far > 0 else -0.8, abs=1e-6)


def test_equal_labels_make_one_label():
    """Fails when labels of each pair take another path than one for all."""
    margin = pairs()[1]
    each = consistency_dpo_loss(margin, torch.full((6,), 0.7, dtype=torch.float64))
    torch.testing.assert_close(each, consistency_dpo_loss(margin, 0.7), atol=1e-15, rtol=0)


def test_rows_are_those_whose_mean_is_taken():
    """Fails when ``reduction`` is ignored."""
    margin = pairs()[1]
    rows = consistency_dpo_loss(margin, 0.7, reduction="none")
    assert rows.shape == (6,)
    torch.testing.assert_close(rows.mean(), consistency_dpo_loss(margin, 0.7))


def test_margin_compares_with_the_reference():
    """Fails when the reference is added, or belongs to the other response."""
    margin = preference_margin(*(torch.tensor([x]) for x in (-1.0, -2.0, -4.0, -8.0)), beta=0.5)
    assert margin.item() == 0.5 * ((-1 + 4) - (-2 + 8))
