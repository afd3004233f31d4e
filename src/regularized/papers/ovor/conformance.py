"""Golden vectors of OVOR: the released loss, outliers, attention with prompts, and learning rates."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from regularized.continual.ovor.layer import PrefixAttention
from regularized.continual.ovor.loss import energy, outlier_loss
from regularized.continual.ovor.neighbours import kth_squared_distance, unit
from regularized.continual.ovor.outliers import boundary_outliers, boundary_points, official_outliers
from regularized.continual.ovor.schedule import epoch_cosine
from regularized.evidence.conformance import Case, UnknownCase
from regularized.training.progress import Progress

TOLERANCE = 1e-12


def compute(case: Case) -> Mapping[str, NDArray[Any]]:
    """What a case's keys ask for: the regulariser, outliers, attentions, or learning rates."""
    if case.has("in/id_logits", "in/ood_logits"):
        return _loss(case)
    if case.has("in/features", "in/offsets"):
        return _outliers(case)
    if case.has("in/x", "hp/heads"):
        return _attentions(case)
    if case.has("hp/epochs", "hp/base_lr"):
        epochs = int(case.number("epochs", 1))
        factor = epoch_cosine(epochs)
        rates = [case.number("base_lr", 1e-3) * factor(Progress(0, 1, epoch, epochs)) for epoch in range(epochs)]
        return {"lr": np.asarray(rates)}
    raise UnknownCase(case)


def tolerance(case: Case, output: str) -> float:
    """The released search for neighbours is in float32, everything else in float64."""
    return 1e-5 if case.has("in/features") else TOLERANCE


def _tensor(case: Case, name: str) -> Tensor:
    return torch.tensor(case.inputs[name])


def _loss(case: Case) -> Mapping[str, NDArray[Any]]:
    id_logits, ood_logits = (_tensor(case, name).requires_grad_() for name in ("id_logits", "ood_logits"))
    loss = case.number("lmda", 0.1) * outlier_loss(
        id_logits,
        ood_logits,
        tau_id=case.number("thres_id", -15.0),
        tau_ood=case.number("thres_ood", -3.0),
        huber=bool(case.number("huber", 1.0)),
    )
    grad_id, grad_ood = torch.autograd.grad(loss, (id_logits, ood_logits))
    return {
        "loss": loss.detach().numpy(),
        "id_score_mean": energy(id_logits).mean().detach().numpy(),
        "ood_score_mean": energy(ood_logits).mean().detach().numpy(),
        "grad_id": grad_id.numpy(),
        "grad_ood": grad_ood.numpy(),
    }


def _outliers(case: Case) -> Mapping[str, NDArray[Any]]:
    features, k, select = _tensor(case, "features"), int(case.number("K", 50)), int(case.number("select", 50))
    noises = case.number("cov", 0.1) * _tensor(case, "offsets")
    keep = int(case.number("num_per_class", 40)) * int(case.number("num_classes", 1))
    points, boundary = unit(features), boundary_points(features, k=k, select=select)
    normalised = boundary_outliers(features, boundary, noises, k=k, keep=keep)
    candidates = (features[boundary][:, None] + noises).flatten(0, 1)
    found = boundary.sort().values.numpy()
    expected = case.outputs.get("boundary_index", found)
    return {
        "kth_sq_distance": kth_squared_distance(points, points, k).numpy(),
        # Compared as a set: the smallest of ours where the smallest of theirs stands, and so on.
        "boundary_index": found[np.argsort(np.argsort(expected))] if len(expected) == len(found) else found,
        "outliers_shipped": official_outliers(features, noises, k=k, select=select, keep=keep).numpy(),
        "outliers_boundary_plus_noise": boundary_outliers(
            features, boundary, noises, k=k, keep=keep, normalise=False
        ).numpy(),
        "outliers_boundary_normalised": normalised.numpy(),
        "outliers_boundary_normalised_index": torch.cdist(normalised, candidates).argmin(dim=1).numpy(),
    }


class _Attention(nn.Module):
    """The parts by which a timm attention is known."""

    def __init__(self, dim: int, heads: int, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.num_heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias="qkv.bias" in weights, dtype=torch.float64)
        self.proj = nn.Linear(dim, dim, dtype=torch.float64)
        self.load_state_dict(weights)


def _attentions(case: Case) -> Mapping[str, NDArray[Any]]:
    """One attention at each layer; a layer without a prompt is one with an empty prompt."""
    weights = {n.removeprefix("attn/"): _tensor(case, n) for n in case.inputs if n.startswith("attn/")}
    attention = _Attention(int(case.number("embed")), int(case.number("heads")), weights)
    prompts = {int(n.rpartition("_")[2]): _tensor(case, n) for n in case.inputs if n.startswith("prompt/")}
    x, out = _tensor(case, "x"), {}
    for name in case.outputs:
        layer = int(name.removeprefix("attn_layer"))
        prompt = prompts.get(layer, x.new_empty(0, x.shape[-1]))
        with torch.no_grad():
            out[name] = PrefixAttention(attention, nn.Parameter(prompt))(x).numpy()
    return out
