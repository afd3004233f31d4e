"""Bad inputs of `infinite_compute`: each is answered by what was given, what is allowed, and how to mend it."""

import copy
from functools import partial

import pytest
import torch
from tests.bad_input import assert_refused, refused
from torch import nn

from regularized.overfitting.infinite_compute import (
    EnsembleTraining,
    LogitEnsemble,
    MixtureLoader,
    PowerLaw,
    StackedModels,
    certify,
    clip_members_,
    coordinate_descent,
    data_efficiency,
    decay_groups,
    member_settings,
    mixture_steps,
    prefix_losses,
    sample_text,
    warmup_then_cosine,
)
from regularized.overfitting.infinite_compute.law import least_squares
from regularized.training.data import TensorData

ADAMW = partial(torch.optim.AdamW, lr=0.1)


def training(count=2, *, optimizer=ADAMW, weight_decay=0.8, **options):
    models = [nn.Linear(3, 2) for _ in range(count)]
    return EnsembleTraining(models, optimizer=optimizer, weight_decay=weight_decay, **options)


def data(size=8, **options):
    return TensorData(torch.zeros(size, 3), torch.zeros(size, dtype=torch.int64), batch_size=4, **options)


def twins():
    model = nn.Linear(3, 2)
    return [model, copy.deepcopy(model)]


ROWS = [
    # the sheet's
    refused("two points", lambda: PowerLaw.fit([1, 2], [2, 1]), ValueError, ("three points", "2 sizes")),
    refused("repeated x", lambda: PowerLaw.fit([1, 1, 2], [3, 2, 1]), ValueError, ("once", "average")),
    refused(
        "not decreasing",
        lambda: PowerLaw.fit([1, 2, 3], [3, 2, 2.5]),
        ValueError,
        ("2 at 2, 2.5 at 3", "tune the regularization"),
    ),
    refused("decay past zero", lambda: training(weight_decay=10.0), ValueError, ("below 1", "0.1 * 10", "lower")),
    refused(
        "coupled decay",
        lambda: training(optimizer=partial(torch.optim.Adam, lr=0.1)),
        ValueError,
        ("Adam adds weight_decay=0.8", "AdamW"),
    ),
    refused(
        "coupled in SGD",
        lambda: training(optimizer=partial(torch.optim.SGD, lr=0.1)),
        ValueError,
        ("SGD adds weight_decay", "AdamW"),
    ),
    refused(
        "other vocabularies",
        lambda: LogitEnsemble([nn.Linear(3, 2), nn.Linear(3, 4)])(torch.ones(1, 3)),
        ValueError,
        ("(1, 2)", "(1, 4)", "vocabulary"),
    ),
    refused(
        "other vocabularies, stacked",
        lambda: StackedModels([nn.Linear(3, 2), nn.Linear(3, 4)]),
        ValueError,
        ("(2, 3)", "(4, 3)", "vocabulary"),
    ),
    refused("same seed", lambda: LogitEnsemble(twins()), UserWarning, ("same weights", "seed of its own")),
    refused("same seed, trained", lambda: StackedModels(twins()), ValueError, ("same weights", "seed of its own")),
    refused("same order", lambda: training(seeds=[3, 3]), ValueError, ("[3, 3]", "seed of its own")),
    refused(
        "teacher alone",
        lambda: MixtureLoader(data(), data(), teacher_weight=1.0),
        ValueError,
        ("teacher_weight", "[0, 1)", "0.75"),
    ),
    refused("negative teacher", lambda: mixture_steps(800, 16, -0.1), ValueError, ("teacher_weight", "-0.1")),
    refused(
        "part of an epoch",
        lambda: mixture_steps(5, 2.5),
        UserWarning,
        ("no whole number", "12 steps", "2.4 times"),
    ),
    refused(
        "left out samples",
        lambda: training().fit(data(10, drop_last=True), epochs=1),
        UserWarning,
        ("2 of 10", "0.8 times", "divides"),
    ),
    refused("epochs in parts", lambda: training().fit(data(), epochs=1.5), ValueError, ("epochs", "1.5", "mixture")),
    refused(
        "decay on norms",
        lambda: decay_groups(nn.Sequential(nn.Embedding(3, 4), nn.LayerNorm(4)), 0.8, skip=("bias",)),
        UserWarning,
        ("0.weight, 1.weight", "skip="),
    ),
    # further ones
    refused("negative size", lambda: least_squares([-1, 1, 2], [3, 2, 1]), ValueError, ("positive",)),
    refused("NaN", lambda: least_squares([1, 2, 3], [3, 2, float("nan")]), ValueError, ("finite",)),
    refused("below the asymptote", lambda: PowerLaw(1, 1, 2).solve(1.5), ValueError, ("1.5", "C=2", "above")),
    refused("baseline never there", lambda: data_efficiency(PowerLaw(1, 1, 2), 2.0, 1.0), ValueError, ("above",)),
    refused(
        "centre off the grid", lambda: certify(lambda s: 0.0, {"lr": 2.0}, {"lr": [1.0, 3.0]}), ValueError, ("2.0",)
    ),
    refused("axis missing", lambda: certify(lambda s: 0.0, {"lr": 3e-3}), ValueError, ("each axis", "epochs")),
    refused(
        "grid falls",
        lambda: coordinate_descent(lambda s: 0.0, {"lr": 1.0}, {"lr": [3.0, 1.0]}),
        ValueError,
        ("must rise",),
    ),
    refused(
        "NaN of a run",
        lambda: certify(lambda s: float("nan"), {"lr": 1.0}, {"lr": [1.0, 3.0]}),
        ValueError,
        ("NaN", "infinity"),
    ),
    refused("no decay to halve", lambda: member_settings({"epochs": 4}), ValueError, ("weight_decay", "missing")),
    refused("unknown kind", lambda: decay_groups(nn.Linear(1, 1), 0.1, skip=("norms",)), ValueError, ("'norm'",)),
    refused("nothing to train", lambda: decay_groups(nn.ReLU(), 0.1), ValueError, ("ReLU", "nothing is trained")),
    refused("all warm-up", lambda: warmup_then_cosine(1.0), ValueError, ("share", "[0, 1)")),
    refused("no member", lambda: LogitEnsemble([]), ValueError, ("at least one",)),
    refused("no model", lambda: StackedModels([]), ValueError, ("at least one",)),
    refused(
        "other classes",
        lambda: StackedModels([nn.Linear(3, 2), nn.Sequential(nn.Linear(3, 2))]),
        ValueError,
        ("one architecture", "LogitEnsemble"),
    ),
    refused("no such member", lambda: StackedModels([nn.Linear(1, 1)]).member(1), ValueError, ("0 to 0", "got 1")),
    refused("no gradient", lambda: clip_members_([torch.ones(2, 1)], 1.0), ValueError, ("backward()",)),
    refused("clip", lambda: training(clip=0.0), ValueError, ("clip", "no clipping")),
    refused(
        "whole weights",
        lambda: training(optimizer=lambda groups: torch.optim.Adafactor(groups, lr=0.1)),
        ValueError,
        ("Adafactor", "AdamW"),
    ),
    refused(
        "no targets",
        lambda: training().fit(TensorData(torch.zeros(8, 3), batch_size=4), epochs=1),
        ValueError,
        ("targets", "next tokens"),
    ),
    refused("one source too few", lambda: training().fit([data()], epochs=1), ValueError, ("2 members", "got 1")),
    refused("lengths", lambda: training().fit([data(), data(16)], epochs=1), ValueError, ("one length", "[2, 4]")),
    refused("logits", lambda: prefix_losses(torch.zeros(2, 3), torch.zeros(3).long()), ValueError, ("(K, B, V)",)),
    refused(
        "windows of two lengths",
        lambda: MixtureLoader(
            data(), TensorData(torch.zeros(8, 5), torch.zeros(8).long(), batch_size=4), teacher_weight=0.5
        ),
        ValueError,
        ("one kind", "(3,)", "(5,)"),
    ),
    refused("no first token", lambda: sample_text(nn.Identity(), torch.zeros(3, 0).long(), 2), ValueError, ("P >= 1",)),
    refused(
        "temperature",
        lambda: sample_text(nn.Identity(), torch.zeros(3, 1).long(), 2, temperature=0.0),
        ValueError,
        ("temperature",),
    ),
]


@pytest.mark.parametrize(("call", "error", "says"), ROWS)
def test_refused(call, error, says):
    """Fails when a bad input passes, or its message says less than what, which and how."""
    assert_refused(call, error, says)
