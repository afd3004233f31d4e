"""Bad inputs of `weight_compander`: each is answered by what was given, what is allowed, and how to mend it."""

import pytest
import torch
from tests.bad_input import assert_refused, refused
from torch import nn

from regularized.evidence.models import mlp
from regularized.mechanisms.surgery import NoEffectWarning, check_optimizer_is_current
from regularized.overfitting.weight_compander import Compander, compand_weights
from regularized.papers.weight_compander.contract import TASK


def _twice():
    model = TASK.model()
    compand_weights(model)
    compand_weights(model)


def _out_of_range():
    model = TASK.model()
    with torch.no_grad():
        model[0].weight[0, 0] = 100.0
    compand_weights(model)


def _tied():
    model = mlp([6, 6, 6])
    model[2].weight = model[0].weight
    compand_weights(model)


def _stale_optimizer():
    model = TASK.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    compand_weights(model, learnable=True)
    check_optimizer_is_current(model, optimizer)


def bad_inputs():
    """Every line of the sheet's "bad input"."""
    return [
        refused("a <= 0", lambda: compand_weights(TASK.model(), a=0.0), ValueError, ("a must be", "positive", "0.0")),
        refused("b <= 0", lambda: Compander(1.0, -2.0), ValueError, ("b must be", "positive", "-2.0")),
        refused("|w| >= a pi / 2", _out_of_range, ValueError, ("out of range", "%", "smallest valid a")),
        refused("wrapped twice", _twice, ValueError, ("already companded", "merge_companders")),
        refused(
            "normalisation layers",
            lambda: compand_weights(nn.Sequential(nn.LayerNorm(3)), include=(nn.LayerNorm,)),
            ValueError,
            ("normalisation", "LayerNorm"),
        ),
        refused("tied weights", _tied, ValueError, ("shares its weight", "0.weight", "2.weight", "exclude")),
        refused("optimizer built before", _stale_optimizer, ValueError, ("optimizer", "4 trainable", "factory")),
        refused(
            "lazy layer",
            lambda: compand_weights(nn.Sequential(nn.LazyLinear(3))),
            ValueError,
            ("lazy", "run one batch"),
        ),
        refused("nothing matches", lambda: compand_weights(nn.ReLU()), NoEffectWarning, ("ReLU", "nothing")),
        refused(
            "unknown init",
            lambda: compand_weights(TASK.model(), init="B"),
            ValueError,
            ("init", "'preserve'", "'B'"),
        ),
    ]


@pytest.mark.parametrize(("call", "error", "says"), bad_inputs())
def test_bad_input(call, error, says):
    """Fails when it is accepted, or refused in words that do not help."""
    assert_refused(call, error, says)
