"""How long the next step is: controllers of the step size, and the checks that a solve goes on.

Both work on Python numbers, so that a step reads one number from the device and no more. With ``e`` the scaled error of
a step, at most 1 where it is accepted, and p the order:

===============  ==========================================  ==================================================
name             next step                                   whose default
===============  ==========================================  ==================================================
``"pi"``         ``h safety e_previous^(2/5p) / e^(7/10p)``  the Julia solvers, and so the paper
``"integral"``   ``h safety / e^(1/p)``                      torchdiffeq, and Hairer, Norsett & Wanner I, II.4
===============  ==========================================  ==================================================

The first settles at errors of about 0.17 and the second at 0.59: at equal tolerance the second takes fewer evaluations,
at equal *error* the first does, because it hardly ever has to reject a step.
"""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Literal, Protocol, TypeAlias

import torch
from torch import Tensor

__all__ = ["CONTROLLERS", "IntegralController", "StepController"]

Controller: TypeAlias = Literal["pi", "integral"]


class StepControl(Protocol):
    """What both controllers offer."""

    def accepted(self, h: float, error: float) -> float:
        """Next step size after a step of error <= 1."""
        ...

    def rejected(self, h: float, error: float) -> float:
        """Step size of the next attempt, after one of error > 1."""
        ...


class StepController:
    """PI control of the step size: ``h / clamp(EEst^b1 / previous^b2 / safety)``, with b1 = 0.7 / p and b2 = 0.4 / p.

    For order p = 5 these are 7/50 and 2/25, as in the Julia solvers of the paper.

    Args:
        order: p.
        largest: largest growth in one step; default 10, that of the Julia solvers.
        smallest: smallest factor; default 0.2.
        safety: default 0.9.

    Examples:
        >>> control = StepController(5)
        >>> control.accepted(0.1, 1.0) < 0.1 < control.accepted(0.1, 1e-6)
        True
    """

    def __init__(self, order: float, *, largest: float = 10.0, smallest: float = 0.2, safety: float = 0.9) -> None:
        self._proportional = 0.7 / order
        self._integral = 0.4 / order
        self._largest = largest
        self._smallest = smallest
        self._safety = safety
        self._previous = 1e-4

    def accepted(self, h: float, error: float) -> float:
        """Next step size after a step of error <= 1."""
        q: float = error**self._proportional / self._previous**self._integral / self._safety
        self._previous = max(error, 1e-4)
        return h / min(max(q, 1.0 / self._largest), 1.0 / self._smallest)

    def rejected(self, h: float, error: float) -> float:
        """Step size of the next attempt, after one of error > 1."""
        q: float = error**self._proportional / self._safety
        return h / min(1.0 / self._smallest, q)


class IntegralController:
    """Control by the last error alone: ``h clamp(safety / EEst^(1/p))``; an accepted step is never followed by less.

    Args:
        order: p.
        largest: largest growth in one step; default 10, as in torchdiffeq.
        smallest: smallest factor after a rejection; default 0.2.
        safety: default 0.9.

    Examples:
        >>> control = IntegralController(5)
        >>> control.accepted(0.1, 1.0), control.accepted(0.1, 0.0)
        (0.1, 1.0)
        >>> round(control.rejected(0.1, 32.0), 3)
        0.045
    """

    def __init__(self, order: float, *, largest: float = 10.0, smallest: float = 0.2, safety: float = 0.9) -> None:
        self._power = 1.0 / order
        self._largest = largest
        self._smallest = smallest
        self._safety = safety

    def accepted(self, h: float, error: float) -> float:
        """Next step size after a step of error <= 1."""
        growth: float = self._safety / error**self._power if error else self._largest
        return h * min(max(growth, 1.0), self._largest)

    def rejected(self, h: float, error: float) -> float:
        """Step size of the next attempt, after one of error > 1."""
        factor: float = self._safety / error**self._power
        return h * max(factor, self._smallest)


CONTROLLERS: Mapping[str, Callable[[float], StepControl]] = MappingProxyType(
    {"pi": StepController, "integral": IntegralController}
)


def check_controller(name: str) -> Callable[[float], StepControl]:
    """The controller of this name.

    Raises:
        ValueError: there is none.
    """
    if name not in CONTROLLERS:
        raise ValueError(f"controller must be one of {', '.join(CONTROLLERS)}, got {name!r}")
    return CONTROLLERS[name]


def read_error(error: Tensor, *, time: float, h: float, state: Tensor) -> float:
    """The one read of an attempt: the largest scaled error.

    Raises:
        RuntimeError: it is not finite.
    """
    value = float(error.detach() if error.ndim == 0 else error.detach().amax())
    if not math.isfinite(value):
        raise RuntimeError(not_finite(time, h, state))
    return value


def not_finite(time: float, h: float, state: Tensor) -> str:
    """What to say where the derivatives are not finite."""
    return (
        f"the derivatives are not finite in a step of {h:.3g} from t = {time:.6g}, where the state has norm "
        f"{float(torch.linalg.vector_norm(state.detach())):.3g}: the dynamics blew up, or the inputs are not finite. "
        "Bound the dynamics (tanh), lower the learning rate, or give a smaller first_step"
    )


def check_progress(attempts: int, max_steps: int, *, time: float, h: float, error: float) -> None:
    """Refuse to go on for ever.

    Raises:
        RuntimeError: with time, step and error.
    """
    if attempts < max_steps and abs(h) > 1e-14 * max(abs(time), 1e-3):
        return
    where = f"at t = {time:.6g} with step {h:.3g} and scaled error {error:.3g}"
    if attempts >= max_steps:
        raise RuntimeError(
            f"the solver took max_steps={max_steps} attempts and stopped {where}: the dynamics blew up or became "
            "stiff. Loosen rtol and atol, regularise the solver, or raise max_steps"
        )
    raise RuntimeError(
        f"the step became too small to move the time, {where}: the dynamics blew up or have a jump. Loosen rtol "
        "and atol, or bound the dynamics (tanh)"
    )
