"""What the common contract trains, and every bad input with its error.

The subjects take a given number of steps and one error a row, so that a batch is the sum of its parts and nothing waits
for the device. Adaptive steps are shared by a batch: there, results depend on the batch by design.
"""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from regularized.evidence.contract import BadInput, Classification, NotApplicable, Subject, plain
from regularized.scientific.ode_regularization.layer import (
    NeuralODE,
    NeuralSDE,
    SolverRegularization,
    exponential_decay,
    solver_penalty,
)
from regularized.scientific.ode_regularization.local import LocalNeuralODE, RandomEndTime
from regularized.scientific.ode_regularization.ode_solver import odeint
from regularized.scientific.ode_regularization.sde_solver import sdeint, sdeint_on_grid
from regularized.training.progress import Progress
from regularized.training.step import Batch, Step

FEATURES, CLASSES = 4, 3
TASK = Classification(FEATURES, CLASSES, random_labels=True)


class _Field(nn.Module):
    """A small network of the state, growing with time."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(FEATURES, FEATURES)

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        return torch.tanh(self.linear(u)) * (2.0 + t)


def _model() -> nn.Module:
    layer = NeuralODE(_Field(), steps=2, norm="sample", rtol=1e-2, atol=1e-2)
    return nn.Sequential(layer, nn.Linear(FEATURES, CLASSES))


def _errors() -> Mapping[str, nn.Module]:
    return {**plain(), "solver": SolverRegularization(weight=exponential_decay(0.5, 0.2))}


def _both() -> Mapping[str, nn.Module]:
    return {**plain(), "solver": SolverRegularization(kind="both", reduction="sum", weight=0.1)}


def _off() -> Mapping[str, nn.Module]:
    return {**plain(), "solver": SolverRegularization(weight=0.0)}


def subjects() -> list[Subject]:
    """Error regularisation with annealing, and errors with stiffness."""
    no_part = NotApplicable("an adaptive solver decides on the host which step comes next")
    return [
        Subject("error", model=_model, terms=_errors, off=_off, plain=plain, data=TASK.data, part=no_part),
        Subject("both", model=_model, terms=_both, off=_off, plain=plain, data=TASK.data, part=no_part),
    ]


_U = torch.ones(2, 3)


def _decay(t: Tensor, u: Tensor) -> Tensor:
    return -u


def _eval_pass() -> Tensor:
    layer = NeuralODE(_decay).eval()
    layer(_U)
    return solver_penalty(layer.statistics)


def _used_twice() -> Tensor:
    layer = NeuralODE(_decay)
    layer(_U.clone().requires_grad_())
    solver_penalty(layer.statistics).backward()
    return solver_penalty(layer.statistics)


def _stiffness_of(method: str) -> Tensor:
    layer = NeuralODE(_decay, method=method)
    layer(_U)
    return solver_penalty(layer.statistics, kind="stiffness")


def _no_layer() -> Tensor:
    step = Step(nn.Linear(3, 2), Batch.of(_U), Progress(0, 1))
    value: Tensor = SolverRegularization()(step)
    return value


def _solve(f: Any = _decay, u0: Tensor = _U, times: Any = (0.0, 1.0), **settings: Any) -> Any:
    return odeint(f, u0, times, **settings)


def _noisy(diffusion: Any = _decay, times: Any = (0.0, 1.0), **settings: Any) -> Any:
    return sdeint(_decay, diffusion, _U, times, **settings)


def bad_inputs() -> list[BadInput]:
    """Every line of the sheet's "bad input", and what a user meets besides."""
    return [
        BadInput(
            "continuous adjoint",
            lambda: NeuralODE(_decay, backprop=cast(Any, "adjoint")),
            ValueError,
            ("adjoint", "not", "direct", "checkpoint"),
        ),
        BadInput("no embedded pair", lambda: _solve(method="rk4"), ValueError, ("embedded", "tsit5", "dopri5", "rk4")),
        BadInput(
            "no embedded pair, layer", lambda: NeuralODE(_decay, method="euler"), ValueError, ("embedded", "euler")
        ),
        BadInput("stiffness of bosh3", lambda: _stiffness_of("bosh3"), ValueError, ("bosh3", "tsit5", "dopri5")),
        BadInput("no tolerance", lambda: _solve(rtol=0.0, atol=0.0), ValueError, ("rtol", "atol", "5e-07", "float64")),
        BadInput("tolerance below eps", lambda: _solve(u0=_U.half()), ValueError, ("float16", "0.004")),
        BadInput("negative tolerance", lambda: _solve(rtol=-1.0), ValueError, ("rtol", ">= 0", "-1")),
        BadInput("state of integers", lambda: _solve(u0=_U.long()), TypeError, ("floating", "int64", ".float()")),
        BadInput("empty state", lambda: _solve(u0=_U[:0]), ValueError, ("empty", "(0, 3)")),
        BadInput("statistics of an eval pass", _eval_pass, RuntimeError, ("no graph", "eval()", "train()")),
        BadInput("statistics used twice", _used_twice, RuntimeError, ("already", "new batch")),
        BadInput("statistics before a call", lambda: NeuralODE(_decay).statistics, RuntimeError, ("not called",)),
        BadInput(
            "too many steps",
            lambda: _solve(lambda t, u: (50 * t).sin() * 50 * u, max_steps=5),
            RuntimeError,
            ("max_steps=5", "t =", "step", "error"),
        ),
        BadInput(
            "blow up",
            lambda: _solve(lambda t, u: u.square(), times=(0.0, 2.0)),
            RuntimeError,
            ("t = ", "blew up"),
        ),
        BadInput("f not finite", lambda: _solve(lambda t, u: u / 0), RuntimeError, ("not finite", "t = 0", "norm")),
        BadInput("shape of f", lambda: _solve(lambda t, u: u[:, :1]), ValueError, ("shape", "(2, 3)", "(2, 1)")),
        BadInput("one time", lambda: _solve(times=(0.0,)), ValueError, ("at least two",)),
        BadInput("times not in order", lambda: _solve(times=(0.0, 1.0, 0.5)), ValueError, ("rising", "0.5")),
        BadInput("unknown norm", lambda: _solve(norm="max"), ValueError, ("batch", "sample", "max")),
        BadInput("unknown controller", lambda: _solve(controller="pid"), ValueError, ("pi, integral", "'pid'")),
        BadInput("rows of a vector", lambda: _solve(u0=_U[0], norm="sample"), ValueError, ("(B, ...)", "(3,)")),
        BadInput(
            "diffusion not diagonal",
            lambda: _noisy(lambda t, u: u.new_ones(2, 3, 3)),
            ValueError,
            ("diffusion", "diagonal", "(2, 3)", "(2, 3, 3)"),
        ),
        BadInput("noise backward in time", lambda: _noisy(times=(1.0, 0.0)), ValueError, ("forward", "rise")),
        BadInput("unknown stochastic method", lambda: _noisy(method="euler"), ValueError, ("sosri", "euler")),
        BadInput(
            "increments missing",
            lambda: sdeint_on_grid(_decay, _decay, _U, (0.0, 1.0), increments=[]),
            ValueError,
            ("1 increments", "got 0"),
        ),
        BadInput("diffusion not finite", lambda: _noisy(lambda t, u: u / 0), RuntimeError, ("not finite", "t =")),
        BadInput("layer without method", lambda: NeuralSDE(_decay, _decay, method="rk4"), ValueError, ("sosri", "rk4")),
        BadInput("no steps", lambda: NeuralODE(_decay, steps=0), ValueError, ("steps", "at least 1", "0")),
        BadInput("unknown kind", lambda: SolverRegularization(kind=cast(Any, "x")), ValueError, ("stiffness", "'x'")),
        BadInput(
            "unknown reduction",
            lambda: SolverRegularization(reduction=cast(Any, "min")),
            ValueError,
            ("mean", "'min'"),
        ),
        BadInput(
            "unknown sampling",
            lambda: LocalNeuralODE(_decay, sampling=cast(Any, "fair")),
            ValueError,
            ("unbiased", "biased", "'fair'"),
        ),
        BadInput("local, fixed steps", lambda: LocalNeuralODE(_decay, steps=3), ValueError, ("adaptive", "3")),
        BadInput(
            "biased from a constant",
            lambda: LocalNeuralODE(_decay, sampling="biased", detach=True),
            ValueError,
            ("unbiased", "detach"),
        ),
        BadInput(
            "random end before the start",
            lambda: RandomEndTime(NeuralODE(_decay), spread=1.0),
            ValueError,
            ("between 0", "length 1", "1.0"),
        ),
        BadInput(
            "random end of another layer",
            lambda: RandomEndTime(cast(Any, nn.Linear(2, 2))),
            TypeError,
            ("NeuralODE", "Linear"),
        ),
        BadInput("model without layer", _no_layer, ValueError, ("NeuralODE", "Linear")),
        BadInput("decay to zero", lambda: exponential_decay(1.0, 0.0), ValueError, ("> 0", "0.0")),
    ]
