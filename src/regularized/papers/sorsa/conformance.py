"""Golden vectors of Gunale0926/SORSA at 809cca0 against the public API: a layer's life, and the drift of a weight."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from regularized.evidence.conformance import Case, UnknownCase
from regularized.fine_tuning.sorsa.layer import SorsaLinear
from regularized.fine_tuning.sorsa.penalty import orthonormal_gradient, orthonormal_penalty
from regularized.fine_tuning.sorsa.report import spectral_drift

Outputs = Mapping[str, NDArray[Any]]


def tolerance(case: Case, output: str) -> float:
    """The sheet's: 1e-10 relative, 1e-5 for float32."""
    return 1e-5 if any(array.dtype == "float32" for array in case.inputs.values()) else 1e-10


def compute(case: Case) -> Outputs:
    """Outputs of a case, by the kind that its keys show.

    Raises:
        UnknownCase: the keys fit neither a layer nor a pair of weights.
    """
    if case.has("in/W0", "in/Wt"):
        drift = spectral_drift(*(torch.as_tensor(case.inputs[name]) for name in ("W0", "Wt")))
        return {"delta_sigma": drift.values.numpy(), "delta_d": drift.vectors.numpy()}
    if case.has("in/weight", "hp/r"):
        return {name: tensor.detach().numpy() for name, tensor in _layer(case).items()}
    raise UnknownCase(case)


def _layer(case: Case) -> dict[str, Tensor]:
    """At the start, and then with given factors where there are some."""
    given = {name: torch.as_tensor(array) for name, array in case.inputs.items()}
    o, i = given["weight"].shape
    plain = nn.Linear(i, o, bias="bias" in given, dtype=given["weight"].dtype)
    plain.load_state_dict({name: given[name] for name in ("weight", "bias") if name in given})
    r = int(case.number("r"))
    alpha = case.number("alpha", math.nan)
    if math.isnan(alpha):
        alpha = case.number("scale", 1.0) * r
    layer = SorsaLinear.of(plain, r=r, alpha=alpha)

    out = {
        "S0": layer.values.clone(),
        "principal0": (layer.left * layer.values) @ layer.right,
        "residual": layer.weight,
    }
    if "x" in given:
        out["y0"] = layer(given["x"])
    if not {"A", "S", "B"} <= given.keys():
        return out
    with torch.no_grad():
        for parameter, name in ((layer.right, "A"), (layer.values, "S"), (layer.left, "B")):
            parameter.copy_(given[name])
    factors = [layer.right, layer.left]
    out["ortho"] = orthonormal_penalty(factors)
    # The sheet lists the gradient of the mean of both norms; the official code has no dead zone.
    out["ortho_grad_A"], out["ortho_grad_B"] = orthonormal_gradient(factors, eps=0.0)
    if "x" in given:
        out["y"] = layer(given["x"])
        if "grad_out" in given:
            trained = {"A": layer.right, "S": layer.values, "B": layer.left}
            grads = torch.autograd.grad((out["y"] * given["grad_out"]).sum(), list(trained.values()))
            out |= {f"grad_{name}": grad for name, grad in zip(trained, grads, strict=True)}
    merged = layer.plain()
    out["merged_weight"] = merged.weight
    if "x" in given:
        out["y_merged"] = merged(given["x"])
    return out
