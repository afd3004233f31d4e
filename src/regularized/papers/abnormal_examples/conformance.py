"""Golden vectors of tmllab/2023_NeurIPS_AAER at 5ad2591: one training step on a small network."""

from collections.abc import Mapping
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from regularized.evidence.conformance import Case, UnknownCase
from regularized.robustness.abnormal_examples import AbnormalExamplesLoss
from regularized.robustness.attacks import OneStep, Threat, cross_entropies

TOLERANCE = 1e-9
"""The sheet's: relative, double precision."""


def compute(case: Case) -> Mapping[str, NDArray[Any]]:
    """The step from a given starting noise: perturbation, parts of the loss, gradients.

    Raises:
        UnknownCase: the keys are not those of a step.
    """
    if not case.has("in/x", "in/y", "in/delta_init", "hp/eps"):
        raise UnknownCase(case)
    model = _network(case)
    x, y, noise = (torch.tensor(case.inputs[name]) for name in ("x", "y", "delta_init"))
    projects = bool(case.number("clamp", 1))
    attack = OneStep(
        Threat.normalised(case.number("eps"), mean=_channels(case, "mean", 0.0), std=_channels(case, "std", 1.0)),
        step=case.number("alpha_multiplier", 1.25 if projects else 1.0),
        project=projects,
    )
    criterion = AbnormalExamplesLoss(
        weight=case.number("lambda1", 1.0),
        loss_weight=case.number("lambda2", 0.0),
        output_weight=case.number("lambda3", 0.0),
    )
    found = attack(model, x, y, noise=noise)
    logits = model(found.inputs)
    loss = criterion(found.logits, found.losses, logits, y)
    loss.backward()
    after = cross_entropies(logits, y)
    seen = criterion.seen
    assert seen is not None
    results: dict[str, Tensor] = {
        "delta": found.perturbation,
        "loss": loss,
        "adv_ce": after.mean(),
        "loss_before": found.losses,
        "loss_after": after,
        "abnormal_mask": seen.abnormal,
        "abnormal_count": seen.number,
        "abnormal_ce": seen.loss_fall,
        "abnormal_l2": seen.abnormal_change,
        "normal_l2": seen.normal_change,
    }
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        results[f"grad/{name}"] = parameter.grad
    return {name: tensor.detach().numpy() for name, tensor in results.items()}


def _channels(case: Case, name: str, default: float) -> float | list[float]:
    return [float(value) for value in case.hp[name].ravel()] if name in case.hp else default


def _network(case: Case) -> nn.Sequential:
    """Flatten, then linear layers at the places that the names of their parameters say, with tanh between them."""
    weights = {
        int(key.split("/")[1].split(".")[0]): torch.tensor(value)
        for key, value in case.inputs.items()
        if key.startswith("param/") and key.endswith(".weight")
    }
    layers: list[nn.Module] = [nn.Tanh() for _ in range(max(weights) + 1)]
    layers[0] = nn.Flatten()
    for place, weight in weights.items():
        bias = case.inputs.get(f"param/{place}.bias")
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype)
        layer.weight = nn.Parameter(weight)
        if bias is not None:
            layer.bias = nn.Parameter(torch.tensor(bias))
        layers[place] = layer
    return nn.Sequential(*layers)
