"""Bad inputs of `early_learning`: each is answered by what was given, what is allowed, and how to mend it."""

from typing import Any

import pytest
import torch
from tests.bad_input import assert_refused, refused
from torch import Tensor

from regularized.noisy_labels.early_learning.loss import EarlyLearningLoss
from regularized.noisy_labels.early_learning.term import EarlyLearning
from regularized.papers.early_learning.contract import CLASSES, TASK, elr_plus


def _loss(*, n: int = 4, **settings: Any):
    return EarlyLearningLoss(n, CLASSES, **settings)


_Z, _Y, _I = torch.zeros(2, CLASSES), torch.tensor([0, 1]), torch.tensor([0, 1])


def _without_gradient():
    with torch.no_grad():
        value: Tensor = _loss()(_Z, _Y, _I)
    return value


def _one_network():
    model = TASK.model()
    return elr_plus(lambda: model)


def bad_inputs():
    """Every line of the sheet's "bad input", and what a user meets besides."""
    soft, twice = torch.full((2, CLASSES), 1 / CLASSES), torch.tensor([1, 1])
    return [
        refused("missing index", lambda: _loss()(_Z, _Y), ValueError, ("index", "IndexedDataset")),
        refused("index too large", lambda: _loss()(_Z, _Y, _I + 3), IndexError, ("4", "num_samples=4", "Subset")),
        refused("index negative", lambda: _loss()(_Z, _Y, _I - 1), IndexError, ("-1", "num_samples=4")),
        refused("index of floats", lambda: _loss()(_Z, _Y, _I.float()), TypeError, ("integers", "float32")),
        refused("index of another batch", lambda: _loss()(_Z, _Y, _I[:1]), ValueError, ("(2,)", "(1,)")),
        refused("beta above 1", lambda: _loss(momentum=1.1), ValueError, ("momentum", "[0, 1]", "1.1")),
        refused("beta below 0", lambda: _loss(momentum=-0.1), ValueError, ("momentum", "[0, 1]", "-0.1")),
        refused("lam < 0", lambda: _loss(strength=-1.0), ValueError, ("strength", ">= 0", "-1")),
        refused(
            "lam < 0, the term", lambda: EarlyLearning(4, CLASSES, weight=-1.0), ValueError, ("weight", ">= 0", "-1")
        ),
        refused("eps >= 1/C", lambda: _loss(eps=0.34), ValueError, ("eps", "0.3333", "0.34")),
        refused("the same sample twice", lambda: _loss()(_Z, _Y, twice), UserWarning, ("more than once", "last")),
        refused("probabilities", lambda: _loss()(soft, _Y, _I), UserWarning, ("probabilities", "logits", "softmax")),
        refused("soft labels", lambda: _loss()(_Z, soft, _I), ValueError, ("soft", "EarlyLearningPlusLoss")),
        refused("validation in training mode", _without_gradient, RuntimeError, ("eval()", "history")),
        refused(
            "other number of classes",
            lambda: _loss()(torch.zeros(2, 5), _Y, _I),
            ValueError,
            (f"num_classes={CLASSES}", "(2, 5)"),
        ),
        refused("labels of a part", lambda: _loss().suspected_label_errors(_Y), ValueError, ("(4,)", "(2,)")),
        refused("ELR+ of one network", _one_network, ValueError, ("make_model", "new one")),
        refused(
            "ELR+ on tokens",
            lambda: elr_plus().training_step(0, (torch.zeros(2, 5, dtype=torch.int64), _Y, _I)),
            TypeError,
            ("mixup", "int64"),
        ),
        refused("ELR+ without index", lambda: elr_plus().training_step(0, (_Z, _Y)), ValueError, ("index",)),
        refused("ELR+ mixup < 0", lambda: elr_plus(mixup=-1.0), ValueError, ("mixup", ">= 0")),
    ]


@pytest.mark.parametrize(("call", "error", "says"), bad_inputs())
def test_bad_input(call, error, says):
    """Fails when it is accepted, or refused in words that do not help."""
    assert_refused(call, error, says)
