"""Bad inputs of `inexact_bilevel`: each is answered by what was given, what is allowed, and how to mend it."""

from typing import Any

import pytest
import torch
from tests.bad_input import assert_refused, refused
from torch import Tensor, nn

from regularized.mechanisms.conjugate_gradient import NotPositiveDefinite
from regularized.papers.inexact_bilevel.contract import descent, ridge
from regularized.scientific.inexact_bilevel.baselines import HOAG
from regularized.scientific.inexact_bilevel.bound import BilevelConstants
from regularized.scientific.inexact_bilevel.denoising import FieldsOfExperts, TotalVariation
from regularized.scientific.inexact_bilevel.hypergradient import hypergradient
from regularized.scientific.inexact_bilevel.learn_strengths import learn_strengths
from regularized.scientific.inexact_bilevel.lower_solvers import InnerToleranceNotReached, solve_lower
from regularized.scientific.inexact_bilevel.maid import MAID
from regularized.training import CrossEntropy, Objective, Ridge


def _maid(**changes: Any):
    return MAID(**{**ridge(), **changes})


def _step(**changes: Any):
    return _maid(**changes).step()


def _concave(x: Tensor, theta: Tensor):
    return -0.5 * x.square().sum() + (x * theta).sum()


def _elsewhere(held: Tensor):
    return _step(theta=held, upper=lambda w: (w * held).sum())


def _batches(x: Tensor, theta: Tensor):
    return (torch.rand(4, dtype=x.dtype) * (x - theta - 1.0).square()).sum()


def bad_inputs():
    """Every line of the sheet's "bad input"."""
    one = torch.ones(4)
    return [
        refused(
            "lower not strongly convex",
            lambda: hypergradient(_concave, torch.sum, one, one),
            NotPositiveDefinite,
            ("p^T A p = -", "add ridge"),
        ),
        refused("mu missing", lambda: _maid(mu=None), ValueError, ("mu is missing", "least curvature")),
        refused("L missing", lambda: _maid(L=None), ValueError, ("L is missing", "largest curvature")),
        refused("mu <= 0", lambda: _maid(mu=0.0), ValueError, ("mu must be > 0, got 0.0", "ridge")),
        refused("L < mu", lambda: _maid(mu=2.0, L=1.0), ValueError, ("L must be", ">= mu = 2.0")),
        refused(
            "theta disconnected",
            lambda: _step(lower=lambda w, theta: 0.5 * (w - 1.0).square().sum() + theta.sum()),
            ValueError,
            ("does not depend on theta through the lower problem",),
        ),
        refused(
            "zero B",
            lambda: _step(lower=lambda w, theta: 0.5 * (w - 1.0).square().sum() + 0.0 * (w * theta).sum()),
            ValueError,
            ("does not depend on theta through the lower problem",),
        ),
        refused(
            "x disconnected",
            lambda: _step(upper=lambda w: torch.ones(())),
            ValueError,
            ("upper(x) does not depend on x",),
        ),
        refused(
            "theta cannot be differentiated",
            lambda: _maid(theta=torch.zeros(4, dtype=torch.long)),
            ValueError,
            ("theta must be floating point", "float64"),
        ),
        refused(
            "upper uses theta past its arguments",
            lambda: _elsewhere(torch.zeros(4, dtype=torch.float64, requires_grad=True)),
            ValueError,
            ("write it as upper(x, theta)",),
        ),
        refused(
            "inner tolerance not reached",
            lambda: _step(max_inner=2),
            InnerToleranceNotReached,
            ("after 2 iterations", "mu eps", "max_inner"),
        ),
        refused(
            "eps too small for float32",
            lambda: solve_lower(**_float32(), eps=1e-9, max_iterations=200),
            InnerToleranceNotReached,
            ("use float64",),
        ),
        refused(
            "mini-batches", lambda: _maid(lower=_batches), ValueError, ("the same arguments", "deterministic=False")
        ),
        refused("eps <= 0", lambda: _maid(eps=0.0), ValueError, ("eps", "> 0")),
        refused("eta outside (0, 1)", lambda: _maid(eta=1.0), ValueError, ("eta", "between 0 and 1")),
        refused("nu < 1", lambda: _maid(nu=0.9), ValueError, ("nu must be >= 1", "0.9")),
        refused("unknown bound", lambda: _maid(bound="exact"), ValueError, ("'rigorous'", "'exact'")),
        refused(
            "rigorous bound without its constants",
            lambda: _maid(bound="rigorous", constants=BilevelConstants(upper=1.0)),
            ValueError,
            ("cross_lipschitz", "heuristic"),
        ),
        refused("unknown schedule", lambda: descent(HOAG, schedule="linear"), ValueError, ("'cubic'", "'linear'")),
        refused("no end", lambda: _maid().run(), ValueError, ("steps, budget or both",)),
        refused(
            "state of another problem",
            lambda: _maid().load_state_dict({**_maid().state_dict(), "theta": torch.zeros(3)}),
            ValueError,
            ("theta has 3 entries", "4"),
        ),
        refused("colour images", lambda: TotalVariation(torch.rand(2, 3, 8, 8)), ValueError, ("(N, H, W)", "3, 8, 8")),
        refused(
            "filters larger than the images",
            lambda: FieldsOfExperts(torch.rand(2, 4, 4)).start(),
            ValueError,
            ("size 7", "(4, 4)"),
        ),
    ]


def _float32():
    problem = ridge(torch.float32)
    del problem["upper"]
    theta = problem["theta"]
    return {**problem, "mu": float(problem["mu"](theta)), "L": float(problem["L"](theta))}


@pytest.mark.parametrize(("call", "error", "says"), bad_inputs())
def test_bad_input(call, error, says):
    """Fails when it is accepted, or refused in words that do not help."""
    assert_refused(call, error, says)


def test_weights_in_shards(in_shards):
    """Fails when a copy of one process's part would be minimised as if it were the model."""
    data = (torch.randn(8, 2), torch.arange(8) % 2)
    objective = Objective({"task": CrossEntropy(), "ridge": Ridge(weight=0.1)})
    with pytest.raises(ValueError, match="weights of the model are in shards"):
        learn_strengths(objective, ["ridge"], data, model=in_shards(nn.Linear(2, 2)), data=data)
