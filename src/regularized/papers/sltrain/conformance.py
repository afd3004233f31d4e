"""Golden vectors of SLTrain: the authors' layer and its compiled function, forward and backward."""

from collections.abc import Mapping
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from regularized.evidence.conformance import Case, UnknownCase
from regularized.pretraining.sltrain.layer import SparseLowRankLinear

TOLERANCE = 1e-10


def compute(case: Case) -> Mapping[str, NDArray[Any]]:
    """One layer with the case's factors, entries and positions; outputs and all gradients."""
    if not case.has("in/x", "in/lora_A", "in/lora_B", "in/sparse_value", "in/sparse_index", "in/grad_y"):
        raise UnknownCase(case)
    given = {name: torch.tensor(array) for name, array in case.inputs.items()}
    layer = _layer(case, given)
    x = given["x"].requires_grad_(True)
    y = layer(x)
    y.backward(given["grad_y"])
    out = {
        "y": y,
        "weight": layer.weight,
        "grad_x": x.grad,
        "grad_lora_A": _gradient(layer.right),
        "grad_lora_B": _gradient(layer.left),
        "grad_sparse_value": _gradient(layer.values),
        "grad_bias": _gradient(layer.bias),
        "grad_scaling": _gradient(layer.trained_scale),
    }
    return {name: tensor.detach().numpy() for name, tensor in out.items() if tensor is not None}


def _layer(case: Case, given: Mapping[str, Tensor]) -> SparseLowRankLinear:
    (outputs, rank), inputs = given["lora_B"].shape, given["lora_A"].shape[1]
    layer = SparseLowRankLinear(
        inputs,
        outputs,
        "bias" in given,
        rank=rank,
        density=case.number("sp_ratio", len(given["sparse_value"]) / (outputs * inputs)),
        alpha=case.number("lora_alpha", 1.0),
        trained_scale="scaling" in given,
        dtype=given["x"].dtype,
    )
    state = {"right": "lora_A", "left": "lora_B", "values": "sparse_value", "positions": "sparse_index"}
    state |= {"bias": "bias", "trained_scale": "scaling"}
    layer.load_state_dict({ours: given[theirs] for ours, theirs in state.items() if theirs in given})
    return layer


def _gradient(parameter: nn.Parameter | None) -> Tensor | None:
    return None if parameter is None else parameter.grad
