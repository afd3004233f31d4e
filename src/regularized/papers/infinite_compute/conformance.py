"""Golden vectors of a slow float64 derivation (the official code is JAX on TPUs): laws, ensemble, decay, box, steps."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from regularized.evidence.conformance import Case, UnknownCase
from regularized.overfitting.infinite_compute.ensemble import prefix_losses
from regularized.overfitting.infinite_compute.law import least_squares
from regularized.overfitting.infinite_compute.mixture import mixture_steps
from regularized.overfitting.infinite_compute.optimizer import check_decay, decay_groups, warmup_then_cosine
from regularized.overfitting.infinite_compute.search import box
from regularized.training.optimizers import Optimizers
from regularized.training.progress import Progress


def tolerance(case: Case, output: str) -> float:
    """Fits were made by SciPy to its own tolerance; whole numbers and grid points are exact."""
    if case.has("in/x", "in/y"):
        return 1e-5
    return 0.0 if output in ("boxes", "total_steps") else 1e-10


def compute(case: Case) -> Mapping[str, NDArray[Any]]:
    """Outputs of a case, by the kind that its keys show.

    Raises:
        UnknownCase: the keys fit no kind.
    """
    if case.has("in/x", "in/y"):
        law = least_squares(*(torch.tensor(case.inputs[name]) for name in ("x", "y")))
        found: dict[str, Any] = {"params": list(law), "asymptote": law.asymptote}
        if "inverse_at_y0" in case.outputs:
            found["inverse_at_y0"] = law.solve(float(case.inputs["y"][0]))
    elif case.has("in/logits", "in/labels"):
        logits, labels = torch.tensor(case.inputs["logits"]), torch.tensor(case.inputs["labels"])
        found = {
            "nll_prefix": prefix_losses(logits, labels).numpy(),
            "member_nll": [float(prefix_losses(member[None], labels)) for member in logits],
        }
    elif case.has("in/w0", "in/grads", "hp/lr", "hp/weight_decay", "hp/total_steps"):
        found = _optimizer(case)
    elif case.has("in/centers", "hp/grid_lr", "hp/grid_wd", "hp/grid_epochs"):
        grids = {axis: case.hp[f"grid_{axis}"].tolist() for axis in ("epochs", "lr", "wd")}
        centers = [dict(zip(grids, row, strict=True)) for row in case.inputs["centers"].tolist()]
        found = {"boxes": [[list(point.values()) for point in box(center, grids)] for center in centers]}
    elif case.has("in/teacher_weight", "hp/base_steps", "hp/epochs"):
        base, epochs = int(case.number("base_steps")), case.number("epochs")
        weights = np.atleast_1d(case.inputs["teacher_weight"]).tolist()
        steps = np.array([mixture_steps(base, epochs, weight) for weight in weights])
        found = {"total_steps": steps.reshape(case.inputs["teacher_weight"].shape)}
    else:
        raise UnknownCase(case)
    return {name: np.asarray(value) for name, value in found.items()}


def _optimizer(case: Case) -> dict[str, Any]:
    """Given gradients through the groups, the schedule and torch's AdamW, as a training takes them."""
    holder = nn.Module()
    weight = nn.Parameter(torch.tensor(case.inputs["w0"]))
    holder.register_parameter("weight", weight)
    adamw = torch.optim.AdamW(
        decay_groups(holder, case.number("weight_decay")),
        lr=case.number("lr"),
        betas=(case.number("beta1", 0.9), case.number("beta2", 0.95)),
        eps=case.number("eps", 1e-8),
    )
    check_decay(adamw)
    total = int(case.number("total_steps"))
    schedule = warmup_then_cosine(case.number("warmup_steps", 0) / total, case.number("min_lr_ratio", 0.0))
    optimizers = Optimizers([adamw], schedule=schedule)
    rates, weights = [], []
    for step, gradient in enumerate(torch.tensor(case.inputs["grads"])):
        weight.grad = gradient
        optimizers.step(progress=Progress(step, total))
        rates.append(adamw.param_groups[0]["lr"])
        weights.append(weight.detach().clone().numpy())
    return {"lr": rates, "w": np.stack(weights)}
