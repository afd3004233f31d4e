"""Golden vectors of Weight Compander: the formulas evaluated in float64 (there is no official code)."""

from collections.abc import Mapping
from typing import Any

import torch
from numpy.typing import NDArray

from regularized.evidence.conformance import Case, UnknownCase
from regularized.overfitting.weight_compander import compand, compand_inverse

TOLERANCE = 1e-12


def compute(case: Case) -> Mapping[str, NDArray[Any]]:
    """The weight, its three gradients under a given upstream gradient, and the inverse of given weights."""
    if not case.has("hp/a", "hp/b") or not (case.has("in/v") or case.has("in/w0")):
        raise UnknownCase(case)
    a = torch.tensor(case.number("a"), dtype=torch.float64, requires_grad=True)
    b = torch.tensor(case.number("b"), dtype=torch.float64, requires_grad=True)
    out: dict[str, NDArray[Any]] = {}
    if case.has("in/v"):
        v = torch.tensor(case.inputs["v"], dtype=torch.float64, requires_grad=True)
        w = compand(v, a, b)
        out["w"] = w.detach().numpy()
        if case.has("in/grad_w"):
            upstream = torch.tensor(case.inputs["grad_w"], dtype=torch.float64)
            for name, grad in zip("vab", torch.autograd.grad(w, (v, a, b), upstream), strict=True):
                out[f"grad_{name}"] = grad.numpy()
    if case.has("in/w0"):
        w0 = torch.tensor(case.inputs["w0"], dtype=torch.float64)
        out["v0_from_w0"] = compand_inverse(w0, a, b).detach().numpy()
    return out
