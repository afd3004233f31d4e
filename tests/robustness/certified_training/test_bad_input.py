"""Bad inputs of `certified_training`: each is answered by what was given, what is allowed, and how to mend it."""

import pytest
import torch
from tests.bad_input import assert_refused, refused
from torch import nn
from torch.nn import functional as F

from regularized.mechanisms.surgery import NoEffectWarning
from regularized.robustness.certified_training import (
    CertifiedLoss,
    CertifiedTraining,
    FastCertifiedTraining,
    Interval,
    IntervalBounds,
    SmoothedRadius,
    UnsupportedOperation,
    interval_init_,
    interval_rule,
    linf_box,
    verified,
    verify,
)
from regularized.training import Batch, Progress
from regularized.training.step import Step


def network(*layers):
    return nn.Sequential(nn.Linear(4, 6), *layers, nn.ReLU(), nn.Linear(6, 3))


X, Y = torch.rand(5, 4), torch.tensor([0, 1, 2, 0, 1])


class Calls(nn.Module):
    """A network around a function."""

    def __init__(self, function):
        super().__init__()
        self.function, self.out = function, nn.Linear(4, 3)

    def forward(self, x):
        return self.out(self.function(x))


class Two(nn.Module):
    def forward(self, x, y):
        return x + y


class Tuple(nn.Module):
    def forward(self, x):
        return x, x


def margins(model, y, x=X):
    return IntervalBounds(model)(linf_box(x, 0.1)).margins(y)


def _in_place_of_a_view(x):
    h = 1.0 * x
    F.relu(h.view(-1, 2), inplace=True)
    return h


def _another_batch():
    model = network(nn.BatchNorm1d(6))
    bounds = IntervalBounds(model)
    model(X)
    bounds(linf_box(X[:3], 0.1))


def _one_sample():
    model = network(nn.BatchNorm1d(6))
    IntervalBounds(model)
    model(X[:1])


def _no_running_statistics():
    verify(network(nn.BatchNorm1d(6, track_running_stats=False)), [(X, Y)], radius=0.1)


def procedure(**options):
    return FastCertifiedTraining(network(), optimizer=torch.optim.Adam, **({"radius": 0.1, "length": 2} | options))


def bad_inputs():
    return [
        refused(
            "module without a rule",
            lambda: IntervalBounds(network(nn.GELU())),
            UnsupportedOperation,
            ("module '1' (GELU)", "@interval_rule(GELU)"),
        ),
        refused(
            "function without a rule",
            lambda: IntervalBounds(Calls(torch.sin)),
            UnsupportedOperation,
            ("function 'sin'", "@interval_rule"),
        ),
        refused(
            "method without a rule",
            lambda: IntervalBounds(Calls(lambda x: x.cumsum(1))),
            UnsupportedOperation,
            ("method 'cumsum'", "@interval_rule('cumsum')"),
        ),
        refused(
            "activation without a rule",
            lambda: CertifiedLoss(network(nn.SiLU()), radius=0.1),
            UnsupportedOperation,
            ("SiLU", "never falls"),
        ),
        refused(
            "network that looks at values",
            lambda: IntervalBounds(Calls(lambda x: x if x.sum() > 0 else -x)),
            UnsupportedOperation,
            ("traced", "@interval_rule"),
        ),
        refused("two inputs", lambda: IntervalBounds(Two()), UnsupportedOperation, ("one input", "2")),
        refused("two outputs", lambda: IntervalBounds(Tuple()), UnsupportedOperation, ("one tensor",)),
        refused(
            "in place behind a view",
            lambda: IntervalBounds(Calls(_in_place_of_a_view)),
            UnsupportedOperation,
            ("in place", "without inplace"),
        ),
        refused("rule for a value", lambda: interval_rule(3.0), TypeError, ("type of modules", "3.0")),
        refused(
            "bounds before the clean batch",
            lambda: IntervalBounds(network(nn.BatchNorm1d(6)))(linf_box(X, 0.1)),
            RuntimeError,
            ("'1'", "model(x)", "none has passed"),
        ),
        refused("bounds of another batch", _another_batch, RuntimeError, ("same 3 samples", "5 samples")),
        refused("one sample in training", _one_sample, ValueError, ("more than 1 value", "statistics of a batch")),
        refused("no running statistics", _no_running_statistics, RuntimeError, ("track_running_stats",)),
        refused(
            "radius in 0 ... 255",
            lambda: linf_box(X, 8.0, data_range=(0.0, 1.0)),
            UserWarning,
            ("8 ", "wider", "8/255"),
        ),
        refused(
            "std forgotten",
            lambda: CertifiedLoss(network(), radius=0.5, std=0.1, data_range=(-2.0, 2.0)),
            UserWarning,
            ("wider", "std"),
        ),
        refused("whole numbers", lambda: linf_box(X.long(), 0.1), TypeError, ("int64", "x.float() / 255")),
        refused("inputs by name", lambda: linf_box({"pixels": X}, 0.1), TypeError, ("one tensor", "dict")),
        refused("half a description", lambda: Interval(lower=X), ValueError, ("both ends", "Interval.between")),
        refused("negative radius", lambda: linf_box(X, -0.1), ValueError, ("radius", "-0.1")),
        refused("negative radius of a term", lambda: CertifiedTraining(radius=-0.1), ValueError, ("radius", ">= 0")),
        refused(
            "radius that is no schedule", lambda: CertifiedTraining(radius="8/255"), TypeError, ("SmoothedRadius",)
        ),
        refused(
            "schedule without an end",
            lambda: CertifiedLoss(network(), radius=lambda progress: 0.1),
            TypeError,
            ("largest",),
        ),
        refused("std of 0", lambda: linf_box(X, 0.1, std=0.0), ValueError, ("std", "positive")),
        refused(
            "empty range",
            lambda: CertifiedTraining(radius=0.1, data_range=(1.0, 0.0)),
            ValueError,
            ("data_range", "(0 - mean) / std"),
        ),
        refused(
            "std of other channels", lambda: linf_box(X, 0.1, std=(0.1, 0.2)), ValueError, ("std", "4 channels", "(2,)")
        ),
        refused("label out of range", lambda: margins(network(), Y + 1), ValueError, ("0 ... 2", "1 ... 3")),
        refused("negative label", lambda: margins(network(), Y - 1), ValueError, ("0 ... 2", "-1")),
        refused("labels of another batch", lambda: margins(network(), Y[:2]), ValueError, ("5 class numbers", "(2,)")),
        refused("labels that are numbers", lambda: margins(network(), Y / 2), ValueError, ("class numbers", "float")),
        refused(
            "one class",
            lambda: margins(nn.Sequential(nn.ReLU(), nn.Linear(4, 1)), Y * 0),
            ValueError,
            ("two classes", "(5, 1)"),
        ),
        refused(
            "dropout that is active",
            lambda: margins(network(nn.Dropout(0.2)), Y),
            ValueError,
            ("dropout", "p=0.2", "evaluation"),
        ),
        refused(
            "schedule without batches",
            lambda: SmoothedRadius(0.1, start=1, length=2, batches_per_epoch=0),
            ValueError,
            ("batches_per_epoch", "0"),
        ),
        refused(
            "schedule without length",
            lambda: SmoothedRadius(0.1, start=1, length=0, batches_per_epoch=5),
            ValueError,
            ("length", "0", "constant"),
        ),
        refused(
            "schedule from epoch 0",
            lambda: SmoothedRadius(0.1, start=0, length=1, batches_per_epoch=5),
            ValueError,
            ("start", "0"),
        ),
        refused(
            "schedule to nothing",
            lambda: SmoothedRadius(0.0, start=1, length=1, batches_per_epoch=5),
            ValueError,
            ("largest", "positive"),
        ),
        refused(
            "exponent of a line",
            lambda: SmoothedRadius(0.1, start=1, length=1, batches_per_epoch=5, exponent=1.0),
            ValueError,
            ("exponent", ">= 2"),
        ),
        refused(
            "last layer that is not linear",
            lambda: IntervalBounds(nn.Sequential(nn.Linear(4, 3), nn.Tanh())),
            UserWarning,
            ("looser", "nn.Linear"),
        ),
        refused(
            "negative penalty", lambda: CertifiedTraining(radius=0.1, penalty=-1.0), ValueError, ("penalty", ">= 0")
        ),
        refused("tolerance of 0", lambda: procedure(tolerance=0.0), ValueError, ("tolerance", "(0, 1]")),
        refused(
            "penalty without a ReLU",
            lambda: CertifiedLoss(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), radius=0.1),
            NoEffectWarning,
            ("no ReLU",),
        ),
        refused("nothing to initialise", lambda: interval_init_(nn.Linear(4, 3)), ValueError, ("1 weight",)),
        refused(
            "term without a model",
            lambda: CertifiedTraining(radius=0.1)(Step(network(), Batch(X, Y), Progress(0, 1))),
            RuntimeError,
            ("attach(model)",),
        ),
        refused(
            "epochs that end before the radius",
            lambda: procedure(length=5).fit([(X, Y)], epochs=3),
            ValueError,
            ("start + length - 1 = 6", "epochs=3"),
        ),
        refused("procedure without labels", lambda: procedure(length=1).fit([X], epochs=2), ValueError, ("labels",)),
        refused("no samples", lambda: verify(network(), [], radius=0.1), ValueError, ("no sample",)),
        refused("samples without classes", lambda: verify(network(), [X], radius=0.1), ValueError, ("(x, y)",)),
    ]


@pytest.mark.parametrize(("call", "error", "says"), bad_inputs())
def test_refusals(call, error, says):
    """Fails when an input that cannot work is taken, or its message does not help."""
    assert_refused(call, error, says)


def test_looser_margins_are_still_margins():
    """Fails when a network that does not end with a linear layer has no margins, or unsound ones."""
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh())
    with pytest.warns(UserWarning, match="looser"):
        found = margins(model, Y)
    logits = model(X)
    assert bool((found <= logits.gather(1, Y[:, None]) - logits + 1e-6).all())


def test_verification_in_training_mode_is_refused():
    """Fails when bounds that hang on the batch pass as a proof."""
    model = network(nn.BatchNorm1d(6)).train()
    assert_refused(
        lambda: verified(IntervalBounds(model), X, Y, radius=0.1), RuntimeError, ("training mode", "evaluation")
    )
