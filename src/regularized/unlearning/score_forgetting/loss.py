"""Score forgetting distillation: the two losses, one for each network that is trained.

Symbols of arXiv 2409.11219 and of its code, and their names here:

    a_t                ``schedule.alphas_cumprod``  product of 1 - beta up to step t, of T
    x_t                sqrt(a_t) x_0 + sqrt(1 - a_t) e,  e ~ N(0, I)
    phi                ``teacher``    the diffusion model that is there; it never changes
    psi                ``fake``       a copy that learns to denoise what the generator makes: the generator's own score
    theta              ``generator``  a copy that makes x_0 of pure noise in one evaluation, at step t_init
    x_0                ``x0``         (B, ...) what the generator made
    p, s               ``teacher_x0``, ``fake_x0``  what phi and psi take x_t for, without its noise
    c_f, c_o, r        ``forget``, ``override``, a kept label: the class to forget, the one that is put in its place
    lambda_r, lambda_f ``kept_weight``, ``forget_weight``
    alpha              ``alpha``
    w                  mean |p - x_0| of a sample, without gradient

    psi     minimises  lambda_r E |e_psi(x_t, t, r) - e|^2 + lambda_f E |e_psi(x_t, t, c_f) - e|^2
    theta   minimises  lambda_r E l(phi at r, psi at r)     + lambda_f E l(phi at c_o, psi at c_f)
            l = sum of (p - s) ((p - x_0) - alpha (p - s)) / w

With lambda_f = 0 this is score identity distillation. The whole of forgetting is that phi is asked about another class
than psi: samples for the forgotten prompt follow the teacher's score of c_o. Both losses are given for each sample, so
that kept and forgotten ones share a batch and differ in their weight.
"""

import torch
from torch import Tensor

__all__ = ["eps_matching_loss", "sid_generator_loss"]

_LEAST_SCALE = 1e-5  # of w; the authors' code


def eps_matching_loss(predicted: Tensor, noise: Tensor) -> Tensor:
    """Squared error of the predicted noise, summed over each sample: what a diffusion model is trained with.

    Args:
        predicted: (B, ...).
        noise: of the same shape, what was added.

    Returns:
        (B,).

    Raises:
        ValueError: shapes differ.

    Examples:
        >>> eps_matching_loss(torch.zeros(2, 3), torch.tensor([[1.0, 0.0, 2.0], [0.0, 0.0, 0.0]])).tolist()
        [5.0, 0.0]
    """
    if predicted.shape != noise.shape:
        raise ValueError(f"prediction and noise must have one shape, got {_shapes(predicted, noise)}")
    return (predicted - noise).square().flatten(1).sum(dim=1)


def sid_generator_loss(teacher_x0: Tensor, fake_x0: Tensor, x0: Tensor, *, alpha: float = 1.2) -> Tensor:
    """How far the generator's score is from the teacher's, seen at one noised sample each; it may be negative.

    The gradient is meant to reach ``x0`` through both networks. Where they were evaluated without gradient, take
    ``alpha=1``: that is Diff-Instruct, whose gradient is (p - s) / w, as in the authors' ``use_diffinst``.

    Args:
        teacher_x0: p, (B, ...), the teacher's estimate of the clean sample.
        fake_x0: s, of the same shape, the fake score's.
        x0: of the same shape, the generator's sample.
        alpha: default 1.2 (the authors' CIFAR-10 and STL-10).

    Returns:
        (B,), in float32 or wider.

    Raises:
        ValueError: shapes differ.

    Examples:
        >>> p, s, x0 = torch.tensor([[2.0]]), torch.tensor([[1.0]]), torch.tensor([[0.0]])
        >>> round(float(sid_generator_loss(p, s, x0)), 4)  # 1 (2 - 1.2 * 1) / 2
        0.4
    """
    if not teacher_x0.shape == fake_x0.shape == x0.shape:
        raise ValueError(f"both estimates and the sample must have one shape, got {_shapes(teacher_x0, fake_x0, x0)}")
    # Products of small differences: not in half precision.
    dtype = torch.promote_types(x0.dtype, torch.float32)
    p, s, x = (tensor.to(dtype).flatten(1) for tensor in (teacher_x0, fake_x0, x0))
    scale = (p - x).detach().abs().mean(dim=1).clamp(min=_LEAST_SCALE)
    return ((p - s) * ((p - x) - alpha * (p - s))).sum(dim=1) / scale


def _shapes(*tensors: Tensor) -> str:
    return " and ".join(str(tuple(tensor.shape)) for tensor in tensors)
