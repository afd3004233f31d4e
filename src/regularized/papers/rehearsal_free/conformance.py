"""Golden vectors of rehearsal-free learning: losses of the group's related code, and the formulas in NumPy."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from regularized.continual.forgetting import global_forgetting, local_forgetting
from regularized.continual.rehearsal_free.fisher import FisherKind, diagonal_fisher
from regularized.continual.rehearsal_free.loss import (
    distillation,
    feature_distillation,
    local_cross_entropy,
    sigmoid_loss,
)
from regularized.evidence.conformance import Case, UnknownCase
from regularized.mechanisms.anchors import add_anchor_gradient, anchor_penalty

TOLERANCE = 1e-12


def compute(case: Case) -> Mapping[str, NDArray[Any]]:
    """What a case's keys ask for: losses with gradients, anchors, Fisher information, or measures of forgetting."""
    if case.has("in/student", "in/teacher", "in/labels"):
        return _losses(case)
    if case.has("in/theta0", "in/anchor0"):
        return _anchors(case)
    if case.has("in/X", "in/W", "in/y"):
        return _fisher(case)
    if case.has("in/feat", "in/feat_teacher"):
        loss = feature_distillation(_tensor(case, "feat"), _tensor(case, "feat_teacher")).mean()
        return {"featkd": loss.numpy()}
    if case.has("in/R", "in/A", "in/task_sizes"):
        forgotten = global_forgetting(_tensor(case, "R"), case.inputs["task_sizes"].tolist())
        return {
            "global_forgetting": forgotten.numpy(),
            "local_forgetting": local_forgetting(_tensor(case, "A")).numpy(),
        }
    raise UnknownCase(case)


def _tensor(case: Case, name: str) -> Tensor:
    return torch.tensor(case.inputs[name])


def _losses(case: Case) -> Mapping[str, NDArray[Any]]:
    labels, teacher = _tensor(case, "labels"), _tensor(case, "teacher")
    num_old, temperature = int(case.number("n_old", teacher.shape[1])), case.number("T", 2.0)
    out: dict[str, NDArray[Any]] = {}
    z = _tensor(case, "student").requires_grad_()
    for name, loss in (
        ("predkd_softmax", distillation(z, teacher[:, :num_old], temperature=temperature)),
        ("lwf_mc", sigmoid_loss(z, labels, teacher[:, :num_old])),
        ("bce_first_task", sigmoid_loss(z, labels)),
        ("local_ce", local_cross_entropy(z, labels, num_old)),
    ):
        mean = loss.mean()
        (gradient,) = torch.autograd.grad(mean, z)
        out |= {name: mean.detach().numpy(), f"{name}_grad": gradient.numpy()}
    return out


def _anchors(case: Case) -> Mapping[str, NDArray[Any]]:
    count = sum(name.startswith("theta") for name in case.inputs)
    strength = case.number("lambda", 1.0)
    weights = [nn.Parameter(_tensor(case, f"theta{k}")) for k in range(count)]
    anchors = [_tensor(case, f"anchor{k}") for k in range(count)]
    fisher = [_tensor(case, f"fisher{k}") for k in range(count)]
    out: dict[str, NDArray[Any]] = {}
    for name, importances in (("l2", None), ("ewc", fisher)):
        out[name] = np.asarray(strength * anchor_penalty(weights, anchors, importances).detach().numpy())
        for w in weights:
            w.grad = None
        add_anchor_gradient(weights, anchors, importances, strength=strength)
        out |= {f"{name}_grad{k}": w.grad.numpy() for k, w in enumerate(weights) if w.grad is not None}
    return out


def _fisher(case: Case) -> Mapping[str, NDArray[Any]]:
    x, y, w = _tensor(case, "X"), _tensor(case, "y"), _tensor(case, "W")
    model = nn.Linear(w.shape[1], w.shape[0], dtype=w.dtype)
    with torch.no_grad():
        model.weight.copy_(w)
        model.bias.copy_(_tensor(case, "b") if case.has("in/b") else torch.zeros(len(w), dtype=w.dtype))
    kinds: tuple[FisherKind, ...] = ("exact", "empirical")
    out: dict[str, NDArray[Any]] = {}
    for kind in kinds:
        found = diagonal_fisher(model, [(x, y)], ["weight", "bias"], kind=kind)
        out |= {f"fisher_{kind}_W": found["weight"].numpy(), f"fisher_{kind}_b": found["bias"].numpy()}
    return out
