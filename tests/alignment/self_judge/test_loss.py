"""The loss of two views, checked against formulas, limits and symmetries."""

import pytest
import torch
from torch.nn import functional as F

from regularized.alignment.self_judge import PrivilegedDistillation, view_divergence, views_loss

EOS = 2


def rows(count=6, vocabulary=11, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    z = [torch.randn(count, vocabulary, generator=g, dtype=dtype).requires_grad_() for _ in range(2)]
    return *z, torch.randint(3, vocabulary, (count,), generator=g)


def sequences(lengths=(9, 6), batch=3, vocabulary=11, seed=0):
    """Logits and labels of two views of different length: prompt, grade, end."""
    g = torch.Generator().manual_seed(seed)
    grades = torch.randint(3, vocabulary, (batch,), generator=g)
    logits, labels = [], []
    for length in lengths:
        logits.append(torch.randn(batch, length, vocabulary, generator=g, dtype=torch.float64).requires_grad_())
        t = torch.full((batch, length), -100)
        t[:, -2], t[:, -1] = grades, EOS
        labels.append(t)
    return *logits, *labels


def test_second_derivation():
    """Fails when labels are not shifted, a mean is a sum, the end is compared, or the divergence is turned round."""
    z1, z2, t1, t2 = sequences()
    found = PrivilegedDistillation(alpha=0.3, alpha_kd=2.0, eos_id=EOS)(z1, z2, t1, t2)
    expected = 0.0
    batch = len(z1)
    for sample in range(batch):
        p1, p2 = (z[sample].exp() / z[sample].exp().sum(-1, keepdim=True) for z in (z1, z2))
        for place in (-2, -1):  # the grade, the end: each predicted by the position before
            label = int(t1[sample, place])
            expected = expected - (p1[place - 1, label].log() + 0.3 * p2[place - 1, label].log()) / (2 * batch)
        a, b = p1[-3], p2[-3]
        expected = expected + 2.0 * (a * (a.log() - b.log())).sum() / batch
    torch.testing.assert_close(found, expected)


def test_without_coefficients_it_is_cross_entropy_of_the_teacher():
    """Bit for bit. Fails when a coefficient of 0 leaves something of the other view, even if that is not finite."""
    z1, z2, t = rows()
    assert torch.equal(views_loss(z1, z2 * torch.inf, t, alpha=0.0, alpha_kd=0.0), F.cross_entropy(z1, t))


def test_equal_views():
    """Fails when the divergence of equal views is not 0, or alpha weighs the wrong view."""
    z1, _, t = rows()
    torch.testing.assert_close(views_loss(z1, z1, t, alpha=0.3), 1.3 * F.cross_entropy(z1, t))
    assert float(view_divergence(z1, z1).abs().max()) == 0.0


def test_gradients_of_the_divergence():
    """alpha_kd (p2 - p1) / M by the student, 0 by the teacher. Fails when the detach is missing, or M is B times V."""
    z1, z2, t = rows()
    with_kd, without = (views_loss(z1, z2, t, alpha_kd=kd) for kd in (2.0, 0.0))
    by_z1, by_z2 = torch.autograd.grad(with_kd - without, (z1, z2))
    torch.testing.assert_close(by_z2, 2.0 * (z2.softmax(1) - z1.softmax(1)) / len(z1))
    assert float(by_z1.abs().max()) < 1e-15


def test_the_teacher_can_learn_from_the_student_where_it_is_asked_to():
    """Fails when detach_teacher=False is ignored."""
    z1, z2, t = rows()
    (by_z1,) = torch.autograd.grad(
        PrivilegedDistillation(alpha_kd=2.0, detach_teacher=False)(z1, z2, t) - F.cross_entropy(z1, t), z1
    )
    assert float(by_z1.abs().max()) > 1e-3


def test_symmetries():
    """Fails when rows are paired by value instead of place, or softmax is not taken over the last dimension."""
    z1, z2, t = rows()
    order = torch.randperm(len(t), generator=torch.Generator().manual_seed(1))
    loss = views_loss(z1, z2, t)
    torch.testing.assert_close(views_loss(z1[order], z2[order], t[order]), loss)
    shift = torch.linspace(-30, 30, len(t), dtype=torch.float64)[:, None]
    torch.testing.assert_close(views_loss(z1 + shift, z2 - shift, t), loss)
    assert bool((view_divergence(z1, z2) >= 0).all())
    assert float((view_divergence(z1[order], z2) - view_divergence(z1, z2)).abs().max()) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_logits_stay_finite(dtype):
    """Fails when the logarithm is taken of a softmax, as in the official code."""
    z1, z2, t = rows(dtype=dtype)
    z1, z2 = (1e4 * z.detach().sign() * s for z, s in ((z1, 1), (z2, -1)))
    z2.requires_grad_()
    loss = views_loss(z1, z2, t)
    loss.backward()
    assert bool(loss.isfinite())
    assert bool(z2.grad.isfinite().all())
    assert loss.dtype == torch.float32


def test_only_graded_rows_are_compared():
    """Fails when the end of the sequence takes part in the divergence, or the graded rows do not."""
    z1, z2, t1, t2 = sequences()
    criterion = PrivilegedDistillation(alpha=0.0, alpha_kd=1.0, eos_id=EOS)
    (by_z2,) = torch.autograd.grad(criterion(z1, z2, t1, t2), z2)
    touched = (by_z2.abs().amax(dim=-1) > 0).nonzero()
    assert touched.tolist() == [[sample, z2.shape[1] - 3] for sample in range(len(z2))]


def test_half_precision_is_lifted():
    """Fails when the softmax is taken in bfloat16."""
    z1, z2, t = rows(dtype=torch.bfloat16)
    exact = views_loss(z1.float(), z2.float(), t)
    assert torch.equal(views_loss(z1, z2, t), exact)
