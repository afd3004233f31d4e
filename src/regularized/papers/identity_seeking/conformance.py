"""Golden vectors of matching and loss, made by slow NumPy: there is no training code of the authors."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from regularized.evidence.conformance import Case, UnknownCase
from regularized.self_supervised.identity_seeking.loss import InterFrameContrastive, inter_frame_contrast


def tolerance(case: Case, output: str) -> float:
    """1e-10; gradients are central differences."""
    return 1e-6 if output.startswith("grad_") else 1e-10


def compute(case: Case) -> Mapping[str, NDArray[Any]]:
    """One batch, of one video unless the case has groups."""
    if not case.has("in/feat_a", "in/feat_b"):
        raise UnknownCase(case)
    first, second = (torch.tensor(case.inputs[name], requires_grad=True) for name in ("feat_a", "feat_b"))
    groups = [torch.tensor(case.inputs[name]) if case.has(f"in/{name}") else None for name in ("group_a", "group_b")]
    tau = case.number("tau", 0.1)
    contrast = InterFrameContrastive(
        tau=tau,
        q=case.number("q", 1.0),
        min_similarity=case.number("min_similarity") if case.has("hp/min_similarity") else None,
        normalize_weights=bool(case.number("normalize_weights", 0.0)),
    )
    out = contrast(first, second, *groups)
    out.loss.backward()
    assert first.grad is not None
    assert second.grad is not None
    row, column = inter_frame_contrast(out.similarity.detach(), out.pairs, tau=tau).exp()
    found = {
        "sim": out.similarity.detach(),
        "pairs": out.pairs,
        "total_weight": out.similarity.detach()[out.pairs[:, 0], out.pairs[:, 1]].sum(),
        "p_row": row,
        "p_col": column,
        "loss": out.loss.detach(),
        "grad_a": first.grad,
        "grad_b": second.grad,
    }
    return {name: np.asarray(value) for name, value in found.items()}
