"""The losses of a student against a teacher, and their chunked form."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from regularized.self_supervised.random_teacher.loss import chunked_distillation_loss, distillation_losses


def outputs(seed=0, shape=(5, 7)):
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(*shape, dtype=torch.float64, generator=generator) for _ in range(2))


@given(seed=st.integers(0, 30), tau=st.floats(0.05, 3), tau_teacher=st.floats(0.05, 3), batch=st.integers(1, 4))
@settings(max_examples=20)
def test_gradient_is_the_difference_of_probabilities(seed, tau, tau_teacher, batch):
    """(q - p) / (tau_S B) for both; fails with the arguments of KL exchanged, or without the 1 / tau."""
    student, teacher = outputs(seed, (batch, 4))
    student.requires_grad_()
    expected = ((student / tau).softmax(1) - (teacher / tau_teacher).softmax(1)) / (tau * batch)
    for loss in ("kl", "ce"):
        value = distillation_losses(
            student, teacher, loss=loss, student_temperature=tau, teacher_temperature=tau_teacher
        ).mean()
        (gradient,) = torch.autograd.grad(value, student)
        torch.testing.assert_close(gradient, expected.detach(), rtol=1e-9, atol=1e-12)


def test_cross_entropy_less_kl_is_the_teachers_entropy():
    """Fails when the entropy has the wrong sign, or is the student's."""
    student, teacher = outputs()
    difference = distillation_losses(student, teacher, loss="ce") - distillation_losses(student, teacher)
    torch.testing.assert_close(difference, torch.distributions.Categorical(logits=teacher).entropy())


def test_torch_says_the_same():
    """An independent implementation; fails when the mean is over all entries instead of samples, or the reverse."""
    student, teacher = outputs()
    kl = F.kl_div(student.log_softmax(1), teacher.softmax(1), reduction="batchmean")
    torch.testing.assert_close(distillation_losses(student, teacher).mean(), kl)
    torch.testing.assert_close(distillation_losses(student, teacher, loss="mse").mean(), F.mse_loss(student, teacher))


def test_no_gradient_reaches_the_teacher():
    """Fails when the teacher's outputs are not detached."""
    student, teacher = outputs()
    teacher.requires_grad_()
    for loss in ("kl", "ce", "mse"):
        value = distillation_losses(student.requires_grad_(), teacher, loss=loss).sum()
        assert torch.autograd.grad(value, teacher, allow_unused=True) == (None,)


def test_half_precision_is_computed_in_float32():
    """Fails when log_softmax stays in bfloat16: the loss would be off by percents."""
    student, teacher = (z.to(torch.bfloat16) for z in outputs(shape=(2, 4096)))
    exact = distillation_losses(student.double(), teacher.double())
    ours = distillation_losses(student, teacher)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chunk", [1, 2, 5, 100])
@pytest.mark.parametrize("loss", ["kl", "ce", "mse"])
def test_chunked_is_the_plain_loss(loss, chunk):
    """Value and both gradients; fails when a part is left out, or the scale of the outer loss is dropped."""
    generator = torch.Generator().manual_seed(0)
    h, w, g, v = (
        torch.randn(*shape, dtype=torch.float64, generator=generator, requires_grad=grad)
        for shape, grad in (((5, 3), True), ((11, 3), True), ((5, 4), False), ((11, 4), False))
    )
    options = {"loss": loss, "student_temperature": 0.7, "teacher_temperature": 0.3}
    plain = 0.3 * distillation_losses(h @ w.T, g @ v.T, **options).sum()
    ours = 0.3 * chunked_distillation_loss(h, w, g, v, chunk=chunk, **options)
    torch.testing.assert_close(ours, plain)
    for a, b in zip(torch.autograd.grad(ours, (h, w)), torch.autograd.grad(plain, (h, w)), strict=True):
        torch.testing.assert_close(a, b)


def test_chunked_computes_only_what_is_asked_for():
    """Fails when a frozen last matrix, or a call without gradient, is differentiated anyway."""
    h, w = torch.randn(4, 3, requires_grad=True), torch.randn(6, 3)
    value = chunked_distillation_loss(h, w, h.detach(), 2 * w, chunk=2)
    value.backward()
    assert w.grad is None
    assert h.grad is not None
    with torch.no_grad():
        assert not chunked_distillation_loss(h, w, h, 2 * w, chunk=2).requires_grad


def test_chunked_never_holds_all_outputs():
    """Fails when the (B, C) outputs exist at once: the reason of the function."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple) else (out,):
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return out

    h, w = torch.randn(64, 2, requires_grad=True), torch.randn(500, 2, requires_grad=True)
    with Watch():
        chunked_distillation_loss(h, w, h.detach(), w.detach() * 2, chunk=4).backward()
    assert largest <= max(4 * 500, w.numel())


def test_chunked_loss_refuses_a_second_derivative():
    """Fails when the stored gradient is taken for a constant: a second derivative of 0, without a word."""
    h = torch.randn(4, 3, requires_grad=True)
    w, other = torch.randn(5, 3), torch.randn(5, 3)
    loss = chunked_distillation_loss(h, w, h.detach(), other, chunk=3) + h.square().sum()
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(loss, h, create_graph=True)


def test_chunked_loss_makes_nothing_on_the_default_device():
    """Fails when positions are counted by a tensor on the default device, which need not be that of the features."""
    h, w, other = torch.randn(4, 3), torch.randn(5, 3), torch.randn(5, 3)
    expected = distillation_losses(h @ w.T, h @ other.T).sum()
    with torch.device("meta"):
        torch.testing.assert_close(chunked_distillation_loss(h, w, h, other, chunk=3), expected)
