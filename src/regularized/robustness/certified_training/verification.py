"""Which predictions no input of the box can change."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regularized.mechanisms.ranges import allowed, at_least
from regularized.robustness.certified_training.bounds import IntervalBounds
from regularized.robustness.certified_training.interval import Scale, check_scales, linf_box
from regularized.training.step import Batch

__all__ = ["Verification", "verified", "verify"]


@dataclass(frozen=True, slots=True)
class Verification:
    """What was found on a data set.

    Args:
        samples: how many.
        clean_error: share that is classified wrongly as it is.
        verified_error: share for which it is not proved that every input of the box is classified rightly. It bounds
            the error under any attack in the box from above.
    """

    samples: int
    clean_error: float
    verified_error: float


@torch.no_grad()
def verified(
    bounds: IntervalBounds,
    inputs: Tensor,
    targets: Tensor,
    *,
    radius: float,
    std: Scale = 1.0,
    data_range: tuple[Scale, Scale] | None = None,
) -> Tensor:
    """Whether each sample is classified rightly, provably, wherever in its box.

    Args:
        bounds: of the network, in evaluation mode.
        inputs: (B, C, ...).
        targets: (B,) int64 classes.
        radius: as in :func:`~regularized.robustness.certified_training.linf_box`.
        std: as there.
        data_range: as there.

    Returns:
        (B,) bool. Bounds that are not finite prove nothing.

    Raises:
        ValueError: the network is in training mode and has batch normalisation: its outputs would hang on the batch.

    Examples:
        >>> model = nn.Linear(2, 2).eval()
        >>> _ = model.weight.data.copy_(torch.eye(2)), model.bias.data.zero_()
        >>> verified(IntervalBounds(model), torch.tensor([[1.0, 0.0], [0.1, 0.0]]), torch.tensor([0, 0]), radius=0.1)
        tensor([ True, False])
    """
    box = linf_box(inputs, radius, std=std, data_range=data_range)
    return (bounds(box).margins(targets) >= 0).all(dim=1)


@torch.no_grad()
@allowed(radius=at_least(0.0, "in units of the raw input"))
def verify(
    model: nn.Module,
    data: Iterable[Any],
    *,
    radius: float,
    std: Scale = 1.0,
    data_range: tuple[Scale, Scale] | None = None,
) -> Verification:
    """Clean and verified error of a network on a data set, in evaluation mode; its mode is put back.

    The proof is one of exact arithmetic: rounding is not part of it. In float64 (``copy.deepcopy(model).double()``)
    its share is far below any margin that matters.

    Args:
        model: the network.
        data: batches (x, y), a loader for example.
        radius: the one that is wanted, as in :func:`~regularized.robustness.certified_training.linf_box`.
        std: as there.
        data_range: as there.

    Raises:
        ValueError: there is no sample, or a batch has no targets.
        UnsupportedOperation: an operation has no interval rule.

    Examples:
        >>> model = nn.Linear(2, 2)
        >>> _ = model.weight.data.copy_(torch.eye(2)), model.bias.data.zero_()
        >>> verify(model, [(torch.tensor([[1.0, 0.0], [0.1, 0.0]]), torch.tensor([0, 0]))], radius=0.1)
        Verification(samples=2, clean_error=0.0, verified_error=0.5)
    """
    check_scales(radius, std, data_range)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    first = next(model.parameters(), torch.zeros(()))
    samples, wrong, unproved = 0, first.new_zeros((), dtype=torch.int64), first.new_zeros((), dtype=torch.int64)
    bounds = IntervalBounds(model)
    try:
        for raw in data:
            batch = Batch.of(raw).map(lambda t: t.to(first.device, non_blocking=True))
            if batch.targets is None:
                raise ValueError("verify needs the right classes: yield (x, y)")
            proved = verified(bounds, batch.inputs, batch.targets, radius=radius, std=std, data_range=data_range)
            samples += batch.size
            wrong += (model(batch.inputs).argmax(dim=1) != batch.targets).sum()
            unproved += (~proved).sum()
    finally:
        bounds.remove()
        for module, mode in modes:
            module.training = mode
    if not samples:
        raise ValueError("there is no sample to verify; give batches (x, y)")
    return Verification(samples, int(wrong) / samples, int(unproved) / samples)
