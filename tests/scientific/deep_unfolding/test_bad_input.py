"""Bad inputs of `deep_unfolding`: each is answered by what was given, what is allowed, and how to mend it."""

import pytest
import torch
from tests.bad_input import assert_refused, refused
from torch import Tensor

from regularized.papers.deep_unfolding.contract import measurements
from regularized.scientific.deep_unfolding.layer import UnfoldedIHT, UnfoldedISTA
from regularized.scientific.deep_unfolding.loss import SparseObjective
from regularized.scientific.deep_unfolding.procedure import BernoulliGaussian, IncrementalTraining


def _no_signals(size: int):
    return None, torch.randn(size, 6)


def _loaded(steps: Tensor):
    network = UnfoldedISTA(measurements(), 0.1, layers=2)
    network.load_state_dict({**network.state_dict(), "steps": steps})


def bad_inputs():
    """Every line of the sheet's "bad input"."""
    matrix = measurements()
    network = UnfoldedISTA(matrix, 0.1, layers=2)
    sampler = BernoulliGaussian(matrix)
    return [
        refused("lam <= 0", lambda: UnfoldedISTA(matrix, 0.0, layers=2), ValueError, ("penalty (lambda)", "> 0")),
        refused("lam is nan", lambda: SparseObjective(matrix, float("nan")), ValueError, ("penalty (lambda)", "nan")),
        refused(
            "step <= 0 after loading",
            lambda: _loaded(torch.tensor([0.1, -0.2])),
            ValueError,
            ("step sizes must be positive", "-0.2"),
        ),
        refused("A not 2-D", lambda: UnfoldedIHT(matrix[0], 0.1, layers=2), ValueError, ("shape (10,)",)),
        refused("y of another length", lambda: network(torch.randn(6, 3)), ValueError, ("(B, 6)", "(6, 3)", "a row")),
        refused(
            "supervised without targets",
            lambda: IncrementalTraining(network, _no_signals).fit(),
            ValueError,
            ("supervised", "true signals"),
        ),
        refused(
            "objective of another problem",
            lambda: IncrementalTraining(network, sampler, loss=SparseObjective(matrix, 0.2)),
            UserWarning,
            ("another matrix, penalty or norm",),
        ),
        refused(
            "complex A",
            lambda: UnfoldedISTA(torch.complex(matrix, matrix), 0.1, layers=2),
            ValueError,
            ("complex", "stack real and imaginary"),
        ),
        refused(
            "lambda so large that all is zero",
            lambda: IncrementalTraining(UnfoldedISTA(matrix, 1e3, layers=1), sampler, steps_per_layer=1).fit(),
            UserWarning,
            ("all zero", "too large"),
        ),
        refused(
            "unknown loss",
            lambda: IncrementalTraining(network, sampler, loss="mse"),
            ValueError,
            ("'supervised'", "'mse'"),
        ),
        refused("unknown norm", lambda: SparseObjective(matrix, 0.1, norm="l2"), ValueError, ("'l2'",)),
        refused(
            "free hard threshold",
            lambda: UnfoldedIHT(matrix, 0.1, layers=2, tie_threshold=False),
            ValueError,
            ("no gradient", "UnfoldedISTA"),
        ),
        refused("density 0", lambda: BernoulliGaussian(matrix, density=0.0), ValueError, ("density", "(0, 1]")),
        refused("no layers", lambda: UnfoldedISTA(matrix, 0.1, layers=0), ValueError, ("layers", "0")),
        refused("too deep", lambda: network(torch.randn(2, 6), depth=5), ValueError, ("1 ... 2", "5")),
    ]


@pytest.mark.parametrize(("call", "error", "says"), bad_inputs())
def test_bad_input(call, error, says):
    """Fails when it is accepted, or refused in words that do not help."""
    assert_refused(call, error, says)


def test_weights_in_shards(in_shards):
    """Fails when it would train shards, of whose gradients it sees a part."""
    matrix = measurements()
    network = in_shards(UnfoldedISTA(matrix, 0.1, layers=2))
    with pytest.raises(ValueError, match="weights of the network are in shards"):
        IncrementalTraining(network, BernoulliGaussian(matrix))
