"""Bad inputs of `random_teacher`: each is answered by what was given, what is allowed, and how to mend it."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.bad_input import assert_refused, refused
from torch import nn

from regularized.evidence.models import mlp
from regularized.mechanisms.mode_connectivity import WeightPlane, barrier, errors_between
from regularized.mechanisms.probes import knn_probe, linear_probe, logistic_probe
from regularized.mechanisms.pruning import iterative_magnitude_pruning, magnitude_masks
from regularized.mechanisms.surgery import NoEffectWarning
from regularized.papers.random_teacher.contract import CLASSES, FEATURES, TASK, fixed_teacher
from regularized.self_supervised.random_teacher.layer import BottleneckHead, EncoderWithHead
from regularized.self_supervised.random_teacher.loss import distillation_losses
from regularized.self_supervised.random_teacher.student_init import draw_weights, interpolate_init, neighbourhood_init
from regularized.self_supervised.random_teacher.teacher import RandomTeacher
from regularized.self_supervised.random_teacher.term import MatchRandomTeacher
from regularized.training.finite import NonFiniteLoss


def _wide_model():
    return EncoderWithHead(nn.Linear(FEATURES, 8), BottleneckHead(8, hidden=(8,), bottleneck=4, out_features=CLASSES))


def _pair(**settings: Any):
    return RandomTeacher(TASK.model(), fixed_teacher(), **settings)


_X = torch.zeros(4, FEATURES)


def _same():
    model = TASK.model()
    RandomTeacher(model, model)


def _shared(call: Callable[[nn.Module, nn.Module], Any]):
    ours, theirs = nn.Linear(4, 4), nn.Linear(4, 4)
    ours.weight = nn.Parameter(theirs.weight.detach().view(4, 4))  # another object, the same memory
    call(nn.Sequential(nn.Linear(4, 4), ours), nn.Sequential(nn.Linear(4, 4), theirs))


def _shared_term():
    model = TASK.model()
    MatchRandomTeacher(model).attach(model)


def _teacher_in_training():
    match = _pair()
    match.teacher.module.train()
    match(_X)


def _teacher_trainable():
    match = _pair()
    match.requires_grad_(True)
    match(_X)


def _copied():
    teacher = TASK.model()
    RandomTeacher(copy.deepcopy(teacher), teacher)


def _copied_term():
    teacher = TASK.model()
    MatchRandomTeacher(teacher).attach(copy.deepcopy(teacher))


def _copied_with_matched_statistics():
    teacher = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    RandomTeacher(copy.deepcopy(teacher), teacher, statistics="batch")


def _no_index():
    match = _pair()
    match.remember(_X)
    match(_X)


def _one_output():
    RandomTeacher(nn.Linear(FEATURES, 1), nn.Linear(FEATURES, 1))(_X)


def _not_finite():
    match = _pair()
    match(_X)
    match(_X * torch.nan)


def _gradient():
    x, y = torch.zeros(4, 2, requires_grad=True), torch.tensor([0, 1, 0, 1])
    linear_probe(None, (x, y), (x, y))


def _few():
    return (torch.zeros(2, 3), torch.tensor([0, 1])), (torch.zeros(3, 3), torch.tensor([0, 1, 2]))


def bad_inputs():
    """Every line of the sheet's "bad input", and what a user meets besides."""
    enough = ((torch.zeros(4, 3), torch.tensor([0, 1, 0, 1])),) * 2
    deep, wide = nn.Sequential(nn.Linear(3, 3)), nn.Linear(3, 3)
    return [
        refused("same object", _same, ValueError, ("student and teacher", "same object", "deepcopy")),
        refused("shared storage", lambda: _shared(RandomTeacher), ValueError, ("share memory", "'1.weight'")),
        refused("shared storage, term", _shared_term, ValueError, ("student and teacher", "same object")),
        refused(
            "shared storage, interpolation",
            lambda: _shared(lambda a, b: interpolate_init(b, a, 0.5)),
            ValueError,
            ("share memory", "'1.weight'"),
        ),
        refused(
            "names differ",
            lambda: interpolate_init(deep, wide, 0.5),
            ValueError,
            ("first difference", "'0.weight'", "no such parameter"),
        ),
        refused(
            "shapes differ",
            lambda: interpolate_init(mlp([3, 4, 5]), mlp([3, 4, 6]), 0.5),
            ValueError,
            ("first difference", "'2.weight'", "(5, 4)", "(6, 4)"),
        ),
        refused(
            "alpha above 1",
            lambda: interpolate_init(TASK.model(), TASK.model(), 1.1),
            ValueError,
            ("alpha", "[0, 1]", "1.1"),
        ),
        refused(
            "alpha below 0", lambda: interpolate_init(TASK.model(), TASK.model(), -0.1), ValueError, ("alpha", "-0.1")
        ),
        refused(
            "eps below 0", lambda: neighbourhood_init(TASK.model(), TASK.model(), -0.1), ValueError, ("eps", "-0.1")
        ),
        refused("teacher in train mode", _teacher_in_training, RuntimeError, ("train mode", "frozen")),
        refused("teacher requires grad", _teacher_trainable, RuntimeError, ("'0.weight'", "requires_grad")),
        refused("alpha 0, no BN or dropout", _copied, NoEffectWarning, ("exact copy", "alpha > 0")),
        refused("alpha 0, term", _copied_term, NoEffectWarning, ("exact copy", "alpha > 0")),
        refused(
            "alpha 0, both BN on the batch", _copied_with_matched_statistics, NoEffectWarning, ("statistics='running'",)
        ),
        refused("one output", _one_output, ValueError, ("one output", "softmax")),
        refused(
            "head of one output", lambda: BottleneckHead(4, out_features=1), ValueError, ("out_features", "at least 2")
        ),
        refused("loss not finite", _not_finite, NonFiniteLoss, ("not finite", "step 1")),
        refused("probe: gradient", _gradient, ValueError, ("gradient", "frozen", "detach")),
        refused("linear probe: few samples", lambda: linear_probe(None, *_few()), ValueError, ("2 samples", "3 class")),
        refused("logistic: few samples", lambda: logistic_probe(None, *_few()), ValueError, ("2 samples", "3 class")),
        refused("k-NN: few samples", lambda: knn_probe(None, *_few(), k=1), ValueError, ("2 samples", "3 class")),
        refused("k above N", lambda: knn_probe(None, *enough, k=5), ValueError, ("k must be", "[1, 4]", "5")),
        refused("penalty 0", lambda: logistic_probe(None, *enough, penalty=0.0), ValueError, ("penalty", "positive")),
        refused(
            "probe of 0 epochs",
            lambda: linear_probe(None, *enough, epochs=0),
            ValueError,
            ("epochs must be at least 1", "got 0"),
        ),
        refused("unknown loss", lambda: _pair(loss="js"), ValueError, ("'kl', 'ce' or 'mse'", "'js'")),
        refused("temperature 0", lambda: _pair(student_temperature=0.0), ValueError, ("student_temperature", "0.0")),
        refused("unknown statistics", lambda: _pair(statistics="train"), ValueError, ("statistics", "'train'")),
        refused("chunk without head", lambda: _pair(chunk=2), ValueError, ("EncoderWithHead", "Sequential")),
        refused(
            "chunk 0", lambda: RandomTeacher(_wide_model(), _wide_model(), chunk=0), ValueError, ("chunk", "at least 1")
        ),
        refused(
            "outputs of other shape",
            lambda: distillation_losses(torch.zeros(2, 3), torch.zeros(2, 4)),
            ValueError,
            ("(2, 3)", "(2, 4)"),
        ),
        refused("remembered, no index", _no_index, ValueError, ("index", "forget()")),
        refused(
            "remember with batch statistics",
            lambda: _pair(statistics="batch").remember(_X),
            ValueError,
            ("remember()", "statistics='running'"),
        ),
        refused(
            "weights of unknown scale",
            lambda: draw_weights(nn.PReLU(), generator=torch.Generator()),
            TypeError,
            ("PReLU", "fork_rng"),
        ),
        refused("keep 0", lambda: magnitude_masks(TASK.model(), 0.0), ValueError, ("keep", "(0, 1]")),
        refused("nothing to prune", lambda: magnitude_masks(nn.ReLU(), 0.5), ValueError, ("nothing to prune",)),
        refused(
            "rate 1",
            lambda: iterative_magnitude_pruning(TASK.model(), lambda model: None, rate=1.0),
            ValueError,
            ("rate", "(0, 1)"),
        ),
        refused("two points", lambda: errors_between(wide, wide, lambda m: 0.0, points=2), ValueError, ("points", "3")),
        refused(
            "line between other structures",
            lambda: errors_between(wide, nn.Linear(3, 4), lambda m: 0.0),
            ValueError,
            ("'weight'", "(3, 3)", "(4, 3)"),
        ),
        refused("barrier of two points", lambda: barrier(torch.zeros(2)), ValueError, ("3 points", "(2,)")),
        refused("no plane", lambda: WeightPlane([wide, wide, nn.Linear(3, 3)]), ValueError, ("one line",)),
    ]


@pytest.mark.parametrize(("call", "error", "says"), bad_inputs())
def test_bad_input(call, error, says):
    """Fails when it is accepted, or refused in words that do not help."""
    assert_refused(call, error, says)
