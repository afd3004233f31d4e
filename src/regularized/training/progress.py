"""Where in the training we are, and the small family of functions of it that serve as schedules.

Every coefficient and every learning rate is a number or a function ``Progress -> float``. No technique has warm-up
arguments of its own.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from regularized.mechanisms.ranges import Choice, allowed, count, share

__all__ = [
    "Coefficient",
    "Progress",
    "Schedule",
    "as_schedule",
    "cosine",
    "gaussian_ramp",
    "is_always",
    "linear",
    "piecewise",
    "warmup",
]

Unit: TypeAlias = Literal["step", "epoch"]
_UNIT = Choice("step", "epoch")


@dataclass(frozen=True, slots=True)
class Progress:
    """Position of one optimizer step in a training run.

    Args:
        step: optimizer steps done before this one, counted from 0 over the whole run.
        total_steps: optimizer steps of the whole run.
        epoch: epoch of this step, counted from 0.
        total_epochs: epochs of the whole run.

    Examples:
        >>> Progress(step=50, total_steps=100, epoch=5, total_epochs=10).fraction
        0.5
    """

    step: int
    total_steps: int
    epoch: int = 0
    total_epochs: int = 1

    @property
    def fraction(self) -> float:
        """Share of the optimizer steps that is done, in [0, 1]."""
        return min(self.step / self.total_steps, 1.0) if self.total_steps else 0.0

    def measured_in(self, unit: Unit) -> float:
        """Share of the run in [0, 1]: done steps (``"step"``), or epochs including this one (``"epoch"``)."""
        if unit == "step":
            return self.fraction
        return min((self.epoch + 1) / self.total_epochs, 1.0) if self.total_epochs else 0.0


Schedule: TypeAlias = Callable[[Progress], float]
Coefficient: TypeAlias = float | Schedule


@dataclass(frozen=True, slots=True)
class _Constant:
    value: float

    def __call__(self, progress: Progress) -> float:
        return self.value


def as_schedule(coefficient: Coefficient, *, name: str = "coefficient") -> Schedule:
    """Turn a number into a constant schedule; a schedule passes unchanged.

    Raises:
        TypeError: ``coefficient`` is neither a real number nor callable.
        ValueError: it is a number that is not finite.

    Examples:
        >>> as_schedule(0.5)(Progress(step=0, total_steps=1))
        0.5
    """
    if callable(coefficient):
        return coefficient
    if isinstance(coefficient, bool) or not isinstance(coefficient, int | float):
        raise TypeError(f"{name} must be a number or a function of Progress, got {coefficient!r}")
    if not math.isfinite(coefficient):
        raise ValueError(f"{name} must be finite, got {coefficient!r}")
    return _Constant(float(coefficient))


def is_always(coefficient: Coefficient, value: float) -> bool:
    """Whether a coefficient is known to have this value during the whole run (a schedule is never known)."""
    if isinstance(coefficient, _Constant):
        return coefficient.value == value
    return not callable(coefficient) and coefficient == value


@dataclass(frozen=True, slots=True)
class _Linear:
    start: float
    end: float
    begin: float
    until: float
    unit: Unit

    def __call__(self, progress: Progress) -> float:
        done = (progress.measured_in(self.unit) - self.begin) / (self.until - self.begin)
        return self.start + (self.end - self.start) * min(max(done, 0.0), 1.0)


@allowed(unit=_UNIT)
def linear(start: float, end: float, *, begin: float = 0.0, until: float = 1.0, unit: Unit = "step") -> Schedule:
    """A straight line from ``start`` to ``end`` between two shares of the run; constant outside them.

    With ``unit="epoch"`` the value changes once an epoch and reaches ``end`` *in* the last one: epoch ``e`` of ``T``
    has the share ``(e + 1) / T``.

    Examples:
        >>> rise = linear(0.0, 0.8, unit="epoch")
        >>> [round(rise(Progress(0, 1, epoch=e, total_epochs=3)), 4) for e in range(3)]
        [0.2667, 0.5333, 0.8]
    """
    _check_window(begin, until)
    return _Linear(start, end, begin, until, unit)


@dataclass(frozen=True, slots=True)
class _Cosine:
    start: float
    end: float
    cycles: int
    unit: Unit

    def __call__(self, progress: Progress) -> float:
        share = progress.measured_in(self.unit)
        if self.cycles > 1 and share < 1.0:
            share = math.modf(share * self.cycles)[0]
        return self.end + (self.start - self.end) * (1 + math.cos(math.pi * share)) / 2


@allowed(cycles=count(1), unit=_UNIT)
def cosine(start: float = 1.0, end: float = 0.0, *, cycles: int = 1, unit: Unit = "step") -> Schedule:
    """Half a cosine wave from ``start`` to ``end``, restarted ``cycles`` times at equal distances.

    Examples:
        >>> round(cosine()(Progress(step=50, total_steps=100)), 6)
        0.5
    """
    return _Cosine(start, end, cycles, unit)


@dataclass(frozen=True, slots=True)
class _Piecewise:
    initial: float
    milestones: tuple[tuple[float, float], ...]

    def __call__(self, progress: Progress) -> float:
        value = self.initial
        for start, new in self.milestones:
            if progress.fraction >= start:
                value = new
        return value


def piecewise(milestones: Mapping[float, float], *, initial: float = 1.0) -> Schedule:
    """A step function: from the share of the run ``key`` on, the value is ``milestones[key]``.

    Examples:
        >>> drop = piecewise({0.5: 0.1, 0.75: 0.01})
        >>> [drop(Progress(step=s, total_steps=100)) for s in (0, 49, 50, 80)]
        [1.0, 1.0, 0.1, 0.01]
    """
    for start in milestones:
        if not 0.0 <= start <= 1.0:
            raise ValueError(f"milestones are shares of the run in [0, 1], got {start}")
    return _Piecewise(initial, tuple(sorted(milestones.items())))


@dataclass(frozen=True, slots=True)
class _Warmup:
    after: Schedule
    share: float

    def __call__(self, progress: Progress) -> float:
        value = self.after(progress)
        return value * min(progress.fraction / self.share, 1.0) if self.share else value


@allowed(share=share())
def warmup(after: Coefficient, share: float) -> Schedule:
    """Multiply a schedule by a line from 0 to 1 over the first ``share`` of the run.

    Examples:
        >>> warmup(2.0, 0.1)(Progress(step=5, total_steps=100))
        1.0
    """
    return _Warmup(as_schedule(after), share)


@dataclass(frozen=True, slots=True)
class _GaussianRamp:
    value: float
    steps: int
    sharpness: float

    def __call__(self, progress: Progress) -> float:
        if self.steps == 0:
            return self.value
        missing = 1.0 - min(progress.step, self.steps) / self.steps
        return self.value * math.exp(-self.sharpness * missing * missing)


@allowed(steps=count(0))
def gaussian_ramp(value: float = 1.0, *, steps: int, sharpness: float = 5.0) -> Schedule:
    """The ramp ``value * exp(-sharpness (1 - step / steps)^2)`` of temporal ensembling (Laine & Aila 2017).

    It starts at ``value * e^-5`` and reaches ``value`` at ``steps``; ``steps=0`` is constant.

    Examples:
        >>> ramp = gaussian_ramp(steps=10)
        >>> ramp(Progress(step=10, total_steps=100))
        1.0
    """
    return _GaussianRamp(value, steps, sharpness)


def _check_window(begin: float, until: float) -> None:
    if not 0.0 <= begin < until <= 1.0:
        raise ValueError(f"need 0 <= begin < until <= 1, got begin={begin}, until={until}")
