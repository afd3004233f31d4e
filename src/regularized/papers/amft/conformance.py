"""Golden vectors of the authors' classes: meta-gradients, the path of mu, and the clipped losses.

They normalise advantages over all tokens, padded ones too, and take divergence and clip fraction over all of them, the
latter in float32; mu begins as a float32. Their meta-gradient has the wrong sign: ours is turned round to compare with
it, and compared as it is with what is right.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from regularized.alignment.amft.controller import MetaWeightController
from regularized.alignment.amft.loss import (
    drift,
    imitation_loss,
    log_probs_and_entropy,
    masked_mean,
    normalised,
    policy_loss,
    value_loss,
)
from regularized.alignment.amft.meta_gradient import meta_gradient
from regularized.evidence.conformance import Case, UnknownCase

TOLERANCE = 1e-10


def compute(case: Case) -> Mapping[str, NDArray[Any]]:
    """What a case's keys ask for."""
    if case.has("in/val_ids", "in/val_labels", "in/embed"):
        return _meta(case)
    if case.has("in/meta_gradient", "in/entropy"):
        return _path(case)
    if case.has("in/logits", "in/actions", "in/log_probs_old"):
        return _losses(case)
    raise UnknownCase(case)


def _tensor(case: Case, name: str) -> Tensor:
    return torch.tensor(case.inputs[name])


def _meta(case: Case) -> Mapping[str, NDArray[Any]]:
    """A linear model on embeddings, whose labels are not shifted; gradients of both losses are given."""
    labels = _tensor(case, "val_labels")
    names = sorted(name.removeprefix("g_sft_") for name in case.inputs if name.startswith("g_sft_"))
    weights = {name: _tensor(case, name).requires_grad_() for name in names}
    every = {name: weights.get(name, _tensor(case, name)) for name in ("embed", "W", "b")}
    logits = F.embedding(_tensor(case, "val_ids"), every["embed"]) @ every["W"] + every["b"]
    loss = imitation_loss(logits, labels, labels != int(case.number("pad_id", 0)))
    held_out = torch.autograd.grad(loss, [weights[name] for name in names])
    sft, rl = ([_tensor(case, f"{kind}_{name}") for name in names] for kind in ("g_sft", "g_rl"))
    found = meta_gradient(held_out, sft, rl, lr=case.number("lr")).numpy()
    return {"meta_grad_correct": found, "meta_grad_official": -found}


def _path(case: Case) -> Mapping[str, NDArray[Any]]:
    controller = MetaWeightController(
        float(np.float32(case.number("initial_mu", 0.5))),
        meta_lr=case.number("meta_lr", 1e-4),
        entropy_lr=case.number("entropy_lr", 5e-4),
        bounds=(case.number("mu_min", 0.05), case.number("mu_max", 0.95)),
        normalize="none",
    )
    controller.set_target_entropy(case.number("target_entropy"))
    pairs = zip(case.inputs["meta_gradient"].tolist(), case.inputs["entropy"].tolist(), strict=True)
    return {"mu": np.array([controller.update(meta=meta, entropy=entropy).mu.item() for meta, entropy in pairs])}


def _losses(case: Case) -> Mapping[str, NDArray[Any]]:
    clip = case.number("clip", 0.2)
    logits = _tensor(case, "logits").requires_grad_()
    actions, old = _tensor(case, "actions"), _tensor(case, "log_probs_old")
    mask = _tensor(case, "attention_mask")[:, 1:] if case.has("in/attention_mask") else None
    log_probs, entropies = log_probs_and_entropy(logits[:, : actions.shape[1]], actions)
    entropy = masked_mean(entropies, mask)
    advantages = normalised(_tensor(case, "advantages"))
    rl = policy_loss(log_probs, old, advantages, mask, clip=clip) - case.number("entropy_coeff", 0.01) * entropy
    (gradient,) = torch.autograd.grad(rl, logits)
    gone = drift(log_probs.detach(), old, clip=clip)
    out = {
        "rl_loss": rl,
        "grad_logits": gradient,
        "policy_entropy": entropy,
        "kl_divergence": gone.kl,
        "clip_fraction": gone.clipped.float(),
        "advantages_mean": advantages.mean(),
    }
    if case.has("in/value", "in/values_old", "in/returns"):
        value, before, returns = (_tensor(case, name) for name in ("value", "values_old", "returns"))
        out["value_loss"] = case.number("value_coeff", 0.1) * value_loss(value, before, returns, clip=clip)
        out["returns_mean"] = returns.mean()
    return {name: tensor.detach().numpy() for name, tensor in out.items()}
