"""Golden vectors of GLAD: both gradients of a quadratic, three ways to combine gradients, and the logits of CLIP.

Nobody's code: the authors released none. The vectors come from a float64 computation of the reconstruction.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from regularized.evidence.conformance import Case, UnknownCase
from regularized.fine_tuning.glad.loss import clip_logits, few_shot_loss
from regularized.fine_tuning.glad.optimizer import GLAD, steer
from regularized.mechanisms.ascent import ascent_direction

TOLERANCE = 1e-12


def compute(case: Case) -> Mapping[str, NDArray[Any]]:
    """Whatever the keys allow: the two passes on a quadratic, each tagged pair of gradients, logits and loss."""
    out: dict[str, Tensor] = {}
    if case.has("in/H", "in/b", "in/theta", "hp/rho"):
        out |= _quadratic(case)
    for name in case.inputs:
        tag, _, last = name.rpartition("/")
        if tag and last == "g" and case.has(f"in/{tag}/ref"):
            out |= _combined(case, tag)
    if case.has("in/image", "in/text", "hp/logit_scale"):
        logits = clip_logits(_tensor(case, "image"), _tensor(case, "text"), logit_scale=case.number("logit_scale"))
        out["logits"] = logits
        if case.has("in/labels"):
            out["loss"] = few_shot_loss(logits, torch.as_tensor(case.inputs["labels"]).long())
    if not out:
        raise UnknownCase(case)
    return {name: tensor.detach().numpy() for name, tensor in out.items()}


def _quadratic(case: Case) -> dict[str, Tensor]:
    """``theta H theta / 2 + b theta``, its parameters in tensors of the given sizes, passed twice by the optimizer."""
    curvature, slope = _tensor(case, "H"), _tensor(case, "b")
    parameters = [nn.Parameter(part) for part in _split(case, _tensor(case, "theta"))]
    # lam = 1 leaves the second gradient as it is.
    optimizer = GLAD(torch.optim.SGD(parameters, lr=1.0), rho=case.number("rho"), lam=1.0)
    losses: list[Tensor] = []
    first: list[Tensor] = []

    def closure() -> Tensor:
        theta = torch.cat(list(parameters))
        loss = 0.5 * theta @ curvature @ theta + slope @ theta
        loss.backward()
        losses.append(loss)
        first.extend(_gradients(parameters) if not first else ())
        return loss

    optimizer.backward(closure)
    return {
        "loss": losses[0],
        "grad": torch.cat(first),
        "epsilon": torch.cat(ascent_direction(first, case.number("rho"))),
        "grad_sam": torch.cat(_gradients(parameters)),
        "loss_perturbed": losses[-1],
    }


def _combined(case: Case, tag: str) -> dict[str, Tensor]:
    gradients, reference = (_tensor(case, f"{tag}/{name}") for name in ("g", "ref"))
    parts = _split(case, gradients), _split(case, reference)
    lam = case.number("lambda", 0.5)
    out = {
        f"{tag}/cos": F.cosine_similarity(gradients, reference, dim=0),
        f"{tag}/project": torch.cat(steer(*parts, mode="project", lam=lam)),
        f"{tag}/steer": torch.cat(steer(*parts, mode="steer", lam=lam)),
        f"{tag}/project_per_tensor": torch.cat(steer(*parts, mode="project", lam=lam, per_tensor=True)),
        f"{tag}/steer_per_tensor": torch.cat(steer(*parts, mode="steer", lam=lam, per_tensor=True)),
    }
    if lam <= 1:
        out[f"{tag}/interpolate"] = torch.cat(steer(*parts, mode="interpolate", lam=lam))
    return out


def _tensor(case: Case, name: str) -> Tensor:
    return torch.as_tensor(np.asarray(case.inputs[name], dtype=np.float64))


def _split(case: Case, flat: Tensor) -> list[Tensor]:
    sizes = case.hp.get("sizes")
    return [flat] if sizes is None else list(torch.split(flat, np.atleast_1d(sizes).astype(int).tolist()))


def _gradients(parameters: list[nn.Parameter]) -> list[Tensor]:
    return [p.grad.clone() for p in parameters if p.grad is not None]
