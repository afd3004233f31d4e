"""Bad inputs of `ode_regularization`: each is answered by what was given, what is allowed, and how to mend it."""

from typing import Any, cast

import pytest
import torch
from tests.bad_input import assert_refused, refused
from torch import Tensor, nn

from regularized.scientific.ode_regularization.layer import NeuralODE, NeuralSDE
from regularized.scientific.ode_regularization.local import LocalNeuralODE, RandomEndTime
from regularized.scientific.ode_regularization.ode_solver import odeint, odeint_on_grid
from regularized.scientific.ode_regularization.penalty import solver_penalty
from regularized.scientific.ode_regularization.sde_solver import sdeint, sdeint_on_grid
from regularized.scientific.ode_regularization.term import SolverRegularization, exponential_decay
from regularized.training.progress import Progress
from regularized.training.step import Batch, Step

_U = torch.ones(2, 3)


def _decay(t: Tensor, u: Tensor):
    return -u


def _eval_pass():
    layer = NeuralODE(_decay).eval()
    layer(_U)
    return solver_penalty(layer.statistics)


def _used_twice():
    layer = NeuralODE(_decay)
    layer(_U.clone().requires_grad_())
    solver_penalty(layer.statistics).backward()
    return solver_penalty(layer.statistics)


def _stiffness_of(method: str):
    layer = NeuralODE(_decay, method=method)
    layer(_U)
    return solver_penalty(layer.statistics, kind="stiffness")


def _no_layer():
    step = Step(nn.Linear(3, 2), Batch.of(_U), Progress(0, 1))
    value: Tensor = SolverRegularization()(step)
    return value


def _solve(f: Any = _decay, u0: Tensor = _U, times: Any = (0.0, 1.0), **settings: Any):
    return odeint(f, u0, times, **settings)


def _noisy(diffusion: Any = _decay, times: Any = (0.0, 1.0), **settings: Any):
    return sdeint(_decay, diffusion, _U, times, **settings)


def bad_inputs():
    """Every line of the sheet's "bad input", and what a user meets besides."""
    return [
        refused(
            "continuous adjoint",
            lambda: NeuralODE(_decay, backprop="adjoint"),
            ValueError,
            ("adjoint", "not", "direct", "checkpoint"),
        ),
        refused("no embedded pair", lambda: _solve(method="rk4"), ValueError, ("embedded", "tsit5", "dopri5", "rk4")),
        refused(
            "no embedded pair, layer", lambda: NeuralODE(_decay, method="euler"), ValueError, ("embedded", "euler")
        ),
        refused("stiffness of bosh3", lambda: _stiffness_of("bosh3"), ValueError, ("bosh3", "tsit5", "dopri5")),
        refused("no tolerance", lambda: _solve(rtol=0.0, atol=0.0), ValueError, ("rtol", "atol", "5e-07", "float64")),
        refused("tolerance below eps", lambda: _solve(u0=_U.half()), ValueError, ("float16", "0.004")),
        refused("negative tolerance", lambda: _solve(rtol=-1.0), ValueError, ("rtol", ">= 0", "-1")),
        refused("state of integers", lambda: _solve(u0=_U.long()), TypeError, ("floating", "int64", ".float()")),
        refused("empty state", lambda: _solve(u0=_U[:0]), ValueError, ("empty", "(0, 3)")),
        refused("statistics of an eval pass", _eval_pass, RuntimeError, ("no graph", "eval()", "train()")),
        refused("statistics used twice", _used_twice, RuntimeError, ("already", "new batch")),
        refused("statistics before a call", lambda: NeuralODE(_decay).statistics, RuntimeError, ("not called",)),
        refused(
            "too many steps",
            lambda: _solve(lambda t, u: (50 * t).sin() * 50 * u, max_steps=5),
            RuntimeError,
            ("max_steps=5", "t =", "step", "error"),
        ),
        refused(
            "blow up",
            lambda: _solve(lambda t, u: u.square(), times=(0.0, 2.0)),
            RuntimeError,
            ("t = ", "blew up"),
        ),
        refused("f not finite", lambda: _solve(lambda t, u: u / 0), RuntimeError, ("not finite", "t = 0", "norm")),
        refused("shape of f", lambda: _solve(lambda t, u: u[:, :1]), ValueError, ("shape", "(2, 3)", "(2, 1)")),
        refused("no time", lambda: _solve(times=()), ValueError, ("at least one",)),
        refused(
            "penalty without a step",
            lambda: solver_penalty(_solve(times=(0.0,)).statistics),
            ValueError,
            ("single time", "end time"),
        ),
        refused(
            "a grid of one time", lambda: odeint_on_grid(torch.neg, torch.ones(1), [0.0]), ValueError, ("at least two",)
        ),
        refused("times not in order", lambda: _solve(times=(0.0, 1.0, 0.5)), ValueError, ("rising", "0.5")),
        refused("unknown norm", lambda: _solve(norm="max"), ValueError, ("batch", "sample", "max")),
        refused("unknown controller", lambda: _solve(controller="pid"), ValueError, ("pi, integral", "'pid'")),
        refused("rows of a vector", lambda: _solve(u0=_U[0], norm="sample"), ValueError, ("(B, ...)", "(3,)")),
        refused(
            "diffusion not diagonal",
            lambda: _noisy(lambda t, u: u.new_ones(2, 3, 3)),
            ValueError,
            ("diffusion", "diagonal", "(2, 3)", "(2, 3, 3)"),
        ),
        refused("noise backward in time", lambda: _noisy(times=(1.0, 0.0)), ValueError, ("forward", "rise")),
        refused("unknown stochastic method", lambda: _noisy(method="euler"), ValueError, ("sosri", "euler")),
        refused(
            "increments missing",
            lambda: sdeint_on_grid(_decay, _decay, _U, (0.0, 1.0), increments=[]),
            ValueError,
            ("1 increments", "got 0"),
        ),
        refused("diffusion not finite", lambda: _noisy(lambda t, u: u / 0), RuntimeError, ("not finite", "t =")),
        refused("layer without method", lambda: NeuralSDE(_decay, _decay, method="rk4"), ValueError, ("sosri", "rk4")),
        refused("no steps", lambda: NeuralODE(_decay, steps=0), ValueError, ("steps", "at least 1", "0")),
        refused("unknown kind", lambda: SolverRegularization(kind="x"), ValueError, ("stiffness", "'x'")),
        refused(
            "unknown reduction",
            lambda: SolverRegularization(reduction="min"),
            ValueError,
            ("mean", "'min'"),
        ),
        refused(
            "unknown sampling",
            lambda: LocalNeuralODE(_decay, sampling="fair"),
            ValueError,
            ("unbiased", "biased", "'fair'"),
        ),
        refused("local, fixed steps", lambda: LocalNeuralODE(_decay, steps=3), ValueError, ("adaptive", "3")),
        refused(
            "biased from a constant",
            lambda: LocalNeuralODE(_decay, sampling="biased", detach=True),
            ValueError,
            ("unbiased", "detach"),
        ),
        refused(
            "random end before the start",
            lambda: RandomEndTime(NeuralODE(_decay), spread=1.0),
            ValueError,
            ("between 0", "length 1", "1.0"),
        ),
        refused(
            "random end of another layer",
            lambda: RandomEndTime(cast(Any, nn.Linear(2, 2))),
            TypeError,
            ("NeuralODE", "Linear"),
        ),
        refused("model without layer", _no_layer, ValueError, ("NeuralODE", "Linear")),
        refused("decay to zero", lambda: exponential_decay(1.0, 0.0), ValueError, ("> 0", "0.0")),
    ]


@pytest.mark.parametrize(("call", "error", "says"), bad_inputs())
def test_bad_input(call, error, says):
    """Fails when it is accepted, or refused in words that do not help."""
    assert_refused(call, error, says)
