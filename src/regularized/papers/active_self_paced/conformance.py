"""Golden vectors of active self-paced learning: definitions evaluated in float64, not the released code."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from regularized.curriculum.active_self_paced.loss import (
    Weighting,
    one_vs_rest_hinge,
    one_vs_rest_labels,
    self_paced_implicit_loss,
    self_paced_penalty,
    self_paced_weights,
)
from regularized.curriculum.active_self_paced.procedure import ActiveSelfPaced
from regularized.evidence.conformance import Case, UnknownCase

TOLERANCE = 1e-12


def compute(case: Case) -> Mapping[str, NDArray[Any]]:
    """Weights, labels, the objective with its gradient, the pace, or the implicit loss, by the keys of the case."""
    if case.has("in/X", "in/W", "in/b", "in/certified", "in/y_certified", "in/lam"):
        return _objective(case)
    if case.has("in/scores", "in/weights"):
        return _labels(case)
    if case.has("in/scores", "in/y", "in/lam"):
        return _weights(case)
    if case.has("in/accuracy", "hp/lam0", "hp/alpha", "hp/tau"):
        return _pace(case)
    if case.has("in/loss", "hp/lam"):
        losses = _tensor(case, "loss")
        implicit = self_paced_implicit_loss(losses, case.number("lam"), cost=case.number("C", 1.0))
        return {"implicit": implicit.numpy()}
    raise UnknownCase(case)


def _tensor(case: Case, name: str) -> Tensor:
    return torch.tensor(np.asarray(case.inputs[name], dtype=np.float64))


def _weights(case: Case) -> Mapping[str, NDArray[Any]]:
    hinge = one_vs_rest_hinge(_tensor(case, "scores"), _tensor(case, "y"))
    pace, cost = _tensor(case, "lam"), case.number("C", 1.0)
    out = {"hinge": hinge.numpy()}
    for weighting in ("linear", "hard"):
        kind: Weighting = "linear" if weighting == "linear" else "hard"
        out[f"v_{weighting}"] = self_paced_weights(hinge, pace, cost=cost, weighting=kind).numpy()
    return out


def _labels(case: Case) -> Mapping[str, NDArray[Any]]:
    scores, weights = _tensor(case, "scores"), _tensor(case, "weights")
    labels = one_vs_rest_labels(scores, weights)
    return {"y": labels.numpy(), "objective": (weights * one_vs_rest_hinge(scores, labels)).sum(dim=1).numpy()}


def _objective(case: Case) -> Mapping[str, NDArray[Any]]:
    weight, bias = _tensor(case, "W").requires_grad_(), _tensor(case, "b").requires_grad_()
    certified = torch.tensor(np.asarray(case.inputs["certified"], dtype=bool))
    pace, cost = _tensor(case, "lam"), case.number("C", 1.0)
    weighting: Weighting = "hard" if case.text("regularizer", "linear") == "hard" else "linear"
    scores = _tensor(case, "X") @ weight.T + bias
    labels = torch.where(certified[:, None], _tensor(case, "y_certified"), one_vs_rest_labels(scores.detach()))
    losses = one_vs_rest_hinge(scores, labels)
    v = self_paced_weights(losses.detach(), pace, cost=cost, weighting=weighting)
    v = torch.where(certified[:, None], torch.ones_like(v), v)
    penalty = self_paced_penalty(v, pace, weighting=weighting)
    objective = 0.5 * weight.square().sum() + (cost * v * losses + penalty).sum()
    grad_weight, grad_bias = torch.autograd.grad(objective, (weight, bias))
    return {
        "scores": scores.detach().numpy(),
        "y": labels.numpy(),
        "v": v.numpy(),
        "objective": objective.detach().numpy(),
        "grad_W": grad_weight.numpy(),
        "grad_b": grad_bias.numpy(),
    }


def _pace(case: Case) -> Mapping[str, NDArray[Any]]:
    accuracies = _tensor(case, "accuracy")
    classes = accuracies.shape[1]
    learner = ActiveSelfPaced(
        classes,
        {c: c for c in range(classes)},
        num_classes=classes,
        pace=case.number("lam0"),
        pace_step=case.number("alpha"),
        pace_rounds=int(case.number("tau")),
    )
    paces = [learner.pace]
    for accuracy in accuracies:
        learner.step_pace(accuracy)
        learner.round += 1
        paces.append(learner.pace)
    return {"lam": torch.stack(paces).numpy()}
