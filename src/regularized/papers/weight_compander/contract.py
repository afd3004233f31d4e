"""What the contract suite checks of Weight Compander."""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from regularized.evidence.contract import BadInput, Classification, NotApplicable, Subject, plain
from regularized.evidence.models import mlp
from regularized.mechanisms.surgery import NoEffectWarning, check_optimizer_is_current
from regularized.overfitting.weight_compander import Compander, WeightCompander, compand_weights
from regularized.training.terms import CrossEntropy

TASK = Classification()


def _fixed() -> Mapping[str, nn.Module]:
    return {"task": CrossEntropy(), "compander": WeightCompander()}


def _learned() -> Mapping[str, nn.Module]:
    return {"task": CrossEntropy(), "compander": WeightCompander(learnable=True, shape_lr=1e-3)}


def _part(learnable: bool = True) -> tuple[nn.Module, tuple[Tensor, ...]]:
    return Compander(1.0, 0.5, learnable=learnable), (torch.randn(5, 7, requires_grad=True),)


def subjects() -> list[Subject]:
    """Fixed and learned a and b."""
    no_off = NotApplicable("a reparametrisation has no coefficient")
    return [
        Subject("fixed", TASK.model, _fixed, plain, TASK.data, off=no_off, part=partial(_part, False)),
        Subject("learned", TASK.model, _learned, plain, TASK.data, off=no_off, part=_part),
    ]


def _twice() -> None:
    model = TASK.model()
    compand_weights(model)
    compand_weights(model)


def _out_of_range() -> None:
    model = TASK.model()
    with torch.no_grad():
        model[0].weight[0, 0] = 100.0  # type: ignore[index]
    compand_weights(model)


def _tied() -> None:
    model = mlp([6, 6, 6])
    model[2].weight = model[0].weight
    compand_weights(model)


def _stale_optimizer() -> None:
    model = TASK.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    compand_weights(model, learnable=True)
    check_optimizer_is_current(model, optimizer)


def bad_inputs() -> list[BadInput]:
    """Every line of the sheet's "bad input"."""
    return [
        BadInput("a <= 0", lambda: compand_weights(TASK.model(), a=0.0), ValueError, ("a must be", "positive", "0.0")),
        BadInput("b <= 0", lambda: Compander(1.0, -2.0), ValueError, ("b must be", "positive", "-2.0")),
        BadInput("|w| >= a pi / 2", _out_of_range, ValueError, ("out of range", "%", "smallest valid a")),
        BadInput("wrapped twice", _twice, ValueError, ("already companded", "merge_companders")),
        BadInput(
            "normalisation layers",
            lambda: compand_weights(nn.Sequential(nn.LayerNorm(3)), include=(nn.LayerNorm,)),
            ValueError,
            ("normalisation", "LayerNorm"),
        ),
        BadInput("tied weights", _tied, ValueError, ("shares its weight", "0.weight", "2.weight", "exclude")),
        BadInput("optimizer built before", _stale_optimizer, ValueError, ("optimizer", "4 trainable", "factory")),
        BadInput(
            "lazy layer",
            lambda: compand_weights(nn.Sequential(nn.LazyLinear(3))),
            ValueError,
            ("lazy", "run one batch"),
        ),
        BadInput("nothing matches", lambda: compand_weights(nn.ReLU()), NoEffectWarning, ("ReLU", "nothing")),
        BadInput(
            "unknown init",
            lambda: compand_weights(TASK.model(), init="B"),  # type: ignore[arg-type]
            ValueError,
            ("init", "'preserve'", "'B'"),
        ),
    ]
