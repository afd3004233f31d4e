"""Golden vectors of safelix/dinopl at cd39e78 against the public API."""

import re

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from regularized.evidence.conformance import Case, UnknownCase
from regularized.self_supervised.random_teacher.layer import BottleneckHead
from regularized.self_supervised.random_teacher.loss import Loss, distillation_losses
from regularized.self_supervised.random_teacher.student_init import interpolate_init, neighbourhood_init

TOLERANCE = 1e-12
"""The sheet's: double precision."""

Outputs = dict[str, NDArray[np.float64]]

PREFIX = "param:"
LOSSES: dict[str, Loss] = {"CE": "ce", "KL": "kl", "MSE": "mse"}


def compute(case: Case) -> Outputs:
    """Outputs of a case, by the kind that its keys show.

    Raises:
        UnknownCase: the keys fit neither the head, nor a loss, nor an initialisation.
    """
    if case.has("in/x") and any(name.startswith(PREFIX) for name in case.inputs):
        return _head(case)
    if case.has("in/student", "in/teacher", "hp/loss"):
        return _loss(case)
    if any(name.startswith("teacher_") for name in case.inputs):
        return _init(case)
    raise UnknownCase(case)


def _head(case: Case) -> Outputs:
    """The head's raw outputs, and those divided by the temperature."""
    given = {name.removeprefix(PREFIX): torch.tensor(v) for name, v in case.inputs.items() if name.startswith(PREFIX)}
    # Names of the official head to ours.
    ours = {}
    for name, tensor in given.items():
        layer = re.fullmatch(r"mlp\.layer(\d+)\.lin\.(weight|bias)", name)
        if layer:
            ours[f"mlp.{2 * int(layer[1])}.{layer[2]}"] = tensor
        elif name in ("last_layer.lin1.weight", "last_layer.lin1.bias"):
            ours[name.replace("last_layer.lin1", "bottleneck")] = tensor
        elif name == "last_layer.lin2.weight":
            ours["outputs.weight"] = tensor
        else:
            raise UnknownCase(case)
    # The string says, for both layers of the bottleneck: weight norm / linear (b: bias) / feature norm. Whether its
    # weight norm has an effect is another matter: in the official code it has none.
    parts = case.text("cfg", "-/lb/fn/wn/l/-").split("/")
    effective = bool(case.number("weight_norm_effective", 0))
    known = (
        len(parts) == 6
        and parts[1] in ("l", "lb")
        and parts[2] in ("fn", "fnd")
        and parts[4:] == ["l", "-"]
        and not (effective and parts[0] == "wn")
    )
    if not known or "outputs.weight" not in ours or "bottleneck.weight" not in ours:
        raise UnknownCase(case)
    hidden = [
        len(ours[f"mlp.{2 * i}.weight"])
        for i in range(sum(n.startswith("mlp.") and n.endswith(".weight") for n in ours))
    ]
    head = BottleneckHead(
        case.inputs["x"].shape[-1],
        hidden=hidden,
        bottleneck=ours["bottleneck.weight"].shape[0],
        out_features=ours["outputs.weight"].shape[0],
        weight_norm=effective and parts[3] == "wn",
    ).double()
    # A layer without a bias is one whose bias is zero.
    absent = {n: torch.zeros_like(p) for n, p in head.named_parameters() if n.endswith(".bias") and n not in ours}
    head.load_state_dict({**ours, **absent})
    with torch.no_grad():
        projections = head(torch.tensor(case.inputs["x"]))
    temperature = case.number("temp", 1.0)
    return {"projections": projections.numpy(), "logits": (projections / temperature).numpy()}


def _loss(case: Case) -> Outputs:
    """Mean loss, and its gradient by the raw outputs of the student."""
    kind = case.text("loss")
    if kind not in LOSSES:
        raise UnknownCase(case)
    student = torch.tensor(case.inputs["student"], requires_grad=True)
    loss = distillation_losses(
        student,
        torch.tensor(case.inputs["teacher"]),
        loss=LOSSES[kind],
        student_temperature=case.number("s_temp", 1.0),
        teacher_temperature=case.number("t_temp", 1.0),
    ).mean()
    (gradient,) = torch.autograd.grad(loss, student)
    return {"loss": loss.detach().numpy(), "grad_student": gradient.numpy()}


class _Parameters(nn.Module):
    """A network that is nothing but its parameters."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        super().__init__()
        for name, value in values.items():
            self.register_parameter(name, nn.Parameter(value))


def _init(case: Case) -> Outputs:
    """The student's parameters at its start."""

    def network(role: str) -> _Parameters:
        prefix = f"{role}_"
        return _Parameters(
            {n.removeprefix(prefix): torch.tensor(v) for n, v in case.inputs.items() if n.startswith(prefix)}
        )

    teacher, fresh, mode = network("teacher"), network("fresh"), case.text("mode", "interpolated")
    preserving = bool(case.number("variance_preserving", 0))
    if mode == "interpolated":
        interpolate_init(teacher, fresh, case.number("alpha"), variance_preserving=preserving)
    elif mode in ("neighborhood", "neighbourhood"):
        neighbourhood_init(teacher, fresh, case.number("eps"), variance_preserving=preserving)
    elif mode in ("teacher", "random"):
        interpolate_init(teacher, fresh, 0.0 if mode == "teacher" else 1.0)
    else:
        raise UnknownCase(case)
    return {f"student_{name}": p.detach().numpy() for name, p in fresh.named_parameters()}
