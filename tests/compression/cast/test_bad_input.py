"""Bad inputs of `cast`: each is answered by what was given, what is allowed, and how to mend it."""

import pytest
import torch
from tests.bad_input import assert_refused, refused
from torch import nn

from regularized.compression.cast import (
    CAST,
    ScaledLinear,
    SparseAdamW,
    distillation_loss,
    scale_weights,
    semi_structured_mask,
)


def _model(columns=8):
    return nn.Sequential(nn.Linear(columns, 8), nn.ReLU(), nn.Linear(8, 4))


def _optimizer(weight=None, **settings):
    weight = nn.Parameter(torch.ones(2, 4)) if weight is None else weight
    return SparseAdamW([weight], **{"lr": 0.1, "l1": 0.1, "total_steps": 1, "pattern": (2, 4)} | settings)


def _step(optimizer, times=1):
    for _ in range(times):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.ones_like(p)
        optimizer.step()


def _without_mask(shape=None):
    optimizer = _optimizer(total_steps=9)
    _step(optimizer)
    (state,) = optimizer.state.values()
    del state["mask"]
    if shape is not None:
        state["mask"] = torch.ones(shape, dtype=torch.bool)
    _step(optimizer)


def _other_length():
    _optimizer(total_steps=2).load_state_dict(_optimizer(total_steps=3).state_dict())


def _tied():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    CAST(model, target_modules=["0"])


def _finalized_twice():
    cast = CAST(_model())
    cast.finalize()
    cast.finalize()


def _own_teacher():
    model = _model()
    CAST(model, teacher=model)


def _teacher_with_shared_parameters():
    model, teacher = _model(), _model()
    teacher[0].weight = model[0].weight
    CAST(model, teacher=teacher)


def bad_inputs():
    """Every line of the sheet's "bad input", and what else can be got wrong."""
    z, y = torch.zeros(2, 3), torch.zeros(2, dtype=torch.long)
    return [
        refused("C not divisible by M", lambda: CAST(_model(6)), ValueError, ("0 has 6 inputs", "groups of 4")),
        refused(
            "C not divisible by n", lambda: CAST(_model(), scale_groups=3), ValueError, ("0 has 8 inputs", "3 blocks")
        ),
        refused("N = M", lambda: CAST(pattern=(4, 4)), ValueError, ("1 <= N < M", "(4, 4)", "(2, 4)")),
        refused("N > M", lambda: _optimizer(pattern=(5, 4)), ValueError, ("1 <= N < M", "(5, 4)")),
        refused("N = 0", lambda: semi_structured_mask(torch.ones(1, 4), (0, 4)), ValueError, ("1 <= N < M", "(0, 4)")),
        refused("a number as pattern", lambda: CAST(pattern=2), ValueError, ("(N, M)", "2")),
        refused(
            "bfloat16 weights",
            lambda: _optimizer(nn.Parameter(torch.ones(2, 4, dtype=torch.bfloat16)), l1=4e-7),
            ValueError,
            ("4e-07", "bfloat16", "float32 master weights"),
        ),
        refused(
            "float16 weights",
            lambda: _optimizer(nn.Parameter(torch.ones(2, 4, dtype=torch.float16)), l1=4e-7),
            ValueError,
            ("float16", "float32 master weights"),
        ),
        refused("no total_steps", lambda: SparseAdamW([nn.Parameter(z)], 0.1, l1=0.1), TypeError, ("total_steps",)),
        refused("total_steps = 0", lambda: _optimizer(total_steps=0), ValueError, ("total_steps must be at least 1",)),
        refused(
            "a step too many",
            lambda: _step(_optimizer(), 2),
            RuntimeError,
            ("total_steps=1", "exceed 1", "whole training"),
        ),
        refused("mask missing", _without_mask, RuntimeError, ("(2, 4)", "None", "state_dict()")),
        refused("mask of another shape", lambda: _without_mask((1, 4)), RuntimeError, ("(2, 4)", "(1, 4)", "sharded")),
        refused(
            "flattened weight", lambda: _optimizer(nn.Parameter(torch.ones(8))), ValueError, ("(8,)", "flattens", "DDP")
        ),
        refused(
            "decay budget too small",
            lambda: _step(_optimizer(lr=1e-3, total_steps=9)),
            UserWarning,
            ("0.004", "median weight outside the pattern", "is 1", "lr or total_steps"),
        ),
        refused("finalize twice", _finalized_twice, RuntimeError, ("finalize() was called", "pruned")),
        refused("teacher is the student", _own_teacher, ValueError, ("model and teacher are the same", "deepcopy")),
        refused("teacher shares weights", _teacher_with_shared_parameters, ValueError, ("share memory", "0.weight")),
        refused("eta > 1", lambda: CAST(eta=1.5), ValueError, ("eta must be in [0, 1]", "1.5", "1/3")),
        refused("eta < 0", lambda: distillation_loss(z, z, y, eta=-0.1), ValueError, ("[0, 1]", "-0.1")),
        refused("no teacher", lambda: distillation_loss(z, None, y), ValueError, ("(2, 3)", "None", "eta=0")),
        refused("labels of another shape", lambda: distillation_loss(z, z, y[:1]), ValueError, ("(2,)", "(1,)")),
        refused(
            "unknown reduction", lambda: distillation_loss(z, z, y, reduction="none"), ValueError, ("'mean'", "'none'")
        ),
        refused("state of another length", _other_length, ValueError, ("total_steps=3", "has 2")),
        refused("l1 < 0", lambda: _optimizer(l1=-1.0), ValueError, ("l1 must be >= 0", "gradient")),
        refused("beta = 1", lambda: _optimizer(betas=(0.9, 1.0)), ValueError, ("betas[1]", "[0, 1)")),
        refused(
            "unknown second moment",
            lambda: _optimizer(second_moment="v"),
            ValueError,
            ("'momentum'", "'gradient'", "'v'"),
        ),
        refused("no such layer", lambda: CAST(_model(), target_modules=["q_proj"]), ValueError, ("q_proj", "['0'")),
        refused("a string of layers", lambda: CAST(_model(), target_modules="0"), ValueError, ("list", "['0']")),
        refused("not linear", lambda: CAST(_model(), target_modules=["1"]), ValueError, ("ReLU", "target_modules")),
        refused("no linear layer", lambda: CAST(nn.Sequential(nn.ReLU())), ValueError, ("no linear layer",)),
        refused("tied weights", _tied, ValueError, ("0 shares its weight", "leave it out")),
        refused(
            "a weight that is read, not called",
            lambda: scale_weights(nn.ModuleDict({"a": nn.MultiheadAttention(8, 2)}), ["a.out_proj"], groups=2),
            ValueError,
            ("MultiheadAttention",),
        ),
        refused(
            "no group", lambda: ScaledLinear.of(nn.Linear(8, 4), groups=0), ValueError, ("groups must be at least 1",)
        ),
        refused("no model yet", lambda: CAST().param_groups(), RuntimeError, ("no model yet", "CAST(model)")),
        refused("negative groups", lambda: CAST(scale_groups=-1), ValueError, ("scale_groups", "0 is no scaling")),
    ]


@pytest.mark.parametrize(("call", "error", "says"), bad_inputs())
@pytest.mark.filterwarnings("ignore:the weights that are cut still have", "ignore:even at a constant rate")
def test_bad_input(call, error, says):
    """Fails when it is accepted, or refused in words that do not help."""
    assert_refused(call, error, says)
