"""T-JEPA: from some columns of a row, predict how an averaged copy of the encoder sees other columns.

    Thimonier, De Melo Costa, Popineau, Rimmel, Doan, "T-JEPA: Augmentation-Free Self-Supervised Learning for Tabular
    Data", ICLR 2025, arXiv 2410.05016; official code jose-melo/t-jepa at 98dda99.

=============  ============================================  ===================================================
paper          here                                          meaning
=============  ============================================  ===================================================
x, D           ``x`` (B, D)                                  rows; numbers in [0, 1], categories as codes
[REG], R       ``reg_tokens``                                learned tokens before those of the columns
h              ``dim``                                       width of the representation of a token
f              :class:`TabularTransformer`                   context encoder, sees R + n_c tokens
f'             ``TJEPA.target``                              its moving average, sees all R + D, no gradient
g, d           :class:`TargetPredictor`, ``dim`` of it       predicts at the positions of a target
C, n_c         ``context`` (B, n_c)                          tokens that f sees
T_k, n_t, K    ``targets`` (K, B, n_t)                       tokens whose representation is predicted
m              ``momentum``                                  share of f' that stays in an update
=============  ============================================  ===================================================

The loss is the mean over rows, targets, tokens and entries of ``(g(f(x_C), C, T_k) - f'(x)_{T_k})^2``. There are no
labels, no negatives and no augmentation; what keeps the constant away is the averaged copy alone, so look at
:func:`collapse_report`.
"""

from torch import Tensor
from torch.nn import functional as F

__all__ = ["prediction_loss"]


def prediction_loss(predicted: Tensor, wanted: Tensor) -> Tensor:
    """Mean squared error against representations that get no gradient.

    Args:
        predicted: (K, B, n_t, h) of the predictor.
        wanted: the same of the averaged encoder.

    Returns:
        Scalar.

    Raises:
        ValueError: the shapes differ.

    Examples:
        >>> import torch
        >>> prediction_loss(torch.ones(1, 2, 3, 4), torch.zeros(1, 2, 3, 4))
        tensor(1.)
    """
    if predicted.shape != wanted.shape:
        raise ValueError(
            "predictions and targets must have one shape (targets, rows, tokens, width), got "
            f"{tuple(predicted.shape)} and {tuple(wanted.shape)}"
        )
    return F.mse_loss(predicted, wanted.detach())
