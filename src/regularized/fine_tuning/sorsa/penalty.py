"""SORSA's penalty: how far the factors of adapters are from orthonormal, its gradient, and how it enters a step.

Paper and code differ: the paper sums the penalty over the factors and steps by gamma on its own; the code averages and
adds gamma / (peak lr) times the gradient after clipping, inside AdamW, which renormalises it. We follow the code. Its
trainer divides once more by the number of accumulation steps (64 in the reported runs): ``gamma=4e-4 / 64`` repeats
those. Symbols are in :mod:`regularized.fine_tuning.sorsa.layer`.
"""

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from regularized.fine_tuning.sorsa.layer import SingularFactors
from regularized.mechanisms.ranges import Choice, allowed, at_least
from regularized.mechanisms.surgery import check_optimizer_is_current

__all__ = ["OrthonormalPenalty", "check_gamma", "orthonormal_gradient", "orthonormal_penalty"]

# Shapes: a factor is (o, r) or (r, i), and r is its shorter side.

Reduction: TypeAlias = Literal["mean", "sum"]
_REDUCTION = Choice("mean", "sum")

GAMMA = at_least(0.0)


def orthonormal_penalty(factors: Sequence[Tensor], *, reduction: Reduction = "mean") -> Tensor:
    """How far the factors are from orthonormal: ``\\|F F^T - I\\|_F``, over all factors; differentiable.

    The product is taken over the shorter side (``B^T B`` of a tall B, ``A A^T`` of a wide A), so the factors of any
    low-rank adapter can be given. For training, :func:`orthonormal_gradient` is the cheaper way.

    Args:
        factors: matrices of any shapes.
        reduction: ``"mean"`` (default, official code) or ``"sum"`` (the paper's, over one layer).

    Returns:
        Scalar >= 0; its gradient is 0 where a factor is exactly orthonormal.

    Examples:
        >>> eye = torch.eye(2, 5)
        >>> orthonormal_penalty([eye, 2 * eye.T])  # 0 and \\|3 I\\|_F = 3 sqrt(2)
        tensor(2.1213)
    """
    _REDUCTION("reduction", reduction)
    norms = torch.cat([torch.linalg.matrix_norm(defect) for _, _, defect in _defects(factors)])
    return norms.mean() if reduction == "mean" else norms.sum()


@torch.no_grad()
def orthonormal_gradient(
    factors: Sequence[Tensor], *, eps: float = 1e-6, reduction: Reduction = "mean"
) -> list[Tensor]:
    """Gradient of :func:`orthonormal_penalty` in closed form, ``2 (F F^T - I) F / \\|F F^T - I\\|_F`` each.

    Two small products a factor, batched over equal shapes; no graph, no look at values by the host.

    Args:
        factors: matrices of any shapes.
        eps: the gradient is 0 where the defect is at most ``eps sqrt(r)``. The norm has a kink at 0, where training
            starts: there rounding alone decides on the direction of a gradient of unit size. Default 1e-6, the
            rounding of float32; 0 is the official code.
        reduction: as in :func:`orthonormal_penalty`.

    Returns:
        A tensor of the shape of each factor.

    Examples:
        >>> (gradient,) = orthonormal_gradient([2 * torch.eye(2, 3)])  # 2 * 3 I * 2 I / (3 sqrt(2))
        >>> gradient
        tensor([[2.8284, 0.0000, 0.0000],
                [0.0000, 2.8284, 0.0000]])
    """
    _REDUCTION("reduction", reduction)
    share = 1.0 if reduction == "sum" else 1.0 / max(len(factors), 1)
    gradients: list[Tensor] = [torch.empty(0)] * len(factors)
    for members, stacked, defect in _defects(factors):
        norms = torch.linalg.matrix_norm(defect)
        slope = torch.where(norms > eps * math.sqrt(stacked.shape[-2]), 2.0 * share / norms, 0.0)
        for k, gradient in zip(members, torch.bmm(defect * slope[:, None, None], stacked), strict=True):
            gradients[k] = gradient.mT if _is_tall(factors[k]) else gradient
    return gradients


def _defects(factors: Sequence[Tensor]) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Factors of equal shape together: their places, stacked as (n, r, long side), and ``F F^T - I`` (n, r, r)."""
    if not factors:
        raise ValueError("there are no factors to penalise; give at least one matrix")
    groups: dict[Any, list[int]] = {}
    for k, factor in enumerate(factors):
        if factor.ndim != 2:
            raise ValueError(f"a factor must be a matrix, got shape {tuple(factor.shape)}")
        short, long = sorted(factor.shape)
        groups.setdefault((short, long, factor.dtype, factor.device), []).append(k)
    for (short, _, dtype, device), members in groups.items():
        stacked = torch.stack([factors[k].mT if _is_tall(factors[k]) else factors[k] for k in members])
        with torch.autocast(device.type, enabled=False):  # 1 + 1e-3 is 1 in bfloat16
            defect = torch.bmm(stacked, stacked.mT) - torch.eye(short, dtype=dtype, device=device)
        yield members, stacked, defect


def _is_tall(factor: Tensor) -> bool:
    return factor.shape[0] > factor.shape[1]


class OrthonormalPenalty:
    """Adds the penalty's gradient to ``.grad``, once an optimizer step, after clipping and before the step.

    Cost: two Gram matrices and two products of the factors, ``2 r^2 (o + i)`` multiply-adds a layer and step, whatever
    the batch; no second backward pass.

    Args:
        model: a model with SORSA layers (:func:`~regularized.fine_tuning.sorsa.inject_sorsa`, or PEFT's), or the
            factors of any other adapter.
        gamma: strength, >= 0; default 4e-4 (the authors' runs). 0 leaves the gradients as they are, bit for bit. Two
            orders more stopped learning in our trial.
        lr: peak learning rate of the optimizer, > 0: the gradient enters as gamma / lr.
        eps: dead zone of :func:`orthonormal_gradient`; default 1e-6.
        reduction: as in :func:`orthonormal_penalty`.
        optimizer: if given, it is checked: it must hold the factors, and should not decay them.

    Raises:
        ValueError: gamma < 0, or lr <= 0 with gamma > 0; no SORSA layer in the model; the optimizer was built before
            the injection.

    Warns:
        UserWarning: the optimizer has weight decay on the factors, which pulls them away from orthonormal.

    Examples:
        >>> from regularized.fine_tuning.sorsa import inject_sorsa
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> _ = inject_sorsa(model, r=2)
        >>> trained = [p for p in model.parameters() if p.requires_grad]
        >>> optimizer = torch.optim.AdamW(trained, lr=3e-5, weight_decay=0.0)
        >>> penalty = OrthonormalPenalty(model, gamma=4e-4, lr=3e-5, optimizer=optimizer)
        >>> for _ in range(2):
        ...     model(torch.randn(4, 8)).square().mean().backward()
        ...     _ = nn.utils.clip_grad_norm_(trained, 1.0)
        ...     penalty.add_gradient()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
    """

    @allowed(reduction=_REDUCTION)
    def __init__(
        self,
        model: nn.Module | Iterable[Tensor],
        *,
        gamma: float = 4e-4,
        lr: float,
        eps: float = 1e-6,
        reduction: Reduction = "mean",
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        check_gamma(gamma, lr)
        self.gamma = gamma
        self.lr = lr
        self.eps = eps
        self.reduction = reduction
        self._layers: list[SingularFactors] = []
        self._given: list[Tensor] = []
        if isinstance(model, nn.Module):
            self._layers = [module for module in model.modules() if isinstance(module, SingularFactors)]
            if not self._layers:
                raise ValueError(f"{type(model).__name__} has no SORSA layers; inject them first")
            if optimizer is not None:
                check_optimizer_is_current(model, optimizer)
        else:
            self._given = list(model)
        if optimizer is not None:
            _warn_of_decay(self.factors(), optimizer)

    def factors(self) -> list[Tensor]:
        """The factors at present."""
        return [*self._given, *(factor for layer in self._layers for factor in layer.singular_factors())]

    def value(self) -> Tensor:
        """The penalty at present, without gamma; scalar, differentiable."""
        return orthonormal_penalty(self.factors(), reduction=self.reduction)

    def add_gradient(self, *, gamma: float | None = None, scaler: torch.amp.GradScaler | None = None) -> None:
        """Add ``gamma / lr`` times the gradient of the penalty to the factors' ``.grad``.

        Args:
            gamma: another strength for this step; default that of the constructor.
            scaler: the gradient scaler of fp16 training, if one is in use: checked that it has unscaled.

        Raises:
            RuntimeError: no factor has a gradient (no backward pass yet, or the adapter is frozen); gradients are still
                scaled; the adapter is merged.
        """
        gamma = self.gamma if gamma is None else gamma
        if gamma == 0.0:
            return
        check_gamma(gamma, self.lr)
        if any(layer.is_merged for layer in self._layers):
            raise RuntimeError("the adapter is merged, so training does not reach its factors; unmerge it first")
        if scaler is not None and scaler.is_enabled() and not _has_unscaled(scaler):
            raise RuntimeError(
                "the gradients are still multiplied by the loss scale, the penalty would vanish beside them; unscale "
                "first: scaler.unscale_(optimizer), then clip, then add_gradient()"
            )
        factors = self.factors()
        held = [k for k, factor in enumerate(factors) if factor.grad is not None]
        if not held:
            raise RuntimeError(
                "no factor has a gradient: call add_gradient() after loss.backward() and before optimizer.step(). If "
                "that is so, the adapter is frozen, or the factors are not part of the loss"
            )
        gradients = orthonormal_gradient(factors, eps=self.eps, reduction=self.reduction)
        grads = [g for k in held if (g := factors[k].grad) is not None]
        torch._foreach_add_(grads, [gradients[k] for k in held], alpha=gamma / self.lr)


def check_gamma(gamma: float, lr: float) -> None:
    """Refuse a strength below 0, and a rate with which it has no meaning."""
    GAMMA("gamma", gamma)
    if gamma > 0.0 and not lr > 0.0:
        raise ValueError(f"lr must be the peak learning rate, > 0, since the penalty enters as gamma / lr; got {lr}")


def _has_unscaled(scaler: torch.amp.GradScaler) -> bool:
    stages = [state["stage"].name for state in scaler._per_optimizer_states.values()]
    return "UNSCALED" in stages


def _warn_of_decay(factors: Sequence[Tensor], optimizer: torch.optim.Optimizer) -> None:
    own = {id(factor) for factor in factors}
    for group in optimizer.param_groups:
        if group.get("weight_decay", 0.0) > 0.0 and any(id(p) in own for p in group["params"]):
            warnings.warn(
                f"weight_decay={group['weight_decay']} on singular vectors shrinks them, against the penalty; put the "
                "adapter into a parameter group with weight_decay=0 (the authors use 0)",
                stacklevel=4,
            )
            return
