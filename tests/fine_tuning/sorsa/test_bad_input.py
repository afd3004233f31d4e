"""Bad inputs of `sorsa`: each is answered by what was given, what is allowed, and how to mend it."""

from typing import Any

import pytest
import torch
from tests.bad_input import assert_refused, refused
from torch import Tensor, nn
from torch.nn import functional as F

from regularized.evidence.models import mlp
from regularized.fine_tuning.sorsa.layer import SorsaLinear, inject_sorsa
from regularized.fine_tuning.sorsa.penalty import OrthonormalPenalty, orthonormal_gradient, orthonormal_penalty
from regularized.fine_tuning.sorsa.report import spectral_drift
from regularized.fine_tuning.sorsa.term import Sorsa
from regularized.papers.sorsa.contract import FEATURES, LR, TASK, adapted


def _twice():
    inject_sorsa(adapted(), r=2)


def _with_weight(value: Tensor):
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(value, requires_grad=False)
    return layer


def _tied():
    model = mlp([6, 6, 6])
    model[2].weight = model[0].weight
    inject_sorsa(model, r=2)


def _stale_optimizer():
    model = TASK.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    inject_sorsa(model, r=2)
    OrthonormalPenalty(model, lr=LR, optimizer=optimizer)


def _trained(**settings: Any):
    model = adapted()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LR, **settings)
    return model, optimizer


def _no_gradient():
    OrthonormalPenalty(adapted(), lr=LR).add_gradient()


def _still_scaled():
    model, optimizer = _trained()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(torch.randn(4, FEATURES)).square().mean()).backward()
    OrthonormalPenalty(model, lr=LR, optimizer=optimizer).add_gradient(scaler=scaler)


def _decay():
    model, optimizer = _trained(weight_decay=0.01)
    OrthonormalPenalty(model, lr=LR, optimizer=optimizer)


def _merged():
    layer = SorsaLinear.of(nn.Linear(4, 4), r=2)
    layer.merge()
    return layer


def _penalty_when_merged():
    OrthonormalPenalty(nn.Sequential(_merged()), lr=LR).add_gradient()


def _train_when_merged():
    F.relu(_merged()(torch.randn(2, 4)))


def _other_reduction():
    orthonormal_gradient([torch.eye(2)], reduction="max")


def bad_inputs():
    """Every line of the sheet's "bad input", and what a user meets besides."""
    integers = torch.zeros(4, 4, dtype=torch.int8)
    broken = torch.full((4, 4), float("nan"))
    return [
        refused("r < 1", lambda: inject_sorsa(TASK.model(), r=0), ValueError, ("weight of 0", "[1, 6]", "got 0")),
        refused("r too large", lambda: inject_sorsa(TASK.model(), r=5), ValueError, ("weight of 2", "[1, 4]", "got 5")),
        refused("gamma < 0", lambda: OrthonormalPenalty(adapted(), gamma=-1.0, lr=LR), ValueError, (">= 0", "-1")),
        refused("gamma < 0, the term", lambda: Sorsa(r=2, lr=LR, gamma=-1.0), ValueError, ("gamma", ">= 0", "-1")),
        refused("lr <= 0", lambda: Sorsa(r=2, lr=0.0), ValueError, ("peak learning rate", "> 0", "0.0")),
        refused(
            "no module matched",
            lambda: inject_sorsa(nn.ModuleDict({"q_proj": nn.Linear(4, 4)}), r=2, target_modules=["q_prj"]),
            ValueError,
            ("q_prj", "close names", "q_proj"),
        ),
        refused("injected before", _twice, ValueError, ("already has SORSA layers", "merge_sorsa")),
        refused(
            "quantized weight",
            lambda: SorsaLinear.of(_with_weight(integers), r=2),
            TypeError,
            ("quantized", "int8", "dequantize"),
        ),
        refused(
            "non-finite weight", lambda: SorsaLinear.of(_with_weight(broken), r=2), ValueError, ("NaN", "checkpoint")
        ),
        refused("optimizer built before", _stale_optimizer, ValueError, ("optimizer", "6 trainable", "before")),
        refused("no gradients", _no_gradient, RuntimeError, ("no factor has a gradient", "after loss.backward()")),
        refused("gradients still scaled", _still_scaled, RuntimeError, ("unscale first", "scaler.unscale_")),
        refused("training after merge", _train_when_merged, RuntimeError, ("merged", "unmerge()")),
        refused("penalty after merge", _penalty_when_merged, RuntimeError, ("merged", "unmerge")),
        refused("weight decay", _decay, UserWarning, ("weight_decay=0.01", "weight_decay=0")),
        refused("tied weights", _tied, ValueError, ("shares its weight", "leave it out")),
        refused(
            "not linear",
            lambda: inject_sorsa(nn.Sequential(nn.Conv2d(3, 3, 3)), r=2, target_modules=["0"]),
            TypeError,
            ("Conv2d", "nn.Linear"),
        ),
        refused(
            "alpha <= 0", lambda: inject_sorsa(TASK.model(), r=2, alpha=0.0), ValueError, ("alpha", "positive", "0.0")
        ),
        refused(
            "dropout >= 1", lambda: inject_sorsa(TASK.model(), r=2, dropout=1.0), ValueError, ("dropout", "[0, 1)")
        ),
        refused("no SORSA layers", lambda: OrthonormalPenalty(TASK.model(), lr=LR), ValueError, ("no SORSA layers",)),
        refused("no factors", lambda: orthonormal_penalty([]), ValueError, ("no factors",)),
        refused("reduction", _other_reduction, ValueError, ("'mean'", "'max'")),
        refused(
            "weights of two shapes",
            lambda: spectral_drift(torch.eye(2), torch.eye(3)),
            ValueError,
            ("(2, 2)", "(3, 3)"),
        ),
    ]


@pytest.mark.parametrize(("call", "error", "says"), bad_inputs())
def test_bad_input(call, error, says):
    """Fails when it is accepted, or refused in words that do not help."""
    assert_refused(call, error, says)
