"""What the common contract trains and provokes: the term, and the sheet's bad inputs."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from regularized.evidence.contract import BadInput, Classification, Subject, plain
from regularized.evidence.models import mlp, seeded
from regularized.mechanisms.mode_connectivity import WeightPlane, barrier, errors_between
from regularized.mechanisms.probes import knn_probe, linear_probe, logistic_probe
from regularized.mechanisms.pruning import iterative_magnitude_pruning, magnitude_masks
from regularized.mechanisms.surgery import NoEffectWarning
from regularized.self_supervised.random_teacher.layer import BottleneckHead, EncoderWithHead
from regularized.self_supervised.random_teacher.loss import distillation_losses
from regularized.self_supervised.random_teacher.student_init import draw_weights, interpolate_init, neighbourhood_init
from regularized.self_supervised.random_teacher.teacher import MatchRandomTeacher, RandomTeacher
from regularized.training.finite import NonFiniteLoss

FEATURES, CLASSES = 5, 3
TASK = Classification(FEATURES, CLASSES, hidden=(8,), random_labels=True)


def _teacher() -> nn.Module:
    return seeded(7, TASK.model)


def _terms() -> Mapping[str, nn.Module]:
    return {**plain(), "match": MatchRandomTeacher(_teacher())}


def _off() -> Mapping[str, nn.Module]:
    return {**plain(), "match": MatchRandomTeacher(_teacher(), weight=0.0)}


def _wide_model() -> nn.Module:
    return EncoderWithHead(nn.Linear(FEATURES, 8), BottleneckHead(8, hidden=(8,), bottleneck=4, out_features=CLASSES))


def _part() -> tuple[Callable[..., Any], tuple[Any, ...]]:
    inputs = TASK.data(8, 1)["inputs"].requires_grad_()
    return RandomTeacher(TASK.model(), _teacher()), (inputs,)


def subjects() -> list[Subject]:
    """The term beside a supervised loss, as a control."""
    return [Subject("term", model=TASK.model, terms=_terms, off=_off, plain=plain, data=TASK.data, part=_part)]


def _pair(**settings: Any) -> RandomTeacher:
    return RandomTeacher(TASK.model(), _teacher(), **settings)


_X = torch.zeros(4, FEATURES)


def _same() -> None:
    model = TASK.model()
    RandomTeacher(model, model)


def _shared(call: Callable[[nn.Module, nn.Module], Any]) -> None:
    ours, theirs = nn.Linear(4, 4), nn.Linear(4, 4)
    ours.weight = nn.Parameter(theirs.weight.detach().view(4, 4))  # another object, the same memory
    call(nn.Sequential(nn.Linear(4, 4), ours), nn.Sequential(nn.Linear(4, 4), theirs))


def _shared_term() -> None:
    model = TASK.model()
    MatchRandomTeacher(model).attach(model)


def _teacher_in_training() -> None:
    match = _pair()
    match.teacher.module.train()
    match(_X)


def _teacher_trainable() -> None:
    match = _pair()
    match.requires_grad_(True)
    match(_X)


def _copied() -> None:
    teacher = TASK.model()
    RandomTeacher(copy.deepcopy(teacher), teacher)


def _copied_term() -> None:
    teacher = TASK.model()
    MatchRandomTeacher(teacher).attach(copy.deepcopy(teacher))


def _copied_with_matched_statistics() -> None:
    teacher = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    RandomTeacher(copy.deepcopy(teacher), teacher, statistics="batch")


def _no_index() -> None:
    match = _pair()
    match.remember(_X)
    match(_X)


def _one_output() -> None:
    RandomTeacher(nn.Linear(FEATURES, 1), nn.Linear(FEATURES, 1))(_X)


def _not_finite() -> None:
    match = _pair()
    match(_X)
    match(_X * torch.nan)


def _gradient() -> None:
    x, y = torch.zeros(4, 2, requires_grad=True), torch.tensor([0, 1, 0, 1])
    linear_probe(None, (x, y), (x, y))


def _few() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    return (torch.zeros(2, 3), torch.tensor([0, 1])), (torch.zeros(3, 3), torch.tensor([0, 1, 2]))


def bad_inputs() -> list[BadInput]:
    """Every line of the sheet's "bad input", and what a user meets besides."""
    enough = ((torch.zeros(4, 3), torch.tensor([0, 1, 0, 1])),) * 2
    deep, wide = nn.Sequential(nn.Linear(3, 3)), nn.Linear(3, 3)
    return [
        BadInput("same object", _same, ValueError, ("student and teacher", "same object", "deepcopy")),
        BadInput("shared storage", lambda: _shared(RandomTeacher), ValueError, ("share memory", "'1.weight'")),
        BadInput("shared storage, term", _shared_term, ValueError, ("student and teacher", "same object")),
        BadInput(
            "shared storage, interpolation",
            lambda: _shared(lambda a, b: interpolate_init(b, a, 0.5)),
            ValueError,
            ("share memory", "'1.weight'"),
        ),
        BadInput(
            "names differ",
            lambda: interpolate_init(deep, wide, 0.5),
            ValueError,
            ("first difference", "'0.weight'", "no such parameter"),
        ),
        BadInput(
            "shapes differ",
            lambda: interpolate_init(mlp([3, 4, 5]), mlp([3, 4, 6]), 0.5),
            ValueError,
            ("first difference", "'2.weight'", "(5, 4)", "(6, 4)"),
        ),
        BadInput(
            "alpha above 1",
            lambda: interpolate_init(TASK.model(), TASK.model(), 1.1),
            ValueError,
            ("alpha", "[0, 1]", "1.1"),
        ),
        BadInput(
            "alpha below 0", lambda: interpolate_init(TASK.model(), TASK.model(), -0.1), ValueError, ("alpha", "-0.1")
        ),
        BadInput(
            "eps below 0", lambda: neighbourhood_init(TASK.model(), TASK.model(), -0.1), ValueError, ("eps", "-0.1")
        ),
        BadInput("teacher in train mode", _teacher_in_training, RuntimeError, ("train mode", "frozen")),
        BadInput("teacher requires grad", _teacher_trainable, RuntimeError, ("'0.weight'", "requires_grad")),
        BadInput("alpha 0, no BN or dropout", _copied, NoEffectWarning, ("exact copy", "alpha > 0")),
        BadInput("alpha 0, term", _copied_term, NoEffectWarning, ("exact copy", "alpha > 0")),
        BadInput(
            "alpha 0, both BN on the batch", _copied_with_matched_statistics, NoEffectWarning, ("statistics='running'",)
        ),
        BadInput("one output", _one_output, ValueError, ("one output", "softmax")),
        BadInput(
            "head of one output", lambda: BottleneckHead(4, out_features=1), ValueError, ("out_features", "at least 2")
        ),
        BadInput("loss not finite", _not_finite, NonFiniteLoss, ("not finite", "step 1")),
        BadInput("probe: gradient", _gradient, ValueError, ("gradient", "frozen", "detach")),
        BadInput(
            "linear probe: few samples", lambda: linear_probe(None, *_few()), ValueError, ("2 samples", "3 class")
        ),
        BadInput("logistic: few samples", lambda: logistic_probe(None, *_few()), ValueError, ("2 samples", "3 class")),
        BadInput("k-NN: few samples", lambda: knn_probe(None, *_few(), k=1), ValueError, ("2 samples", "3 class")),
        BadInput("k above N", lambda: knn_probe(None, *enough, k=5), ValueError, ("k must be", "[1, 4]", "5")),
        BadInput("penalty 0", lambda: logistic_probe(None, *enough, penalty=0.0), ValueError, ("penalty", "positive")),
        BadInput("probe of 0 epochs", lambda: linear_probe(None, *enough, epochs=0), ValueError, ("epochs=0",)),
        BadInput("unknown loss", lambda: _pair(loss="js"), ValueError, ("'kl', 'ce' or 'mse'", "'js'")),
        BadInput("temperature 0", lambda: _pair(student_temperature=0.0), ValueError, ("student_temperature", "0.0")),
        BadInput("unknown statistics", lambda: _pair(statistics="train"), ValueError, ("statistics", "'train'")),
        BadInput("chunk without head", lambda: _pair(chunk=2), ValueError, ("EncoderWithHead", "Sequential")),
        BadInput(
            "chunk 0", lambda: RandomTeacher(_wide_model(), _wide_model(), chunk=0), ValueError, ("chunk", "at least 1")
        ),
        BadInput(
            "outputs of other shape",
            lambda: distillation_losses(torch.zeros(2, 3), torch.zeros(2, 4)),
            ValueError,
            ("(2, 3)", "(2, 4)"),
        ),
        BadInput("remembered, no index", _no_index, ValueError, ("index", "forget()")),
        BadInput(
            "remember with batch statistics",
            lambda: _pair(statistics="batch").remember(_X),
            ValueError,
            ("remember()", "statistics='running'"),
        ),
        BadInput(
            "weights of unknown scale",
            lambda: draw_weights(nn.PReLU(), generator=torch.Generator()),
            TypeError,
            ("PReLU", "fork_rng"),
        ),
        BadInput("keep 0", lambda: magnitude_masks(TASK.model(), 0.0), ValueError, ("keep", "(0, 1]")),
        BadInput("nothing to prune", lambda: magnitude_masks(nn.ReLU(), 0.5), ValueError, ("nothing to prune",)),
        BadInput(
            "rate 1",
            lambda: iterative_magnitude_pruning(TASK.model(), lambda model: None, rate=1.0),
            ValueError,
            ("rate", "(0, 1)"),
        ),
        BadInput(
            "two points", lambda: errors_between(wide, wide, lambda m: 0.0, points=2), ValueError, ("points", "3")
        ),
        BadInput(
            "line between other structures",
            lambda: errors_between(wide, nn.Linear(3, 4), lambda m: 0.0),
            ValueError,
            ("'weight'", "(3, 3)", "(4, 3)"),
        ),
        BadInput("barrier of two points", lambda: barrier(torch.zeros(2)), ValueError, ("3 points", "(2,)")),
        BadInput("no plane", lambda: WeightPlane([wide, wide, nn.Linear(3, 3)]), ValueError, ("one line",)),
    ]
