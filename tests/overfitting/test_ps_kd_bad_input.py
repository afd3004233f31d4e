"""Bad inputs of `ps_kd`: each is answered by what was given, what is allowed, and how to mend it."""

import pytest
import torch
from tests.bad_input import assert_refused, refused
from torch import Tensor, nn

from regularized.mechanisms.prediction_store import DenseStore
from regularized.overfitting.ps_kd import ProgressiveDistillation, ProgressiveDistillationLoss
from regularized.papers.ps_kd.contract import CLASSES, SAMPLES, last_epoch_loss


def _call(index: Tensor | None, *, labels: Tensor | None = None, classes: int = CLASSES, loss: nn.Module | None = None):
    loss = last_epoch_loss() if loss is None else loss
    logits = torch.zeros(2, classes, requires_grad=True)
    loss(logits, torch.tensor([0, 1]) if labels is None else labels, index)


def _never_told():
    criterion = ProgressiveDistillationLoss(SAMPLES, CLASSES, epochs=3)
    _call(torch.tensor([0, 1]), loss=criterion)
    _call(torch.tensor([1, 2]), loss=criterion)


def _evaluated_in_training_mode():
    with torch.no_grad():
        _call(torch.tensor([0, 1]))


def _other_device():
    criterion = last_epoch_loss().to("meta")
    _call(torch.tensor([0, 1]), loss=criterion)


def bad_inputs():
    """Every line of the sheet's "bad input"."""
    soft = torch.full((2, CLASSES), 1 / CLASSES)
    return [
        refused("no index", lambda: _call(None), ValueError, ("index of each sample", "IndexedDataset")),
        refused(
            "index too large",
            lambda: _call(torch.tensor([0, 24])),
            IndexError,
            ("index 24", "num_samples=24"),
        ),
        refused("index negative", lambda: _call(torch.tensor([0, -1])), IndexError, ("index -1", "num_samples=24")),
        refused("index of floats", lambda: _call(torch.tensor([0.0, 1.0])), TypeError, ("integers", "float32")),
        refused("index repeated", lambda: _call(torch.tensor([5, 5])), UserWarning, ("more than once", "last")),
        refused("one index for all", lambda: _call(torch.tensor([5])), ValueError, ("one index a sample", "(2,)")),
        refused("soft labels", lambda: _call(torch.arange(2), labels=soft), ValueError, ("class labels", "mix=Mix")),
        refused(
            "epoch beyond the last", lambda: last_epoch_loss().set_epoch(3), ValueError, ("epochs=3", "[0, 3)", "got 3")
        ),
        refused(
            "no epochs",
            lambda: ProgressiveDistillationLoss(SAMPLES, CLASSES, epochs=0),
            ValueError,
            ("epochs must be at least 1",),
        ),
        refused("progress outside [0, 1]", lambda: last_epoch_loss().set_progress(1.5), ValueError, ("[0, 1]", "1.5")),
        refused("alpha outside [0, 1]", lambda: last_epoch_loss(alpha=1.2), ValueError, ("alpha", "[0, 1]", "1.2")),
        refused(
            "alpha of the term outside [0, 1]",
            lambda: ProgressiveDistillation(SAMPLES, CLASSES, alpha=-0.1),
            ValueError,
            ("alpha", "[0, 1]", "-0.1"),
        ),
        refused("set_epoch never called", _never_told, RuntimeError, ("second time", "set_epoch(epoch)")),
        refused("wrong num_classes", lambda: _call(torch.arange(2), classes=5), ValueError, ("num_classes=4", "5")),
        refused("other device", _other_device, ValueError, ("logits are on cpu", "history", "meta", ".to('cpu')")),
        refused("no eval()", _evaluated_in_training_mode, RuntimeError, ("training mode", ".eval()")),
        refused(
            "store of another size",
            lambda: ProgressiveDistillation(SAMPLES, CLASSES, store=DenseStore(9, CLASSES)),
            ValueError,
            ("9 samples", "num_samples=24"),
        ),
    ]


@pytest.mark.parametrize(("call", "error", "says"), bad_inputs())
def test_bad_input(call, error, says):
    """Fails when it is accepted, or refused in words that do not help."""
    assert_refused(call, error, says)
