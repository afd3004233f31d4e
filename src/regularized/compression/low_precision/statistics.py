"""What rounding does to the operands of a model: how much is cut, how much vanishes, how large the error is."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from regularized.compression.low_precision.formats import Format
from regularized.compression.low_precision.layer import LowPrecisionLinear, Observation
from regularized.compression.low_precision.named import as_format
from regularized.compression.low_precision.rounding import Rounding

__all__ = ["Losses", "Watch", "losses_of", "watch"]

_COUNTS = 6


@dataclass(frozen=True, slots=True)
class Losses:
    """What became of the values of a tensor, or of all tensors in one place of a model.

    Args:
        values: how many there were.
        saturated: share that was finite and above what its block can hold.
        underflowed: share that was not zero and became zero.
        not_finite: share that was NaN or infinite.
        signal_to_noise: energy of the values over energy of the error, in decibels; of what is finite.

    Examples:
        >>> lost = losses_of(torch.tensor([0.1, 1.0, 900.0, 0.0]), "e2m1")
        >>> lost.values, lost.saturated, lost.underflowed
        (4, 0.25, 0.25)
    """

    values: int
    saturated: float
    underflowed: float
    not_finite: float
    signal_to_noise: float


def losses_of(x: Tensor, form: Format | str, *, axis: int = -1, rounding: Rounding = "nearest_even") -> Losses:
    """What a format does to a tensor.

    Args:
        x: float32 or float64, or half precision, which is counted in float32.
        form: the format or its name.
        axis: along which blocks lie.
        rounding: default to nearest, ties to even.
    """
    form = as_format(form)
    work = x.detach().float() if x.dtype.itemsize == 2 else x.detach()
    counts = _counted(work, form.quantize(work, axis=axis, rounding=rounding), form.limit(work, axis=axis))
    return _losses(counts)


def _counted(before: Tensor, after: Tensor, limit: Tensor | float) -> Tensor:
    """(6,) float64 on the device: values, saturated, underflowed, not finite, energy, energy of the error."""
    finite = torch.isfinite(before)
    size = before.abs()
    kept = finite & torch.isfinite(after)
    return torch.stack(
        [
            torch.tensor(float(before.numel()), dtype=torch.float64, device=before.device),
            (finite & (size > limit)).sum(dtype=torch.float64),
            ((after == 0) & (size > 0)).sum(dtype=torch.float64),
            (~finite).sum(dtype=torch.float64),
            torch.where(kept, before, 0.0).square().sum(dtype=torch.float64),
            torch.where(kept, before - after, 0.0).square().sum(dtype=torch.float64),
        ]
    )


def _losses(counts: Tensor) -> Losses:
    values, saturated, underflowed, not_finite, energy, error = counts.tolist()
    ratio = float("inf") if error == 0 else 10.0 * float(torch.tensor(energy / error).log10())
    n = max(values, 1.0)
    return Losses(int(values), saturated / n, underflowed / n, not_finite / n, ratio)


class Watch:
    """Counts of every operand of the layers of a model, summed on their device until they are read.

    Made by :func:`watch`.
    """

    def __init__(self, *, strict: bool = False) -> None:
        self._counts: dict[tuple[str, str, str], Tensor] = {}
        self._strict = strict

    def see(self, name: str, seen: Observation) -> None:
        """Count an operand.

        Raises:
            FloatingPointError: it is not finite, and the watch is strict.
        """
        if seen.before.numel() == 0:
            return
        if self._strict and not bool(torch.isfinite(seen.before).all()):
            raise FloatingPointError(
                f"layer {name!r}, {seen.product} product, {seen.side} operand: NaN or infinity before it is rounded to "
                f"{seen.form}; what produced it lies before this layer in the forward, or behind it in the backward "
                "pass"
            )
        counts = _counted(seen.before.detach(), seen.after.detach(), seen.limit)
        key = (name, seen.product, seen.side)
        self._counts[key] = counts if key not in self._counts else self._counts[key] + counts

    def report(self) -> Mapping[tuple[str, str, str], Losses]:
        """By layer, product and side, what became of all values since the watch began."""
        return {key: _losses(counts) for key, counts in self._counts.items()}

    def by_product(self) -> Mapping[tuple[str, str], Losses]:
        """The same by product and side, over all layers."""
        sums: dict[tuple[str, str], Tensor] = {}
        for (_, product, side), counts in self._counts.items():
            sums[product, side] = sums.get((product, side), torch.zeros(_COUNTS, device=counts.device)) + counts
        return {key: _losses(counts) for key, counts in sums.items()}


@contextmanager
def watch(model: nn.Module, *, strict: bool = False) -> Iterator[Watch]:
    """Count what is lost in the layers of a converted model, within a ``with`` statement.

    Args:
        model: converted by :func:`~regularized.compression.low_precision.convert.convert`.
        strict: raise at the first operand that is not finite, with the name of its layer; each look waits for the
            device. Default False: it is counted.

    Raises:
        ValueError: the model has no converted layer.

    Examples:
        >>> from regularized.compression.low_precision.convert import convert
        >>> model = nn.Sequential(nn.Linear(32, 32))
        >>> _ = convert(model, "mxfp4")
        >>> with watch(model) as seen:
        ...     model(torch.randn(4, 32)).sum().backward()
        >>> sorted(seen.by_product())[0], seen.report()["0", "forward", "left"].values
        (('forward', 'left'), 128)
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, LowPrecisionLinear)}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no converted layer to watch; convert(model, recipe) first")
    names = {id(layer): name for name, layer in layers.items()}
    found = Watch(strict=strict)
    before = {name: layer.observer for name, layer in layers.items()}
    for layer in layers.values():
        layer.observer = lambda layer, seen: found.see(names[id(layer)], seen)
    try:
        yield found
    finally:
        for name, layer in layers.items():
            layer.observer = before[name]
