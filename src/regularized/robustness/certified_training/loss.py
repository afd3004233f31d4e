"""The loss of certified training: the worst case over the box, and the penalties while the box grows.

:mod:`regularized.robustness.certified_training.penalty` has the paper's symbols.
"""

import warnings
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regularized.mechanisms.ranges import allowed, at_least, between
from regularized.mechanisms.surgery import NoEffectWarning
from regularized.robustness.certified_training.bounds import IntervalBounds
from regularized.robustness.certified_training.interval import Scale, check_scales, linf_box
from regularized.robustness.certified_training.penalty import relu_balance, tightness
from regularized.training.progress import Progress

__all__ = ["CertifiedLoss", "GrowingRadius", "Radius", "as_radius", "robust_cross_entropy"]

_CLEAN_BELOW = 1e-50
_SMALLEST_PENALISED = 1e-6


class GrowingRadius(Protocol):
    """A schedule of the radius: :class:`SmoothedRadius`, or any function of the progress that knows where it ends."""

    @property
    def largest(self) -> float:
        """The radius at the end."""
        ...

    def __call__(self, progress: Progress) -> float:
        """The radius of an optimizer step."""
        ...


Radius: TypeAlias = float | GrowingRadius
"""A number, for a box that does not grow, or a schedule."""


class _Constant:
    def __init__(self, largest: float) -> None:
        self.largest: float = largest

    def __call__(self, progress: Progress) -> float:
        return self.largest


def as_radius(radius: Radius) -> GrowingRadius:
    """A schedule as it is, a number as one that does not grow.

    Raises:
        ValueError: a number below 0.
        TypeError: neither, or a schedule without ``largest``.
    """
    if isinstance(radius, int | float):
        at_least(0.0, "in units of the raw input")("radius", radius)
        return _Constant(float(radius))
    if not callable(radius) or not hasattr(radius, "largest"):
        raise TypeError(
            f"radius must be a number or a schedule with an attribute `largest`, such as SmoothedRadius; got {radius!r}"
        )
    return radius


def robust_cross_entropy(margins: Tensor, targets: Tensor, *, reduction: str = "mean") -> Tensor:
    """Cross-entropy of the worst logits in the box: ``log(1 + sum over wrong classes of exp(-margin))``.

    Args:
        margins: (B, K), 0 for the right class, see :meth:`Bounds.margins`.
        targets: (B,) int64 classes.
        reduction: ``"mean"`` (default), ``"sum"`` or ``"none"``.

    Returns:
        Scalar, or (B,).

    Examples:
        >>> robust_cross_entropy(torch.tensor([[0.0, 100.0]]), torch.tensor([0]))
        tensor(0.)
    """
    dtype = torch.promote_types(margins.dtype, torch.float32)
    return F.cross_entropy(-margins.to(dtype), targets, reduction=reduction)


class CertifiedLoss(nn.Module):
    """Loss of a network against all inputs of a box, for a loop of one's own.

    While the radius is 0 it is the cross-entropy; then the cross-entropy of the worst logits, nothing of the clean
    ones mixed in. The penalties are added with ``penalty * (1 - radius / largest)``. In evaluation mode
    (``loss.eval()``) it is the robust cross-entropy at the largest radius, and nothing is counted.

    Args:
        model: the network, see :class:`~regularized.robustness.certified_training.IntervalBounds`; hooks are set on it.
        radius: a number, or :class:`~regularized.robustness.certified_training.SmoothedRadius`; in units of the raw
            input.
        std: as in :func:`~regularized.robustness.certified_training.linf_box`.
        data_range: as there.
        penalty: strength lambda_0 of the two penalties; default 0.5, the paper's for MNIST and CIFAR-10 (0.1 to 0.2
            for TinyImageNet). They stop when the radius does: one that is constant has none.
        tolerance: tau of the penalties, in (0, 1]; default 0.5, the paper's.

    Attributes:
        bounds: the propagation.
        steps: optimizer steps done; counted by :meth:`advance`, and part of the state.

    Raises:
        ValueError: a number is out of its range; ``std`` or ``data_range`` do not describe inputs.
        UnsupportedOperation: an operation of the network has no interval rule.

    Warns:
        UserWarning: the box is wider than the data's range.
        NoEffectWarning: there is a penalty, and no ReLU that it could look at.

    Examples:
        >>> from regularized.robustness.certified_training import SmoothedRadius, interval_init_
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
        >>> _ = interval_init_(model)
        >>> radius = SmoothedRadius(0.1, start=1, length=2, batches_per_epoch=5)
        >>> criterion = CertifiedLoss(model, radius=radius, data_range=(0.0, 1.0))
        >>> loss = criterion(torch.rand(16, 4), torch.randint(3, (16,)))
        >>> loss.backward()
        >>> criterion.advance()
        >>> criterion.steps, round(criterion.radius(Progress(criterion.steps, 0)), 4)
        (1, 0.0004)
    """

    std: Tensor
    low: Tensor | None
    high: Tensor | None

    @allowed(penalty=at_least(0.0, "0 switches the penalties off"), tolerance=between(0.0, 1.0, "(]"))
    def __init__(
        self,
        model: nn.Module,
        *,
        radius: Radius,
        std: Scale = 1.0,
        data_range: tuple[Scale, Scale] | None = None,
        penalty: float = 0.5,
        tolerance: float = 0.5,
    ) -> None:
        super().__init__()
        self.radius: GrowingRadius = as_radius(radius)
        check_scales(self.radius.largest, std, data_range)
        self.bounds: IntervalBounds = IntervalBounds(model)
        self.penalty = penalty
        self.tolerance = tolerance
        self.steps: int = 0
        dtype = next((p.dtype for p in model.parameters()), torch.float32)
        self.register_buffer("std", torch.as_tensor(std, dtype=dtype), persistent=False)
        for name, end in zip(("low", "high"), data_range or (None, None), strict=True):
            self.register_buffer(name, None if end is None else torch.as_tensor(end, dtype=dtype), persistent=False)
        if penalty and not any(map(self.bounds.graph().is_relu, self.bounds.graph().nodes)):
            warnings.warn(
                f"{type(model).__name__} has no ReLU, whose inputs the penalties look at: nothing is penalised",
                NoEffectWarning,
                stacklevel=3,
            )
            self.penalty = 0.0

    @property
    def model(self) -> nn.Module:
        """The network."""
        return self.bounds.model

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The loss of a batch, mean over its samples; the clean forward pass is part of it.

        Args:
            inputs: (B, C, ...).
            targets: (B,) int64 classes.

        Raises:
            ValueError: the network does not return (B, K) with K >= 2, or a target is outside 0 ... K - 1.
        """
        log_probabilities = F.log_softmax(self.model(inputs), dim=-1)
        radius = self.radius(Progress(self.steps, 0)) if self.training else self.radius.largest
        return self.summed(log_probabilities, inputs, targets, radius=radius) / len(inputs)

    def summed(self, log_probabilities: Tensor, inputs: Tensor, targets: Tensor, *, radius: float) -> Tensor:
        """The loss summed over a batch whose clean forward pass has been made.

        Args:
            log_probabilities: (B, K) of the clean pass.
            inputs: (B, C, ...).
            targets: (B,) int64 classes.
            radius: of this step.
        """
        strength = self._strength(radius)
        clean = radius < _CLEAN_BELOW
        if clean and not strength:
            return F.nll_loss(log_probabilities, targets, reduction="sum")
        box = linf_box(
            inputs,
            max(radius, _SMALLEST_PENALISED) if clean else radius,
            std=self.std,
            data_range=None if self.low is None or self.high is None else (self.low, self.high),
        )
        bounds = self.bounds(box)
        if clean:
            loss = F.nll_loss(log_probabilities, targets, reduction="sum")
        else:
            loss = robust_cross_entropy(bounds.margins(targets), targets, reduction="sum")
        if strength:
            penalties = tightness(box, bounds.relu_inputs, tolerance=self.tolerance)
            penalties = penalties + relu_balance(bounds.relu_inputs, tolerance=self.tolerance)
            loss = loss + len(inputs) * strength * penalties
        return loss

    def _strength(self, radius: float) -> float:
        """What the penalties are multiplied by: it falls to exactly 0 as the radius reaches the largest."""
        if not (self.penalty and self.training and self.radius.largest):
            return 0.0
        return self.penalty * max(1.0 - radius / self.radius.largest, 0.0)

    def advance(self) -> None:
        """Count an optimizer step; call it once after each."""
        self.steps += 1

    def get_extra_state(self) -> Tensor:
        """The number of steps, so that the radius goes on where it was."""
        return torch.tensor(self.steps)

    def set_extra_state(self, state: Any) -> None:
        """Take over what was saved."""
        self.steps = int(state)
