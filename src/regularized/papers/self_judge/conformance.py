"""Golden vectors of Self-Judge: the authors' loss and scorer at f0d596c."""

from collections.abc import Mapping
from typing import Any

import torch
from numpy.typing import NDArray

from regularized.alignment.self_judge.grades import expected_score
from regularized.alignment.self_judge.loss import PrivilegedDistillation
from regularized.evidence.conformance import Case, UnknownCase

TOLERANCE = 1e-10


def compute(case: Case) -> Mapping[str, NDArray[Any]]:
    """The loss with its gradients by both views, or the expected grade of log-probabilities."""
    if case.has("in/logits_ref", "in/logits_noref"):
        return _loss(case)
    if case.has("in/logprobs"):
        log_p = torch.tensor(case.inputs["logprobs"])
        columns = case.hp["digit_columns"].tolist() if case.has("hp/digit_columns") else list(range(10))
        top_k = int(case.number("top_k", log_p.shape[-1]))
        return {"score": expected_score(log_p, columns, values=range(len(columns)), top_k=top_k).numpy()}
    raise UnknownCase(case)


def _loss(case: Case) -> Mapping[str, NDArray[Any]]:
    criterion = PrivilegedDistillation(
        alpha=case.number("alpha", 0.3),
        alpha_kd=case.number("alpha_kd", 2.0),
        eos_id=int(case.number("eos_id", 2)),
        ignore_index=int(case.number("ignore_index", -100)),
    )
    z = [torch.tensor(case.inputs[f"logits_{view}"]).requires_grad_() for view in ("ref", "noref")]
    labels = [torch.tensor(case.inputs[f"labels_{view}"]) for view in ("ref", "noref")]
    loss = criterion(*z, *labels)
    by_ref, by_noref = torch.autograd.grad(loss, z, materialize_grads=True)
    return {
        "loss": loss.detach().numpy(),
        "grad_logits_ref": by_ref.numpy(),
        "grad_logits_noref": by_noref.numpy(),
    }
