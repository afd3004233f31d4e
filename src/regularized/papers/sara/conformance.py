"""Golden vectors of SaRA: the official sparse module, trajectories of its dense optimizer, the learning rate rule."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from regularized.evidence.conformance import Case, UnknownCase
from regularized.fine_tuning.sara.penalty import nuclear_norm
from regularized.fine_tuning.sara.term import SaRA, suggested_learning_rate

TOLERANCE = 1e-9


class _Weights(nn.Module):
    """A model that is one parameter."""

    def __init__(self, weight: NDArray[Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight, dtype=torch.float64))


def compute(case: Case) -> Mapping[str, NDArray[Any]]:
    """What a case's keys ask for: one map, a trajectory, or the rule."""
    if case.has("in/threshold"):
        rates = [suggested_learning_rate(float(t)) for t in np.atleast_1d(case.inputs["threshold"])]
        return {"lr": np.array(rates).reshape(case.inputs["threshold"].shape)}
    if case.has("in/base", "in/grad_out", "hp/threshold"):
        return _map(case)
    if case.has("in/W0", "in/X", "in/Y", "hp/threshold", "hp/lr", "hp/steps"):
        return _trajectory(case)
    raise UnknownCase(case)


def _threshold(case: Case, weight: str) -> float:
    """The case's; infinite where it selects every entry, which otherwise is refused as a mistake."""
    threshold = case.number("threshold")
    return float("inf") if bool((np.abs(case.inputs[weight]) < threshold).all()) else threshold


def _map(case: Case) -> Mapping[str, NDArray[Any]]:
    """Chosen entries, the weight with other values in their place, and the gradient that reaches these."""
    model = _Weights(case.inputs["base"])
    sara = SaRA(model, threshold=_threshold(case, "base"), reselect_at=0, lambda_rank=0)
    (entries,) = sara.parameters()
    mask = torch.zeros_like(model.weight, dtype=torch.bool)
    for change in sara.adapter().changes.values():
        mask.view(-1)[change.index.long()] = True
    if case.has("in/values"):
        # An optimizer whose step is to set the given values.
        optimizer = sara.bind(torch.optim.SGD([entries], lr=1.0))
        entries.grad = entries.detach() - torch.tensor(case.inputs["values"])
        optimizer.step()
        optimizer.zero_grad()
    (model.weight * torch.tensor(case.inputs["grad_out"])).sum().backward()
    assert entries.grad is not None
    out = {"mask": mask, "weight": model.weight, "grad_values": entries.grad}
    return {name: tensor.detach().numpy() for name, tensor in out.items()}


def _trajectory(case: Case) -> Mapping[str, NDArray[Any]]:
    """AdamW on half the mean squared error of a linear map, with penalty and second selection where they are given."""
    model = _Weights(case.inputs["W0"])
    x, y = (torch.tensor(case.inputs[name], dtype=torch.float64) for name in ("X", "Y"))
    steps, half = int(case.number("steps")), int(case.number("progressive_iter", 0))
    sara = SaRA(
        model,
        threshold=_threshold(case, "W0"),
        total_steps=steps,
        reselect_at=half / steps if 0 < half < steps else 0.0,
        lambda_rank=case.number("lambda_rank", 0.0),
    )
    first = sara.num_trainable
    adamw = torch.optim.AdamW(
        sara.parameters(),
        lr=case.number("lr"),
        weight_decay=case.number("weight_decay", 0.0),
        betas=(case.number("beta1", 0.9), case.number("beta2", 0.999)),
        eps=case.number("eps", 1e-8),
    )
    optimizer = sara.bind(adamw)
    norm = _nuclear_norm(sara, model)
    weights: list[Tensor] = []
    losses: list[float] = []
    for _ in range(steps):
        loss = 0.5 * (x @ model.weight.T - y).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        weights.append(model.weight.detach().clone())
    return {
        "W": torch.stack(weights).numpy(),
        "loss": np.array(losses),
        "n_stage1": np.array(first),
        "n_stage2": np.array(sara.num_trainable if 0 < half < steps else -1),
        "values": next(iter(sara.adapter().changes.values())).values.numpy(),
        "nuclear_norm_start": np.array(norm),
        "nuclear_norm_end": np.array(_nuclear_norm(sara, model)),
    }


def _nuclear_norm(sara: SaRA, model: _Weights) -> float:
    """That of the entries of the first selection."""
    (change,) = sara.adapter().changes.values()
    chosen = torch.zeros_like(model.weight)
    chosen.view(-1)[change.index.long()] = model.weight.detach().reshape(-1)[change.index.long()]
    return float(nuclear_norm(chosen.detach()))
