"""Bad inputs of `active_self_paced`: each is answered by what was given, what is allowed, and how to mend it."""

import pytest
import torch
from tests.bad_input import assert_refused, refused

from regularized.curriculum.active_self_paced.loss import self_paced_weights
from regularized.papers.active_self_paced.contract import _CLASSES, SAMPLES, first_of_each_class, learner


def _first():
    return next(iter(first_of_each_class()))


def bad_inputs():
    """Every line of the sheet's "bad input"."""
    nan = torch.full((SAMPLES, _CLASSES), float("nan"))
    return [
        refused("no certified sample", lambda: learner(start={0: 0}), ValueError, ("no certified sample", "[1, 2]")),
        refused("lambda <= 0", lambda: learner(pace=0.0), ValueError, ("pace must be positive", "0.0")),
        refused("C <= 0", lambda: learner(cost=-1.0), ValueError, ("cost must be positive", "-1.0")),
        refused("pace step < 0", lambda: learner(pace_step=-0.1), ValueError, ("pace_step", "-0.1")),
        refused(
            "budget larger than the pool",
            lambda: learner(budget=1000).ask(torch.zeros(SAMPLES, _CLASSES)),
            UserWarning,
            ("budget of 1000", "21"),
        ),
        refused(
            "oracle: wrong length", lambda: learner().certify([1, 2], [0]), ValueError, ("1 labels came for 2 samples",)
        ),
        refused(
            "oracle: out of range",
            lambda: learner().certify([(_first() + 1) % SAMPLES], [7]),
            ValueError,
            ("label 7", "new_classes=True"),
        ),
        refused(
            "already certified",
            lambda: learner().certify([_first()], [0]),
            ValueError,
            ("already certified", "correct()"),
        ),
        refused(
            "negative loss", lambda: self_paced_weights(torch.tensor([-0.5]), 1.0), ValueError, ("at least 0", "-0.5")
        ),
        refused("scores not (n, m)", lambda: learner().assign(torch.zeros(3)), ValueError, ("shape (24, 3)", "(3,)")),
        refused("scores NaN", lambda: learner().assign(nan), ValueError, ("72 of 72", "not finite")),
        refused(
            "all weights 0",
            lambda: self_paced_weights(torch.tensor([3.0, 5.0]), 1.0),
            UserWarning,
            ("median loss is 3", "raise the pace"),
        ),
    ]


@pytest.mark.parametrize(("call", "error", "says"), bad_inputs())
def test_bad_input(call, error, says):
    """Fails when it is accepted, or refused in words that do not help."""
    assert_refused(call, error, says)
