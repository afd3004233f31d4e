"""Which neurons hold the rule and which hold the noise: periodicity scores, accuracies by subset, pruning by score.

For whoever trains on partly wrong labels, and wants to see memorisation and generalisation apart.

    Doshi, Das, He, Gromov, "To grok or not to grok: Disentangling generalization and memorization on corrupted
    algorithmic datasets", 2023, arXiv 2310.13061. Official code: github.com/d-doshi/Grokking at 0b4335f (no licence
    file).

==========  ============================  ============================================================================
paper       here                          meaning
==========  ============================  ============================================================================
u           a row of weights              (p,) what a neuron makes of each number
IPR_r       ``inverse_participation...``  sum over frequencies of ``(a_k / ||a||)^(2 r)`` with ``a = |rfft(u)|``
rho         ``fraction``                  share of the neurons that is pruned
==========  ============================  ============================================================================

A neuron that serves the rule is a cosine of the number, with a single frequency: its IPR is 1. One that remembers
samples has all frequencies: about 3 / p. Text and code differ: in the text each frequency counts twice (a cosine has
1/2), the code takes ``rfft``; we follow the code. *The scores mean something only where the numbers form a cycle on
which the rule is a shift*; with the inputs in another order they are other numbers.

The accuracies by subset need no such structure: :func:`subset_accuracies` measures any classifier. The task and the
networks are in :mod:`regularized.understanding.grokking.modular_arithmetic`, phases of a whole training in
:mod:`regularized.understanding.grokking.phases`.
"""

from typing import TypeAlias

import torch
from torch import Tensor

__all__ = ["gini", "inverse_participation_ratio", "neuron_ipr", "score_correlation", "spectrum"]

# Shapes: N neurons, p numbers in a cycle, n training samples, m operands (2 for pairs).

Maps: TypeAlias = tuple[Tensor, Tensor]


def spectrum(rows: Tensor, *, dim: int = -1) -> Tensor:
    """Amplitudes ``|rfft|`` along an axis of length p: ``p // 2 + 1`` of them, the mean's among them.

    Args:
        rows: any shape; half precision is widened.
        dim: the group axis.

    Returns:
        The same shape with the axis last, and shortened.

    Examples:
        >>> spectrum(torch.ones(4))
        tensor([4., 0., 0.])
    """
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))  # no transform in half precision
    amplitudes: Tensor = torch.fft.rfft(wide.movedim(dim, -1)).abs()
    return amplitudes


def inverse_participation_ratio(rows: Tensor, *, dim: int = -1, r: float = 2) -> Tensor:
    """How concentrated the Fourier spectrum is: 1 for a cosine or a constant, 1/m for m equal frequencies.

    The mean counts as a frequency, as in the official code. Cost: one transform. For the embedding of a transformer
    take ``dim=0``, the axis of the numbers.

    Args:
        rows: weights; the axis ``dim`` runs over the numbers 0 ... p - 1 in their cyclic order.
        dim: the group axis; default the last.
        r: order, > 1; default 2 (official), the sum of squared shares of power.

    Returns:
        The shape without that axis, values in ``[(p // 2 + 1)^(1 - r), 1]``; 0 where all is zero.

    Raises:
        ValueError: ``r`` is not above 1.

    Examples:
        >>> n = torch.arange(7) * (2 * torch.pi / 7)
        >>> inverse_participation_ratio(torch.stack([torch.cos(2 * n + 1), torch.cos(n) + torch.cos(3 * n)]))
        tensor([1.0000, 0.5000])
    """
    if not r > 1:
        raise ValueError(f"r must be above 1 (at 1 every spectrum has the ratio 1), got {r}; the official code has 2")
    amplitudes = spectrum(rows, dim=dim)
    # Scaled by the largest first, so that tiny weights do not underflow when squared.
    largest = amplitudes.amax(dim=-1, keepdim=True)
    power = (amplitudes / torch.where(largest > 0, largest, 1.0)).square()
    total = power.sum(dim=-1, keepdim=True)
    return (power / torch.where(total > 0, total, 1.0)).pow(r).sum(dim=-1)


def gini(values: Tensor, *, dim: int = -1) -> Tensor:
    """Gini coefficient of nonnegative values, for example of a :func:`spectrum`: 0 if all are equal.

    ``mean |a_i - a_j| / (2 mean a)``, computed from the sorted values.

    Args:
        values: any shape, nonnegative.
        dim: axis.

    Returns:
        The shape without that axis, in ``[0, 1 - 1/length]``; 0 where all is zero.

    Examples:
        >>> gini(torch.tensor([[0.0, 0.0, 0.0, 5.0], [1.0, 1.0, 1.0, 1.0]]))
        tensor([0.7500, 0.0000])
    """
    ordered = values.movedim(dim, -1).sort(dim=-1).values
    length = ordered.shape[-1]
    # The i-th of the sorted values is the larger one in i - 1 pairs and the smaller one in n - i.
    factor = 2 * torch.arange(1, length + 1, device=values.device, dtype=ordered.dtype) - length - 1
    total = ordered.sum(dim=-1)
    return (ordered * factor).sum(dim=-1) / (length * torch.where(total > 0, total, 1.0))


def neuron_ipr(first: Tensor, second: Tensor, *, p: int, cycle: Tensor | None = None, r: float = 2) -> Tensor:
    """Generalisation score of each neuron: mean IPR of what it reads from each operand, and of what it says.

    Args:
        first: (N, m p) weights from the operands' one-hot vectors to the neurons, one block of p for each operand:
            ``fc1.weight``.
        second: (p, N) weights from the neurons to the results: ``fc2.weight``.
        p: length of the cycle.
        cycle: (L,) order of the numbers in which the rule is a shift, see :attr:`ModularArithmetic.cycle`; None: as
            they are.
        r: see :func:`inverse_participation_ratio`.

    Returns:
        (N,).

    Raises:
        ValueError: shapes do not fit p.

    Examples:
        >>> from regularized.understanding.grokking.modular_arithmetic import analytic_weights
        >>> neuron_ipr(*analytic_weights(11, width=3), p=11)
        tensor([1., 1., 1.])
    """
    if first.ndim != 2 or first.shape[1] % p or not first.shape[1]:
        raise ValueError(
            f"the columns of first are the group axis: (N, m p) with p = {p}, one block for each operand; got "
            f"{tuple(first.shape)}"
        )
    if second.ndim != 2 or second.shape[0] != p:
        raise ValueError(f"the rows of second are the group axis: (p, N) with p = {p}, got {tuple(second.shape)}")
    if first.shape[0] != second.shape[1]:
        raise ValueError(f"first has {first.shape[0]} neurons (rows), second {second.shape[1]} (columns)")
    curves = torch.cat([first.unflatten(1, (-1, p)), second.t()[:, None]], dim=1)
    if cycle is not None:
        curves = curves[..., cycle.to(curves.device)]
    return inverse_participation_ratio(curves, r=r).mean(dim=1)


def score_correlation(scores: Tensor, gains: Tensor) -> Tensor:
    """Correlation of the neurons' scores with the size of their gains, ``|gamma|`` of a batch normalisation.

    Positive where the normalisation turns periodic neurons up and others down.

    Args:
        scores: (N,).
        gains: (N,), of any sign.

    Returns:
        Scalar in [-1, 1]; 0 where one of them is constant.

    Examples:
        >>> score_correlation(torch.tensor([0.2, 0.5, 0.8]), torch.tensor([0.1, -0.4, 0.7]))
        tensor(1.)
    """
    a, b = scores - scores.mean(), gains.abs() - gains.abs().mean()
    size = a.norm() * b.norm()
    return (a * b).sum() / torch.where(size > 0, size, 1.0)
