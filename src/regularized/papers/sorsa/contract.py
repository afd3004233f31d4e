"""What the contract suite checks of SORSA: the adapter in the loop, its penalty alone, and the sheet's bad input."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regularized.evidence.contract import BadInput, Classification, NotApplicable, Subject, plain
from regularized.evidence.models import mlp
from regularized.fine_tuning.sorsa.layer import SorsaLinear, inject_sorsa
from regularized.fine_tuning.sorsa.penalty import OrthonormalPenalty, orthonormal_gradient, orthonormal_penalty
from regularized.fine_tuning.sorsa.report import spectral_drift
from regularized.fine_tuning.sorsa.term import Sorsa

FEATURES, LR = 6, 0.1
TASK = Classification(FEATURES, hidden=(8,))
_SGD = partial(torch.optim.SGD, lr=LR, momentum=0.9)


def _injected() -> nn.Module:
    model = TASK.model()
    inject_sorsa(model, r=3)
    return model


def _adapter() -> Mapping[str, nn.Module]:
    return {**plain(), "sorsa": Sorsa(r=3, lr=LR, gamma=0.01)}


def _off() -> Mapping[str, nn.Module]:
    return {**plain(), "sorsa": Sorsa(r=3, lr=LR, gamma=0.0)}


def _layer_part() -> tuple[Callable[..., Any], tuple[Any, ...]]:
    return SorsaLinear.of(nn.Linear(7, 5), r=3), (torch.randn(4, 7, requires_grad=True),)


def _penalty_part() -> tuple[Callable[..., Any], tuple[Any, ...]]:
    def penalty(*factors: Tensor) -> Tensor:
        return orthonormal_penalty(factors)

    return penalty, tuple(torch.randn(3, n, requires_grad=True) for n in (5, 7, 5))


def subjects() -> list[Subject]:
    """Injection by the term, and the penalty on a model that was injected before."""
    no_off = NotApplicable("without the penalty the adapter still is one: that is the other subject")
    return [
        Subject("adapter", TASK.model, _adapter, plain, TASK.data, no_off, _layer_part, _SGD),
        Subject("penalty", _injected, _adapter, plain, TASK.data, off=_off, part=_penalty_part, optimizer=_SGD),
    ]


# -- bad input ----------------------------------------------------------------------------------


def _twice() -> None:
    inject_sorsa(_injected(), r=2)


def _with_weight(value: Tensor) -> nn.Linear:
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(value, requires_grad=False)
    return layer


def _tied() -> None:
    model = mlp([6, 6, 6])
    model[2].weight = model[0].weight
    inject_sorsa(model, r=2)


def _stale_optimizer() -> None:
    model = TASK.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    inject_sorsa(model, r=2)
    OrthonormalPenalty(model, lr=LR, optimizer=optimizer)


def _trained(**settings: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = _injected()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LR, **settings)
    return model, optimizer


def _no_gradient() -> None:
    OrthonormalPenalty(_injected(), lr=LR).add_gradient()


def _still_scaled() -> None:
    model, optimizer = _trained()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(torch.randn(4, FEATURES)).square().mean()).backward()
    OrthonormalPenalty(model, lr=LR, optimizer=optimizer).add_gradient(scaler=scaler)


def _decay() -> None:
    model, optimizer = _trained(weight_decay=0.01)
    OrthonormalPenalty(model, lr=LR, optimizer=optimizer)


def _merged() -> SorsaLinear:
    layer = SorsaLinear.of(nn.Linear(4, 4), r=2)
    layer.merge()
    return layer


def _penalty_when_merged() -> None:
    OrthonormalPenalty(nn.Sequential(_merged()), lr=LR).add_gradient()


def _train_when_merged() -> None:
    F.relu(_merged()(torch.randn(2, 4)))


def _other_reduction() -> None:
    orthonormal_gradient([torch.eye(2)], reduction="max")  # type: ignore[arg-type]


def bad_inputs() -> list[BadInput]:
    """Every line of the sheet's "bad input", and what a user meets besides."""
    integers = torch.zeros(4, 4, dtype=torch.int8)
    broken = torch.full((4, 4), float("nan"))
    return [
        BadInput("r < 1", lambda: inject_sorsa(TASK.model(), r=0), ValueError, ("weight of 0", "[1, 6]", "got 0")),
        BadInput(
            "r too large", lambda: inject_sorsa(TASK.model(), r=5), ValueError, ("weight of 2", "[1, 4]", "got 5")
        ),
        BadInput("gamma < 0", lambda: OrthonormalPenalty(_injected(), gamma=-1.0, lr=LR), ValueError, (">= 0", "-1")),
        BadInput("gamma < 0, the term", lambda: Sorsa(r=2, lr=LR, gamma=-1.0), ValueError, ("gamma", ">= 0", "-1")),
        BadInput("lr <= 0", lambda: Sorsa(r=2, lr=0.0), ValueError, ("peak learning rate", "> 0", "0.0")),
        BadInput(
            "no module matched",
            lambda: inject_sorsa(nn.ModuleDict({"q_proj": nn.Linear(4, 4)}), r=2, target_modules=["q_prj"]),
            ValueError,
            ("q_prj", "close names", "q_proj"),
        ),
        BadInput("injected before", _twice, ValueError, ("already has SORSA layers", "merge_sorsa")),
        BadInput(
            "quantized weight",
            lambda: SorsaLinear.of(_with_weight(integers), r=2),
            TypeError,
            ("quantized", "int8", "dequantize"),
        ),
        BadInput(
            "non-finite weight", lambda: SorsaLinear.of(_with_weight(broken), r=2), ValueError, ("NaN", "checkpoint")
        ),
        BadInput("optimizer built before", _stale_optimizer, ValueError, ("optimizer", "6 trainable", "before")),
        BadInput("no gradients", _no_gradient, RuntimeError, ("no factor has a gradient", "after loss.backward()")),
        BadInput("gradients still scaled", _still_scaled, RuntimeError, ("unscale first", "scaler.unscale_")),
        BadInput("training after merge", _train_when_merged, RuntimeError, ("merged", "unmerge()")),
        BadInput("penalty after merge", _penalty_when_merged, RuntimeError, ("merged", "unmerge")),
        BadInput("weight decay", _decay, UserWarning, ("weight_decay=0.01", "weight_decay=0")),
        BadInput("tied weights", _tied, ValueError, ("shares its weight", "leave it out")),
        BadInput(
            "not linear",
            lambda: inject_sorsa(nn.Sequential(nn.Conv2d(3, 3, 3)), r=2, target_modules=["0"]),
            TypeError,
            ("Conv2d", "nn.Linear"),
        ),
        BadInput(
            "alpha <= 0", lambda: inject_sorsa(TASK.model(), r=2, alpha=0.0), ValueError, ("alpha", "positive", "0.0")
        ),
        BadInput(
            "dropout >= 1", lambda: inject_sorsa(TASK.model(), r=2, dropout=1.0), ValueError, ("dropout", "[0, 1)")
        ),
        BadInput("no SORSA layers", lambda: OrthonormalPenalty(TASK.model(), lr=LR), ValueError, ("no SORSA layers",)),
        BadInput("no factors", lambda: orthonormal_penalty([]), ValueError, ("no factors",)),
        BadInput("reduction", _other_reduction, ValueError, ("'mean'", "'max'")),
        BadInput(
            "weights of two shapes",
            lambda: spectral_drift(torch.eye(2), torch.eye(3)),
            ValueError,
            ("(2, 2)", "(3, 3)"),
        ),
    ]
