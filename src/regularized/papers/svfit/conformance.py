"""Golden vectors of SVFit: our own NumPy reference, checked by finite differences; there is no official code."""

from collections.abc import Mapping
from typing import Any

import torch
from numpy.typing import NDArray
from torch import nn

from regularized.evidence.conformance import Case, UnknownCase
from regularized.fine_tuning.svfit.layer import SingularValueShift, SVFitLayer

TOLERANCE = 1e-10


def compute(case: Case) -> Mapping[str, NDArray[Any]]:
    """Decomposition, output, merged weight, gradient and one AdamW step, as far as the case has what they need."""
    if not case.has("in/weight", "hp/r"):
        raise UnknownCase(case)
    weight = torch.as_tensor(case.inputs["weight"])
    outputs, inputs = weight.shape
    layer = nn.Linear(inputs, outputs, bias="bias" in case.inputs, dtype=weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if "bias" in case.inputs:
            layer.bias.copy_(torch.as_tensor(case.inputs["bias"]))
    # Only the paper's form has weight decay act on sigma; all else is the same in both.
    directions = SingularValueShift.of(layer.weight, int(case.number("r")), decay="sigma")
    values, every = directions.values.clone(), torch.linalg.svdvals(weight)
    retained = (directions.left * values) @ directions.right
    out = {
        "sigma0": values,
        "W_r": retained,
        "W_e": weight - retained,
        "energy": values.square().sum() / every.square().sum(),
        "nuclear_fraction": values.sum() / every.sum(),
    }
    if "sigma" in case.inputs:
        directions.set_shift(torch.as_tensor(case.inputs["sigma"]) - values)
    adapted = SVFitLayer(layer, directions)
    out["merged_weight"] = adapted.weight
    if case.has("in/x"):
        y = adapted(torch.as_tensor(case.inputs["x"]))
        out["y"] = y
        if case.has("in/grad_out"):
            (y * torch.as_tensor(case.inputs["grad_out"])).sum().backward()
            assert directions.trained.grad is not None
            out["grad_sigma"] = directions.trained.grad.clone()
            if case.has("hp/lr"):
                torch.optim.AdamW(
                    [directions.trained], lr=case.number("lr"), weight_decay=case.number("weight_decay", 0.0)
                ).step()
                out["sigma_after_adamw"] = directions.trained
    return {name: tensor.detach().numpy() for name, tensor in out.items()}
