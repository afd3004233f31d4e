"""Golden vectors of CAST: runs of its optimizer, a scaled layer with its gradients, and the distilled loss.

Nobody's code: the authors released none. The vectors come from float64 loops over the paper's equations; the runs of
the optimizer were compared with an independent reproduction.
"""

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from regularized.compression.cast import ScaledLinear, SparseAdamW, distillation_loss, semi_structured_mask
from regularized.compression.cast.pattern import Pattern
from regularized.evidence.conformance import Case, UnknownCase

TOLERANCE = 1e-9


def compute(case: Case) -> Mapping[str, NDArray[Any]]:
    """A run of the optimizer, a scaled layer, or a loss, by the inputs that there are."""
    if case.has("in/weight", "in/grads", "hp/l1"):
        out = _run(case)
    elif case.has("in/weight", "in/scale", "in/x"):
        out = _scaled(case)
    elif case.has("in/student", "in/teacher", "in/target"):
        out = _distilled(case)
    else:
        raise UnknownCase(case)
    return {name: tensor.detach().numpy() for name, tensor in out.items()}


def _run(case: Case) -> dict[str, Tensor]:
    weight, gradients = nn.Parameter(_tensor(case, "weight")), _tensor(case, "grads")
    optimizer = SparseAdamW(
        [weight],
        lr=case.number("lr"),
        l1=case.number("l1"),
        total_steps=int(case.number("T", len(gradients))),
        pattern=_pattern(case),
        mask_every=int(case.number("T1", 10)),
        betas=(case.number("beta1", 0.9), case.number("beta2", 0.999)),
        eps=case.number("eps", 1e-8),
    )
    weights, masks = [], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # so few steps cannot bring a weight to zero
        for gradient in gradients:
            weight.grad = gradient.clone()
            optimizer.step()
            weights.append(weight.detach().clone())
            masks.append(optimizer.masks()[weight].clone())
    state = optimizer.state[weight]
    return {
        "weights": torch.stack(weights),
        "masks": torch.stack(masks),
        "exp_avg": state["exp_avg"],
        "exp_avg_sq": state["exp_avg_sq"],
    }


def _scaled(case: Case) -> dict[str, Tensor]:
    weight, scale, x = (_tensor(case, name) for name in ("weight", "scale", "x"))
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=torch.float64)
    linear.weight = nn.Parameter(weight)
    layer = ScaledLinear.of(linear, groups=int(case.number("groups", scale.shape[1])))
    layer.scale = nn.Parameter(scale)
    mask = semi_structured_mask(weight, _pattern(case))
    y = layer(x)
    out = {"y": y, "mask": mask}
    if case.has("in/grad_y"):
        y.backward(_tensor(case, "grad_y"))
        out |= {f"grad_{name}": p.grad for name, p in layer.named_parameters() if p.grad is not None}
    with torch.no_grad():
        layer.weight.mul_(mask)
    return out | {"final_weight": layer.plain().weight}


def _distilled(case: Case) -> dict[str, Tensor]:
    found = distillation_loss(
        _tensor(case, "student"),
        _tensor(case, "teacher"),
        torch.as_tensor(case.inputs["target"]).long(),
        eta=case.number("eta", 1 / 3),
        temperature=case.number("temperature", 1.0),
    )
    return found._asdict()


def _pattern(case: Case) -> Pattern:
    return int(case.number("N", 2)), int(case.number("M", 4))


def _tensor(case: Case, name: str) -> Tensor:
    return torch.as_tensor(np.array(case.inputs[name], dtype=np.float64))
