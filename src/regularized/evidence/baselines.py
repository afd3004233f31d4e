"""What a user would try first: losses that experiments compare with, beside plain cross-entropy and early stopping."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regularized.mechanisms.mixup import draw_mix

__all__ = ["generalized_cross_entropy", "mixup_loss"]


def generalized_cross_entropy(logits: Tensor, labels: Tensor, q: float) -> Tensor:
    """``(1 - p_y^q) / q``, between cross-entropy (q to 0) and the mean absolute error (q = 1); mean over the batch.

    Zhang and Sabuncu, Generalized Cross Entropy Loss for Training Deep Neural Networks with Noisy Labels, 2018.

    Args:
        logits: (B, C).
        labels: (B,) int64.
        q: in (0, 1]; the paper's is 0.7.

    Examples:
        >>> logits = torch.tensor([[0.0, 0.0]])
        >>> generalized_cross_entropy(logits, torch.tensor([0]), 1.0)
        tensor(0.5000)
    """
    if not 0.0 < q <= 1.0:
        raise ValueError(f"q must be in (0, 1], got {q}")
    log_p = -F.cross_entropy(logits, labels, reduction="none")
    return -torch.expm1(q * log_p).mean() / q


def mixup_loss(net: nn.Module, inputs: Tensor, labels: Tensor, alpha: float, generator: torch.Generator) -> Tensor:
    """Cross-entropy on convex combinations of pairs of samples, one share for the batch; mean over the batch.

    Zhang, Cisse, Dauphin and Lopez-Paz, mixup: Beyond Empirical Risk Minimization, 2018.

    Args:
        net: from inputs to logits (B, C).
        inputs: (B, ...).
        labels: (B,) int64.
        alpha: of the Beta distribution of the share; positive. The paper has 1 for images, 8 and 32 for wrong labels.
        generator: decides pairs and share; on the processor.

    Examples:
        >>> net = nn.Linear(3, 2)
        >>> mixup_loss(net, torch.randn(4, 3), torch.tensor([0, 1, 1, 0]), 1.0, torch.Generator()).shape
        torch.Size([])
    """
    if alpha <= 0.0:
        raise ValueError(f"alpha must be positive, got {alpha}")
    mix = draw_mix(len(inputs), alpha, generator=generator, device=inputs.device)
    logits = net(mix(inputs))
    own, partners = F.cross_entropy(logits, labels), F.cross_entropy(logits, labels[mix.partner])
    return mix.share * own + (1.0 - mix.share) * partners
