"""Bad inputs of `nested_dropout`: each is answered by what was given, what is allowed, and how to mend it."""

import warnings
from typing import Any

import pytest
import torch
from tests.bad_input import assert_refused, refused
from torch import nn

from regularized.mechanisms.surgery import NoEffectWarning
from regularized.noisy_labels.co_teaching import CoTeaching, forget_schedule, num_kept
from regularized.noisy_labels.nested_dropout.cutting import cut_to_width
from regularized.noisy_labels.nested_dropout.layer import (
    NestedDropout,
    NestedLinear,
    draw_together,
    nest_classifier,
    width_distribution,
)
from regularized.noisy_labels.nested_dropout.term import NestedWidth
from regularized.noisy_labels.nested_dropout.width import select_width
from regularized.papers.nested_dropout.contract import CLASSES, FEATURES, HIDDEN, SGD, TASK, small_batches


def _pair(**settings: Any):
    torch.manual_seed(0)
    return CoTeaching(TASK.model(), TASK.model(), optimizer=SGD, **{"forget_rate": 0.3, **settings})


def _layer_of(**settings: Any):
    return NestedDropout(HIDDEN, **{"sigma": 3.0, **settings})


def _merge_with_norm():
    nested = _layer_of()
    nested.keep = 2
    model = nn.Sequential(nn.Linear(FEATURES, HIDDEN), nested, nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, CLASSES))
    return cut_to_width(model)


def _shared():
    first, second = TASK.model(), TASK.model()
    second[4].weight = first[4].weight
    return CoTeaching(first, second, optimizer=SGD)


def _same():
    model = TASK.model()
    return CoTeaching(model, model, optimizer=SGD)


def _step(size: int, **settings: Any):
    data = TASK.data(size, 0)
    return _pair(**settings).training_step((data["inputs"], data["targets"]))


def _odd_twice():
    """The second odd batch must not be mentioned again."""
    co, data = _pair(), TASK.data(5, 0)
    batch = (data["inputs"], data["targets"])
    co.training_step(batch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        co.training_step(batch)


def _evaluated_twice():
    """So must the second evaluation without a width."""
    layer, x = _layer_of().eval(), torch.zeros(1, HIDDEN)
    layer(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(x)


def bad_inputs():
    """Every line of the sheet's "bad input", and what a user meets besides."""
    x = torch.zeros(2, HIDDEN)
    return [
        refused("sigma <= 0", lambda: _layer_of(sigma=0.0), ValueError, ("sigma", "positive", "0.0")),
        refused("sigma nan", lambda: width_distribution(4, sigma=float("nan")), ValueError, ("sigma", "nan")),
        refused("the term's sigma <= 0", lambda: NestedWidth("2", sigma=-1.0), ValueError, ("sigma", "-1.0")),
        refused("D < 1", lambda: NestedDropout(0, sigma=1.0), ValueError, ("at least 1", "0")),
        refused(
            "all probabilities 0", lambda: _layer_of(sigma=0.01, mu=500.0), ValueError, ("mu=500.0", "sigma=0.01", "8")
        ),
        refused("other dimension", lambda: _layer_of()(x[:, :5]), ValueError, ("8 channels", "(2, 5)")),
        refused("one sample without batch", lambda: _layer_of()(x[0]), ValueError, ("(B, D)", "(8,)")),
        refused("other channel axis", lambda: _layer_of(dim=2)(x[:, None, :4]), ValueError, ("axis 2", "(2, 1, 4)")),
        refused("other dimension, classifier", lambda: NestedLinear(4, 2, sigma=1.0)(x), ValueError, ("4", "(2, 8)")),
        refused("normalisation behind", _merge_with_norm, NoEffectWarning, ("LayerNorm", "in front")),
        refused("evaluated before a choice", _evaluated_twice, UserWarning, ("all 8 channels", "select_width")),
        refused("the same network twice", _same, ValueError, ("same network twice", "two networks")),
        refused("shared parameters", _shared, ValueError, ("4.weight", "share")),
        refused("odd batch", _odd_twice, UserWarning, ("5 samples", "last is left out", "even")),
        refused("forget rate of 1", lambda: _pair(forget_rate=1.0), ValueError, ("[0, 1)", "1.0")),
        refused("forget rate below 0", lambda: forget_schedule(-0.1, gradual=2), ValueError, ("[0, 1)", "-0.1")),
        refused(
            "forget rate of a schedule", lambda: _step(4, forget_rate=lambda p: 1.5), ValueError, ("[0, 1)", "1.5")
        ),
        refused("nothing to keep", lambda: _step(1), ValueError, ("0 samples", "split")),
        refused("no sample", lambda: num_kept(0, 0.2), ValueError, ("0 samples",)),
        refused("gradual < 0", lambda: forget_schedule(0.2, gradual=-1), ValueError, ("gradual", "-1")),
        refused(
            "soft labels",
            lambda: _pair().losses((torch.zeros(4, FEATURES), torch.zeros(4, 3)), 0.2),
            ValueError,
            ("class",),
        ),
        refused("mean loss", lambda: _step(4, loss=nn.CrossEntropyLoss()), ValueError, ("reduction='none'", "(2,)")),
        refused(
            "cut before a choice", lambda: cut_to_width(NestedLinear(4, 2, sigma=1.0)), ValueError, ("select_width",)
        ),
        refused("width out of range", lambda: _layer_of().hold(9), ValueError, ("1 ... 8", "9")),
        refused(
            "no nested layer", lambda: select_width(TASK.model(), small_batches()), ValueError, ("nest_classifier",)
        ),
        refused(
            "no such classifier",
            lambda: nest_classifier(TASK.model(), "head", sigma=1.0),
            ValueError,
            ("'head'", "'4'"),
        ),
        refused(
            "no linear classifier", lambda: nest_classifier(TASK.model(), "1", sigma=1.0), ValueError, ("ReLU", "'4'")
        ),
        refused(
            "models that do not correspond",
            lambda: draw_together(NestedLinear(4, 2, sigma=1.0), NestedLinear(5, 2, sigma=1.0), seed=0),
            ValueError,
            ("[4]", "[5]"),
        ),
    ]


@pytest.mark.parametrize(("call", "error", "says"), bad_inputs())
def test_bad_input(call, error, says):
    """Fails when it is accepted, or refused in words that do not help."""
    assert_refused(call, error, says)
