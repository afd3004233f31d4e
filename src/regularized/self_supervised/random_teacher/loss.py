"""The losses of a student against a teacher's outputs, and the same for outputs too wide to hold.

With q = softmax(z_S / tau_S) and p = softmax(z_T / tau_T), per sample::

    "ce"    - sum_c p_c log q_c
    "kl"      sum_c p_c (log p_c - log q_c)             the cross-entropy less the teacher's entropy
    "mse"     mean_c (z_S / tau_S - z_T / tau_T)^2

By the student's outputs the gradient of the first two is the same, ``(q - p) / tau_S``.
"""

from typing import Any, Literal, TypeAlias, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from regularized.mechanisms.ranges import Choice, positive

__all__ = ["Loss", "chunked_distillation_loss", "distillation_losses"]

Loss: TypeAlias = Literal["kl", "ce", "mse"]
LOSS = Choice("kl", "ce", "mse")
TEMPERATURE = positive(remedy="1 leaves the outputs as they are")

# Shapes: B samples, C outputs, K features of the bottleneck before the outputs.


def distillation_losses(
    student: Tensor,
    teacher: Tensor,
    *,
    loss: Loss = "kl",
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
) -> Tensor:
    """Loss of each sample, in float32 or wider.

    Args:
        student: (B, C) raw outputs of the student.
        teacher: (B, C) raw outputs of the teacher; constant.
        loss: ``"kl"`` (default: 0 says that the teacher is copied), ``"ce"`` (official configuration; same gradient),
            or ``"mse"`` (the authors' later configuration).
        student_temperature: tau_S > 0; default 1 (configs/cifar10_distillation_v2.json).
        teacher_temperature: tau_T > 0; default 1 (the same).

    Returns:
        (B,).

    Raises:
        ValueError: the shapes differ, there is one output only, a temperature is not positive, or an unknown loss.

    Examples:
        >>> z = torch.tensor([[0.0, 1.0]])
        >>> distillation_losses(z, z), distillation_losses(z, z + 1, loss="mse")
        (tensor([0.]), tensor([1.]))
    """
    check_settings(loss, student_temperature, teacher_temperature)
    if student.shape != teacher.shape or student.ndim < 2:
        raise ValueError(
            "student and teacher must have outputs of one shape (B, C), got "
            f"{tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    if student.shape[-1] < 2:
        raise ValueError(
            "student and teacher have one output only; a softmax over one class is always 1 and its loss 0. Give the "
            "head at least 2 outputs (the paper: 65536)"
        )
    # In half precision the sum over many classes would lose the small probabilities.
    dtype = torch.promote_types(student.dtype, torch.float32)
    z_student = student.to(dtype) / student_temperature
    z_teacher = teacher.detach().to(dtype) / teacher_temperature
    if loss == "mse":
        return (z_student - z_teacher).square().mean(dim=-1)
    log_q, log_p = F.log_softmax(z_student, dim=-1), F.log_softmax(z_teacher, dim=-1)
    p = log_p.exp()
    if loss == "ce":
        return -(p * log_q).sum(dim=-1)
    return (p * (log_p - log_q)).sum(dim=-1)


def chunked_distillation_loss(
    student_features: Tensor,
    student_weight: Tensor,
    teacher_features: Tensor,
    teacher_weight: Tensor,
    *,
    chunk: int,
    loss: Loss = "kl",
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
) -> Tensor:
    """Sum of :func:`distillation_losses` for outputs ``z = features @ weight.T``, holding only a part of them at once.

    With 65,536 outputs and 256 samples each (B, C) array takes 67 MB, and the plain loss holds several. Here a few
    samples at a time are taken from features to gradient, in the forward pass, since the gradient is known in closed
    form. The arithmetic is that of the plain loss.

    Args:
        student_features: (B, K).
        student_weight: (C, K).
        teacher_features: (B, L); constant.
        teacher_weight: (C, L); constant.
        chunk: samples at a time, at least 1.
        loss: as in :func:`distillation_losses`.
        student_temperature: tau_S > 0.
        teacher_temperature: tau_T > 0.

    Returns:
        Scalar, the sum over the batch; 0 for an empty one. It can be differentiated once.

    Raises:
        ValueError: ``chunk`` below 1, or what :func:`distillation_losses` refuses.
        RuntimeError: differentiated with ``create_graph=True``; :func:`distillation_losses` has second derivatives.

    Examples:
        >>> h, w = torch.randn(5, 3, requires_grad=True), torch.randn(7, 3)
        >>> ours = chunked_distillation_loss(h, w, h.detach(), 2 * w, chunk=2)
        >>> torch.allclose(ours, distillation_losses(h @ w.T, h @ (2 * w).T).sum())
        True
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, the samples whose outputs are held at once; got {chunk}")
    check_settings(loss, student_temperature, teacher_temperature)
    settings = (loss, student_temperature, teacher_temperature, chunk, torch.is_grad_enabled())
    value: Tensor = _Chunked.apply(  # type: ignore[no-untyped-call]
        student_features, student_weight, teacher_features.detach(), teacher_weight.detach(), settings
    )
    return value


class _Chunked(torch.autograd.Function):
    """Loss and gradient of a part of the batch at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        weight: Tensor,
        h_teacher: Tensor,
        weight_teacher: Tensor,
        settings: tuple[Loss, float, float, int, bool],
    ) -> Tensor:
        loss, tau, tau_teacher, chunk, grad = settings
        dtype = torch.promote_types(h.dtype, torch.float32)
        total = h.new_zeros((), dtype=dtype)
        by_h = torch.empty_like(h) if grad and ctx.needs_input_grad[0] else None
        by_weight = torch.zeros_like(weight) if grad and ctx.needs_input_grad[1] else None
        for start in range(0, len(h), chunk):
            part = slice(start, start + chunk)
            z = F.linear(h[part], weight).to(dtype)
            z_teacher = F.linear(h_teacher[part], weight_teacher).to(dtype)
            value, by_z = _loss_and_gradient(z.div_(tau), z_teacher.div_(tau_teacher), loss)
            total += value
            by_z = by_z.div_(tau).to(weight.dtype)
            if by_h is not None:
                by_h[part] = by_z @ weight
            if by_weight is not None:
                by_weight.addmm_(by_z.T, h[part].to(weight.dtype))
        ctx.save_for_backward(by_h, by_weight)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True: what is stored would pass for a constant
            raise RuntimeError(
                "chunked_distillation_loss can be differentiated once, its gradient has no graph; take "
                "distillation_losses(...).sum() where second derivatives are needed"
            )
        (scale,) = grad_outputs
        by_h, by_weight = cast(tuple[Tensor | None, Tensor | None], ctx.saved_tensors)
        return (
            None if by_h is None else by_h * scale.to(by_h.dtype),
            None if by_weight is None else by_weight * scale.to(by_weight.dtype),
            None,
            None,
            None,
        )


def _loss_and_gradient(z: Tensor, z_teacher: Tensor, loss: Loss) -> tuple[Tensor, Tensor]:
    """Sum of the losses of tempered outputs, and its gradient by the student's; both arguments are used up."""
    if loss == "mse":
        difference = z.sub_(z_teacher)
        value = difference.square().sum() / z.shape[-1]
        return value, difference.mul_(2.0 / z.shape[-1])
    log_q, log_p = F.log_softmax(z, dim=-1), F.log_softmax(z_teacher, dim=-1)
    p = torch.exp(log_p, out=z_teacher)
    # Differences first: of two entropies near 11 (65,536 outputs) float32 would leave nothing of a small divergence.
    against = log_p.sub_(log_q) if loss == "kl" else log_q.neg()
    return torch.dot(p.flatten(), against.flatten()), log_q.exp_().sub_(p)


def check_settings(loss: str, student_temperature: float, teacher_temperature: float) -> None:
    """Refuse an unknown loss and temperatures that are not positive."""
    LOSS("loss", loss)
    TEMPERATURE("student_temperature", student_temperature)
    TEMPERATURE("teacher_temperature", teacher_temperature)
