"""Golden vectors of PS-KD, made by the official code (lgcnsai/PS-KD-Pytorch at 9aa0828)."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from regularized.evidence.conformance import Case, UnknownCase
from regularized.mechanisms.calibration import (
    area_under_risk_coverage,
    excess_area_under_risk_coverage,
    expected_calibration_error,
)
from regularized.mechanisms.prediction_store import DenseStore
from regularized.overfitting.ps_kd import ProgressiveDistillationLoss, progressive_loss, progressive_targets

TOLERANCE = 1e-12


def tolerance(case: Case, output: str) -> float:
    """1e-10 after many steps of training, 1e-12 for formulas."""
    return 1e-10 if case.has("in/order") else TOLERANCE


def compute(case: Case) -> Mapping[str, NDArray[Any]]:
    """The loss of given past predictions; whole trainings; or the calibration metrics."""
    if case.has("in/logits", "in/labels", "in/past_probs", "hp/alpha_t"):
        return _loss(case)
    if case.has("in/X", "in/labels", "in/W0", "in/order", "hp/alpha_T", "hp/batch_size", "hp/lr"):
        return _training(case)
    if case.has("in/probs", "in/labels"):
        return _metrics(case)
    raise UnknownCase(case)


def _tensor(case: Case, name: str) -> Tensor:
    array = case.inputs[name]
    return torch.tensor(array, dtype=torch.float64 if array.dtype.kind == "f" else torch.int64)


def _loss(case: Case) -> Mapping[str, NDArray[Any]]:
    logits, labels, past = (_tensor(case, name) for name in ("logits", "labels", "past_probs"))
    alpha = case.number("alpha_t")
    logits.requires_grad_()
    loss = progressive_loss(logits.log_softmax(dim=1), labels, past, alpha)
    (grad,) = torch.autograd.grad(loss, logits)
    targets = progressive_targets(labels, past, alpha)
    return {"soft_targets": targets.numpy(), "loss": loss.detach().numpy(), "grad_logits": grad.numpy()}


def _training(case: Case) -> Mapping[str, NDArray[Any]]:
    x, labels, order = (_tensor(case, name) for name in ("X", "labels", "order"))
    weight = _tensor(case, "W0")
    model = nn.Linear(weight.shape[1], weight.shape[0], bias=case.has("in/b0"), dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(weight)
        if model.bias is not None:
            model.bias.copy_(_tensor(case, "b0"))
    criterion = ProgressiveDistillationLoss(
        len(x),
        len(weight),
        epochs=int(case.number("epochs", len(order))),
        alpha=case.number("alpha_T"),
        store=DenseStore(len(x), len(weight), torch.float64),
    )
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=case.number("lr"),
        momentum=case.number("momentum", 0.0),
        nesterov=bool(case.number("nesterov", 0.0)),
        weight_decay=case.number("weight_decay", 0.0),
    )
    out: dict[str, list[Any]] = {name: [] for name in ("alpha", "history", "W", "b", "batch_loss")}
    for epoch, indices in enumerate(order):
        criterion.set_epoch(epoch)
        losses = []
        for index in indices.split(int(case.number("batch_size"))):
            loss = criterion(model(x[index]), labels[index], index)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        out["alpha"].append(criterion.current_alpha)
        out["history"].append(criterion.store.read(torch.arange(len(x))).numpy())
        out["W"].append(model.weight.detach().numpy().copy())
        if model.bias is not None:
            out["b"].append(model.bias.detach().numpy().copy())
        out["batch_loss"].append(losses)
    return {name: np.array(values) for name, values in out.items()}


def _metrics(case: Case) -> Mapping[str, NDArray[Any]]:
    # The official code prints per cent and areas times 1000, and builds its bins by adding up their size.
    probabilities, labels = _tensor(case, "probs"), _tensor(case, "labels")
    size = case.number("bin_size", 0.1)
    bins = np.arange(size, 1 + size, size).tolist()
    return {
        "ece_percent": 100 * expected_calibration_error(probabilities, labels, bins=bins).numpy(),
        "aurc_x1000": 1000 * area_under_risk_coverage(probabilities, labels).numpy(),
        "eaurc_x1000": 1000 * excess_area_under_risk_coverage(probabilities, labels).numpy(),
    }
