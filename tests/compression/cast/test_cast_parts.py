"""Masks, scales and the distilled loss of CAST."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from regularized.compression.cast import (
    ScaledLinear,
    distillation_loss,
    fold_scales,
    follows_pattern,
    scale_weights,
    semi_structured_mask,
)


def by_sorting(weight, n, m):
    """N largest of each group; of equal ones the first."""
    mask = torch.zeros_like(weight, dtype=torch.bool)
    for row, start in itertools.product(range(weight.shape[0]), range(0, weight.shape[1], m)):
        group = weight[row, start : start + m].abs().tolist()
        for k in sorted(range(m), key=lambda k: (-group[k], k))[:n]:
            mask[row, start + k] = True
    return mask


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 4), (1, 2), (4, 8), (5, 16), (1, 12)])
def test_mask_keeps_the_largest(n, m):
    """Fails when a comparison is turned round, by either way of finding them, or ties do not go to the first."""
    weight = torch.randint(-3, 4, (7, 4 * m), generator=torch.Generator().manual_seed(n * m)).float()
    mask = semi_structured_mask(weight, (n, m))
    assert torch.equal(mask, by_sorting(weight, n, m))
    assert (mask.unflatten(1, (-1, m)).sum(-1) == n).all()
    assert follows_pattern(weight * mask, (n, m))


@pytest.mark.parametrize("m", [4, 16])
@pytest.mark.parametrize("value", [0.0, -1.0])
def test_equal_weights_keep_exactly_n(m, value):
    """Fails when a threshold decides: it would keep all of a group of equal weights."""
    mask = semi_structured_mask(torch.full((3, 2 * m), value), (2, m))
    assert torch.equal(mask, (torch.arange(2 * m) % m < 2).expand(3, -1))


def test_follows_pattern_counts_per_group():
    """Fails when zeros are counted over a row: half of it may be zero in the wrong places."""
    assert not follows_pattern(torch.tensor([[1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0]]))
    assert follows_pattern(torch.tensor([[1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0]]))
    assert not follows_pattern(torch.zeros(2, 6))
    assert not follows_pattern(torch.zeros(4))


# -- scales --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_scales_of_one_change_no_bit(bias):
    """Fails when the scaled weight is computed otherwise than by one product."""
    linear, x = nn.Linear(8, 6, bias=bias), torch.randn(5, 3, 8)
    known = linear(x)
    assert torch.equal(ScaledLinear.of(linear, groups=4)(x), known)


def test_blocks_are_contiguous_columns():
    """Fails when a factor belongs to every n-th column instead of a block of neighbours."""
    linear = nn.Linear(4, 1, bias=False)
    nn.init.ones_(linear.weight)
    layer = ScaledLinear.of(linear, groups=2)
    layer.scale.data = torch.tensor([[2.0, 3.0]])
    assert layer.scaled_weight().tolist() == [[2.0, 2.0, 3.0, 3.0]]


def test_gradients_of_the_scales():
    """Fails when the gradient of A or W is not that of the product."""
    layer = ScaledLinear.of(nn.Linear(8, 3, dtype=torch.float64), groups=2)
    x = torch.randn(4, 8, dtype=torch.float64)

    def output(weight, scale):
        return torch.func.functional_call(layer, {"weight": weight, "scale": scale}, (x,))

    scale = torch.rand(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(output, (layer.weight, scale))


def test_folding_keeps_outputs_zeros_and_parameters():
    """Fails when folding changes what the model computes, fills zeros, or puts a new parameter into the model."""
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    weight = model[0].weight
    weight.data.mul_(semi_structured_mask(weight))
    names = set(model.state_dict())
    scale_weights(model, ["0", "2"], groups=2)
    assert set(model.state_dict()) == {*names, "0.scale", "2.scale"}
    for layer in (model[0], model[2]):
        layer.scale.data.uniform_(0.5, 1.5)
    x = torch.randn(5, 8)
    before, zeros = model(x), weight == 0
    assert fold_scales(model) == ["0", "2"]
    torch.testing.assert_close(model(x), before)
    assert model[0].weight is weight
    assert torch.equal(weight == 0, zeros)
    assert type(model[0]) is nn.Linear
    assert not model[0].training
    assert set(model.state_dict()) == names


def test_a_scaled_model_can_be_copied_and_loaded():
    """Fails when a deep copy shares parameters, or the state of a plain model does not fit but for the scales."""
    plain = nn.Sequential(nn.Linear(8, 4))
    state = copy.deepcopy(plain.state_dict())
    scale_weights(plain, ["0"], groups=2)
    twin = copy.deepcopy(plain)
    assert twin[0].weight is not plain[0].weight
    missing, unexpected = twin.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["0.scale"], [])


# -- the loss ------------------------------------------------------------------------------------


def logits(seed, shape=(7, 5)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


LABELS = torch.tensor([0, 4, 2, 1, 1, 3, 0])


def test_without_the_teacher_it_is_cross_entropy():
    """Fails when eta=0 is not the plain loss bit for bit, gradient included."""
    ours, theirs = logits(0).requires_grad_(), logits(0).requires_grad_()
    loss = distillation_loss(ours, None, LABELS, eta=0.0).loss
    known = F.cross_entropy(theirs, LABELS)
    loss.backward()
    known.backward()
    assert torch.equal(loss, known)
    assert torch.equal(ours.grad, theirs.grad)


def test_a_teacher_like_the_student_teaches_nothing():
    """Fails when the divergence of equal distributions, or its gradient, is not zero."""
    student = logits(0).requires_grad_()
    found = distillation_loss(student, logits(0), LABELS, eta=1.0)
    found.loss.backward()
    assert found.loss.item() == 0.0
    assert student.grad.abs().max() < 1e-7


def test_a_teacher_of_one_hot_is_cross_entropy():
    """Fails when a probability of zero becomes NaN: the divergence from one-hot is the cross-entropy (entropy 0)."""
    student = logits(0).requires_grad_()
    certain = torch.full((7, 5), -torch.inf).scatter(1, LABELS[:, None], 0.0)
    found = distillation_loss(student, certain, LABELS, eta=1.0)
    torch.testing.assert_close(found.loss, F.cross_entropy(student, LABELS))
    found.loss.backward()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_against_torchs_divergence(temperature):
    """Fails when teacher and student are exchanged, shares are, or the temperature's square is left out."""
    student, teacher = logits(0), logits(1)
    found = distillation_loss(student, teacher, LABELS, eta=0.25, temperature=temperature)
    kl = (
        F.kl_div(F.log_softmax(student / temperature, 1), F.softmax(teacher / temperature, 1), reduction="batchmean")
        * temperature**2
    )
    torch.testing.assert_close(found.kl, kl)
    torch.testing.assert_close(found.loss, 0.25 * kl + 0.75 * F.cross_entropy(student, LABELS))


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ignored_tokens_count_nowhere(eta):
    """Fails when an ignored token is averaged over, or a sum is not the mean times the number of the others."""
    ignored = LABELS.clone()
    ignored[[1, 4]] = -100
    kept = ignored >= 0
    student, teacher = logits(0), logits(1)
    found = distillation_loss(student, teacher, ignored, eta=eta)
    known = distillation_loss(student[kept], teacher[kept], LABELS[kept], eta=eta)
    torch.testing.assert_close(found.loss, known.loss)
    total = distillation_loss(student[None], teacher[None], ignored[None], eta=eta, reduction="sum")
    torch.testing.assert_close(total.loss, 5 * found.loss)
    nothing = distillation_loss(student, teacher, torch.full((7,), -100), eta=eta, reduction="sum")
    assert nothing.loss.item() == 0.0
