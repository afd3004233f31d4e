"""The regulariser: what the sheet promises, second derivations, and that it can fail."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from regularized.evidence.models import mlp, seeded
from regularized.mechanisms import distributed
from regularized.robustness.abnormal_examples import AbnormalExamplesLoss, abnormal_penalty, variation
from regularized.robustness.abnormal_examples import penalty as penalty_module
from regularized.robustness.attacks import OneStep, Threat, cross_entropies

SIZE, CLASSES = 16, 4


def outputs(seed=0, size=SIZE, spread=1.0):
    """Random outputs before and after; about half of the examples are abnormal."""
    draws = torch.Generator().manual_seed(seed)
    before, after = (torch.randn(size, CLASSES, generator=draws, dtype=torch.float64) for _ in range(2))
    return before, (spread * after).requires_grad_(), torch.randint(CLASSES, (size,), generator=draws)


def loss_and_gradient(criterion, before, after, labels):
    loss = criterion(before, cross_entropies(before, labels), after, labels)
    (gradient,) = torch.autograd.grad(loss, after)
    return loss, gradient


def active(spread=1.0):
    """Outputs on which abnormal examples move further than normal ones, so that the hinge is open."""
    for seed in range(100):
        before, after, labels = outputs(seed, spread=spread)
        seen = variation(before, cross_entropies(before, labels), after, cross_entropies(after, labels))
        if bool(seen.mixed) and seen.abnormal_change > seen.normal_change:
            return before, after, labels, seen
    raise AssertionError("no such seed")


def closed():
    """Outputs on which normal examples move further."""
    for seed in range(100):
        before, after, labels = outputs(seed)
        seen = variation(before, cross_entropies(before, labels), after, cross_entropies(after, labels))
        if bool(seen.mixed) and seen.abnormal_change < seen.normal_change:
            return before, after, labels
    raise AssertionError("no such seed")


def by_hand(before, after, labels, weights):
    """The formula of the sheet, sample by sample, with branches."""
    first, second = (F.cross_entropy(z, labels, reduction="none") for z in (before, after))
    loss, abnormal = second.mean(), [i for i in range(len(labels)) if first[i] > second[i]]
    normal = [i for i in range(len(labels)) if i not in abnormal]
    if abnormal and normal:
        moved = [sum((before[i, c] - after[i, c]) ** 2 for c in range(CLASSES)) for i in range(len(labels))]
        of_abnormal = sum(moved[i] for i in abnormal) / len(abnormal)
        of_normal = (sum(moved[i] for i in normal) / len(normal)).item()
        fall = sum((first[i] - second[i]).item() for i in abnormal) / len(abnormal)
        hinge = torch.clamp(of_abnormal - of_normal, min=0.0)
        loss = loss + weights[0] * len(abnormal) / len(labels) * (weights[1] * fall + weights[2] * hinge)
    return loss


@pytest.mark.parametrize("seed", range(8))
def test_it_is_the_formula(seed):
    """Fails when any part of the formula is another: the masks, a mean over the batch for one over A, the hinge."""
    before, after, labels = outputs(seed)
    criterion = AbnormalExamplesLoss(weight=0.7, loss_weight=1.3, output_weight=2.1)
    loss, gradient = loss_and_gradient(criterion, before, after, labels)
    expected = by_hand(before, after, labels, (0.7, 1.3, 2.1))
    (expected_gradient,) = torch.autograd.grad(expected, after)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("loss_weight", [0.0, 7.0])
def test_without_output_weight_gradients_are_those_of_the_host(loss_weight):
    """Fails when lambda2 reaches the gradient, or lambda3 = 0 leaves rounding behind: equal bit for bit."""
    before, after, labels, _ = active()
    criterion = AbnormalExamplesLoss(loss_weight=loss_weight, output_weight=0.0)
    _, gradient = loss_and_gradient(criterion, before, after, labels)
    (plain,) = torch.autograd.grad(F.cross_entropy(after, labels), after)
    assert torch.equal(gradient, plain)


def test_without_weight_it_is_cross_entropy():
    """Fails when lambda1 = 0 changes a bit of the loss."""
    before, after, labels, _ = active()
    loss, _ = loss_and_gradient(AbnormalExamplesLoss(weight=0.0), before, after, labels)
    assert torch.equal(loss, F.cross_entropy(after, labels))


@pytest.mark.parametrize("abnormal", [True, False])
def test_all_or_none_abnormal_is_cross_entropy(abnormal):
    """Fails when n = 0 or n = B is penalised or divides by zero, or a tie counts as abnormal."""
    before, after, labels = outputs()
    losses = cross_entropies(after.detach(), labels) + (1.0 if abnormal else 0.0)  # equal losses are normal
    criterion = AbnormalExamplesLoss()
    loss = criterion(before, losses, after, labels)
    assert int(criterion.seen.number) == (SIZE if abnormal else 0)
    assert torch.equal(loss, F.cross_entropy(after, labels))
    (gradient,) = torch.autograd.grad(loss, after)
    (plain,) = torch.autograd.grad(F.cross_entropy(after, labels), after)
    assert torch.equal(gradient, plain)


def test_a_closed_hinge_leaves_the_gradient_alone():
    """Fails when normal examples that move further give a negative penalty, or pull."""
    before, after, labels = closed()
    loss, gradient = loss_and_gradient(AbnormalExamplesLoss(loss_weight=0.0), before, after, labels)
    (plain,) = torch.autograd.grad(F.cross_entropy(after, labels), after)
    assert torch.equal(gradient, plain)
    assert torch.equal(loss, F.cross_entropy(after, labels))


def test_the_gradient_is_the_identity_of_the_sheet():
    """Fails when V_N or the number carries a gradient: only z1 - z0 of abnormal examples may."""
    before, after, labels, seen = active()
    _, gradient = loss_and_gradient(
        AbnormalExamplesLoss(weight=0.5, loss_weight=3.0, output_weight=2.0), before, after, labels
    )
    expected = (after.softmax(dim=1) - F.one_hot(labels, CLASSES)) / SIZE
    expected = expected + seen.abnormal[:, None] * (2 * 0.5 * 2.0 / SIZE) * (after - before)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-14)


def test_a_graph_behind_the_first_outputs_is_not_used():
    """Fails when z0 is differentiated: the code detaches it, and the gradient would pull both outputs together."""
    before, after, labels, _ = active()
    before.requires_grad_()
    loss = AbnormalExamplesLoss()(before, cross_entropies(before.detach(), labels), after, labels)
    assert torch.autograd.grad(loss, before, allow_unused=True)[0] is None


def test_the_loss_gradient_is_the_text_of_the_paper():
    """Fails when ``loss_gradient`` differentiates normal examples, or one of the two losses alone."""
    before, after, labels, seen = active()
    before.requires_grad_()
    criterion = AbnormalExamplesLoss(loss_weight=2.0, output_weight=0.0, loss_gradient=True)
    loss = criterion(before, cross_entropies(before, labels), after, labels)
    by_before, by_after = torch.autograd.grad(loss, [before, after])
    slope = [(z.softmax(dim=1) - F.one_hot(labels, CLASSES)) / SIZE for z in (before, after)]
    mask = seen.abnormal[:, None]
    torch.testing.assert_close(by_before, 2.0 * mask * slope[0])
    torch.testing.assert_close(by_after, slope[1] - 2.0 * mask * slope[1])


def test_a_linear_model_of_two_classes_has_no_abnormal_examples():
    """Fails when a step goes downhill or the comparison is the wrong way round: there each step raises the loss."""
    draws = torch.Generator().manual_seed(0)
    model = seeded(0, nn.Linear, 10, 2)
    x, y = 0.3 + 0.4 * torch.rand(200, 10, generator=draws), torch.randint(2, (200,), generator=draws)
    torch.manual_seed(0)
    found = OneStep(Threat(0.1, -5.0, 5.0), start=1.0, step=2.0, project=True)(model, x, y)
    criterion = AbnormalExamplesLoss()
    criterion(found.logits, found.losses, model(found.inputs), y)
    assert float(criterion.seen.number) == 0.0


def test_training_on_it_moves_abnormal_examples_less():
    """Fails when the sign of the penalty is wrong: descent on it alone must bring their outputs back."""
    before, after, labels, seen = active(spread=3.0)
    z = after.detach().clone().requires_grad_()
    for _ in range(5):
        losses = cross_entropies(z, labels).detach() * 0 + torch.where(seen.abnormal, -1.0, 1.0)
        now = variation(before, torch.zeros(SIZE).double(), z, losses)
        value = abnormal_penalty(before, torch.zeros(SIZE).double(), z, losses, now, loss_weight=0.0, output_weight=1.0)
        (gradient,) = torch.autograd.grad(value, z)
        z = (z - 0.05 * gradient).detach().requires_grad_()
    moved = [(t.detach() - before).square().sum(dim=1) for t in (after, z)]
    assert (moved[1][seen.abnormal] < moved[0][seen.abnormal]).all()
    assert torch.equal(moved[1][~seen.abnormal], moved[0][~seen.abnormal])


def test_the_shares_of_two_processes_sum_to_the_whole(monkeypatch):
    """Fails when a process compares with its own V_N or count: values and gradients must add up to one process's."""
    before, after, labels, _ = active()
    first, second = cross_entropies(before, labels), cross_entropies(after, labels)
    settings = {"loss_weight": 1.5, "output_weight": 2.0}
    whole = abnormal_penalty(before, first, after, second, variation(before, first, after, second), **settings)
    (gradient,) = torch.autograd.grad(whole, after, retain_graph=True)
    halves = (slice(0, 5), slice(5, SIZE))
    sums = []
    monkeypatch.setattr(penalty_module, "sum_over_processes", lambda t: sums.append(t[0]) or t)
    for half in halves:
        variation(before[half], first[half], after[half], second[half])
    monkeypatch.setattr(penalty_module, "sum_over_processes", lambda t: [sums[0] + sums[1]])
    parts = [
        abnormal_penalty(
            *(t[half] for t in (before, first, after, second)),
            variation(before[half], first[half], after[half], second[half]),
            **settings,
        )
        for half in halves
    ]
    torch.testing.assert_close(parts[0] + parts[1], whole)
    torch.testing.assert_close(torch.autograd.grad(parts[0] + parts[1], after)[0], gradient)
    assert distributed.world_size() == 1


def test_half_precision_is_summed_in_float32():
    """Fails when squares are taken in half precision, where 300 squared is infinite."""
    before = torch.zeros(4, CLASSES, dtype=torch.float16)
    after = before.clone()
    after[0, 0] = 300.0
    losses = torch.tensor([1.0, 0.0, 0.0, 0.0]), torch.tensor([0.0, 1.0, 1.0, 1.0])
    seen = variation(before, losses[0], after, losses[1])
    assert float(seen.abnormal_change) == 90_000.0


def test_the_attack_of_a_deep_network_has_abnormal_examples():
    """Fails when the warning cannot be seen at all: a radius too large for one step must leave some."""
    model, draws = seeded(0, mlp, [6, 32, 32, 4]), torch.Generator().manual_seed(0)
    x, y = torch.randn(300, 6, generator=draws), torch.randint(4, (300,), generator=draws)
    found = OneStep.fgsm(Threat(1.0, -9.0, 9.0))(model, x, y)
    criterion = AbnormalExamplesLoss()
    criterion(found.logits, found.losses, model(found.inputs), y)
    assert 0 < float(criterion.seen.number) < 300
