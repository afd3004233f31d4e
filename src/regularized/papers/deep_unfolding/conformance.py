"""Golden vectors of unfolded ISTA and IHT: all layers, both losses, and their gradients to the step sizes."""

from collections.abc import Mapping
from typing import Any

import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from regularized.evidence.conformance import Case, UnknownCase
from regularized.scientific.deep_unfolding.layer import UnfoldedIHT, UnfoldedISTA
from regularized.scientific.deep_unfolding.loss import SparseObjective

TOLERANCE = 1e-10

_KINDS = {"ista": (UnfoldedISTA, "l1"), "iht": (UnfoldedIHT, "l0")}


def compute(case: Case) -> Mapping[str, NDArray[Any]]:
    """One forward pass, and a backward pass for each loss."""
    kind = case.text("kind")
    if not case.has("in/A", "in/Y", "in/gamma", "hp/lam") or kind not in _KINDS:
        raise UnknownCase(case)
    network_class, norm = _KINDS[kind]
    matrix, y, steps = (torch.as_tensor(case.inputs[name], dtype=torch.float64) for name in ("A", "Y", "gamma"))
    network = network_class(matrix, case.number("lam"), layers=len(steps))
    network.load_state_dict({**network.state_dict(), "steps": steps})
    layers = network(y, all_layers=True)
    objective = SparseObjective(matrix, case.number("lam"), norm="l1" if norm == "l1" else "l0")
    unsupervised = objective(layers[-1], y).mean()
    (of_objective,) = torch.autograd.grad(unsupervised, network.steps, retain_graph=True)
    out = {"x_layers": layers, "loss_unsup_obj": unsupervised, "grad_unsup": of_objective}
    if case.has("in/X"):
        supervised = F.mse_loss(layers[-1], torch.as_tensor(case.inputs["X"], dtype=torch.float64))
        (of_error,) = torch.autograd.grad(supervised, network.steps)
        out |= {"loss_sup_mse": supervised, "grad_sup": of_error}
    return {name: tensor.detach().numpy() for name, tensor in out.items()}
