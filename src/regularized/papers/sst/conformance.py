"""Golden vectors of SST: our own NumPy derivation, of one SGD step with its projection; there is no official code."""

from collections.abc import Mapping
from typing import Any

import torch
from numpy.typing import NDArray

from regularized.evidence.conformance import Case, UnknownCase
from regularized.pretraining.sst.layer import Gradient, SpectralLinear, factors_of
from regularized.pretraining.sst.sampling import sampling_probabilities

TOLERANCE = 1e-10


def compute(case: Case) -> Mapping[str, NDArray[Any]]:
    """Probabilities, output, both kinds of gradients and one SGD step, as far as the case has what they need."""
    if not (case.has("in/U", "in/S", "in/V") or case.has("in/weight")):
        raise UnknownCase(case)
    if case.has("in/U", "in/S", "in/V"):
        left, values, right = (torch.as_tensor(case.inputs[name]) for name in ("U", "S", "V"))
        left, right = left.T, right.T
    else:
        left, values, right = factors_of(torch.as_tensor(case.inputs["weight"]))
    out = {"prob": sampling_probabilities(values)}
    if case.has("in/x"):
        active = torch.arange(int(case.number("rank", len(values))))
        if case.has("in/active"):
            active = torch.as_tensor(case.inputs["active"]).long()
        bias = torch.as_tensor(case.inputs["bias"]) if case.has("in/bias") else None

        def layer(gradient: Gradient) -> SpectralLinear:
            return SpectralLinear(left, values, right, active, bias, gradient=gradient)

        default = layer("default")
        out |= {f"{name}_default": value for name, value in _gradients(case, default).items() if "active" in name}
        enhanced = layer("enhanced")
        out |= _gradients(case, enhanced)
        if case.has("in/grad_y", "hp/lr"):
            torch.optim.SGD(enhanced.parameters(), lr=case.number("lr")).step()
            enhanced.project()
            now = {"U_new": enhanced.left.T, "S_new": enhanced.values, "V_new": enhanced.right.T}
            out |= {name: tensor.detach().clone() for name, tensor in now.items()} | {"W_new": enhanced.weight()}
            enhanced.decompose()
            out["singular_values_after_resvd"] = enhanced.values
    return {name: tensor.detach().numpy() for name, tensor in out.items()}


def _gradients(case: Case, layer: SpectralLinear) -> dict[str, torch.Tensor]:
    """Output, and what a backward pass leaves in the layer."""
    x = torch.as_tensor(case.inputs["x"]).clone().requires_grad_()
    y = layer(x)
    out = {"y": y}
    if case.has("in/grad_y"):
        y.backward(torch.as_tensor(case.inputs["grad_y"]))
        grads = {
            "grad_U_active": layer.active_left.grad,
            "grad_V_active": layer.active_right.grad,
            "grad_S": layer.values.grad,
            "grad_x": x.grad,
            "grad_bias": None if layer.bias is None else layer.bias.grad,
        }
        out |= {
            name: grad.T.clone() if "active" in name else grad.clone()
            for name, grad in grads.items()
            if grad is not None
        }
    return out
