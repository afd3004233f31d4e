"""Golden vectors of the authors' functions: log-probabilities and losses of a batch, and the consistency script."""

from collections.abc import Mapping
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from regularized.alignment.cream.consistency import Agreement, rank_consistency
from regularized.alignment.cream.loss import ConsistencyDPOLoss
from regularized.alignment.sequence_log_probs import sequence_log_probs
from regularized.evidence.conformance import Case, UnknownCase

TOLERANCE = 1e-10


def compute(case: Case) -> Mapping[str, NDArray[Any]]:
    """What a case's keys ask for.

    Raises:
        UnknownCase: the keys fit neither a batch of pairs nor rewards of two models.
    """
    if case.has("in/logits", "in/labels", "in/ref_pos", "in/ref_neg"):
        return _batch(case)
    if case.has("in/reward_now", "in/reward_prev"):
        return _rankings(case)
    raise UnknownCase(case)


def _tensor(case: Case, name: str) -> Tensor:
    return torch.tensor(case.inputs[name])


def _batch(case: Case) -> Mapping[str, NDArray[Any]]:
    """Chosen rows first. Labels are the tokens, with the padding id where nothing is scored, the first one included."""
    logits, labels = _tensor(case, "logits").requires_grad_(), _tensor(case, "labels")
    scored = labels != int(case.number("pad_id", 0))
    scored[:, 0] = False  # it has no prediction
    log_probs = sequence_log_probs(logits, labels, scored)
    mean = sequence_log_probs(logits, labels, scored, reduction="mean")
    out = {"logp": log_probs.detach().numpy(), "logp_mean": mean.detach().numpy()}
    chosen, rejected = log_probs.chunk(2)
    loss = ConsistencyDPOLoss(beta=case.number("beta", 0.1))
    reference = _tensor(case, "ref_pos"), _tensor(case, "ref_neg")
    labels_of_kind: dict[str, Tensor | float] = {"dpo": 1.0}
    if case.has("in/consistency"):
        labels_of_kind["cream"] = _tensor(case, "consistency")
    for kind, consistency in labels_of_kind.items():
        value = loss(chosen, rejected, *reference, consistency=consistency)
        (gradient,) = torch.autograd.grad(value, logits, retain_graph=True)
        out |= {f"{kind}_loss": value.detach().numpy(), f"{kind}_grad_logits": gradient.numpy()}
    return out


def _rankings(case: Case) -> Mapping[str, NDArray[Any]]:
    now, before = _tensor(case, "reward_now"), _tensor(case, "reward_prev")
    methods: tuple[Agreement, ...] = ("kendall", "spearman")
    out = {
        f"consistency_{method}": rank_consistency(now, before, method=method, ties="ordinal").numpy()
        for method in methods
    }
    return {**out, "chosen": now.argmax(dim=1).numpy(), "rejected": now.argmin(dim=1).numpy()}
