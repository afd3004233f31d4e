"""Golden vectors of the authors' code at 60f3c07 against the public API."""

import re

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from regularized.evidence.conformance import Case, UnknownCase
from regularized.fine_tuning.sae_regularization.autoencoder import SparseCodes, TopKSAE, normalized_error
from regularized.fine_tuning.sae_regularization.penalty import SelfReg

TOLERANCE = 1e-9
"""The sheet's: relative, double precision."""

Outputs = dict[str, NDArray[np.float64]]


def compute(case: Case) -> Outputs:
    """Outputs of a case, by the kind that its keys show.

    Raises:
        UnknownCase: neither an autoencoder, nor its fine-tuning, nor a classifier with its mask.
    """
    if case.has("in/W_enc", "in/hidden", "in/clf_weight", "in/mask"):
        return _classifier(case)
    if case.has("in/dead_mask"):
        return _fine_tuning(case, case if case.has("in/W_enc", "in/hidden") else _autoencoder_of(case))
    if case.has("in/W_enc", "in/hidden", "hp/topk"):
        return _autoencoder(case)
    raise UnknownCase(case)


def _sae(case: Case) -> TopKSAE:
    """Trainable, in double precision; a bias that is not there is zero."""
    given = {name: torch.tensor(array) for name, array in case.inputs.items()}
    return TopKSAE.from_tensors(
        given["W_enc"].T,
        encoder_bias=given.get("b_enc"),
        decoder=given.get("W_dec"),
        decoder_bias=given.get("b_dec"),
        k=int(case.number("topk")),
    ).requires_grad_(True)


def _autoencoder(case: Case) -> Outputs:
    sae, x = _sae(case), torch.tensor(case.inputs["hidden"])
    codes, reconstruction = sae.encode(x), sae(x)
    loss = sae.loss(x)
    loss.backward()
    return _arrays(
        activations=codes,
        recon=reconstruction,
        nmse=normalized_error(reconstruction, x).mean(),
        loss=loss,
        l0=(codes != 0).sum(dim=1).double().mean(),
        grad_W_enc=_gradient(sae.encoder).T,
        grad_b_enc=_gradient(sae.encoder_bias),
        grad_b_dec=_gradient(sae.decoder_bias),
    )


def _fine_tuning(case: Case, autoencoder: Case) -> Outputs:
    sae, x = _sae(autoencoder), torch.tensor(autoencoder.inputs["hidden"])
    dead = torch.tensor(case.inputs["dead_mask"]).bool()
    loss = sae.fine_tuning_loss(x, dead, dead_weight=case.number("dead_weight", 0.1), compat=True)
    loss.backward()
    parts = [sae.top_preactivations(x, among=mask, compat=True) for mask in (~dead, dead)]
    both = SparseCodes(
        torch.cat([p.values for p in parts], dim=1).relu(), torch.cat([p.features for p in parts], dim=1)
    )
    return _arrays(
        loss=loss,
        nmse_all=normalized_error(sae.decode(both), x).mean(),
        grad_W_enc=_gradient(sae.encoder).T,
        grad_b_enc=_gradient(sae.encoder_bias),
        grad_b_dec=_gradient(sae.decoder_bias),
    )


def _autoencoder_of(case: Case) -> Case:
    """The autoencoder of a case that holds a dead mask alone: one of the file whose shapes fit.

    Where several fit, it is the one that the file gives the same number: the file says so in no other way.

    Raises:
        UnknownCase: none fits, or several do and none has the number.
    """

    def fits(other: Case) -> bool:
        if not other.has("in/W_enc", "in/hidden", "hp/topk") or other.has("in/clf_weight"):
            return False
        shape = other.inputs["W_enc"].shape
        return shape[1:] == case.inputs["dead_mask"].shape and (
            "grad_W_enc" not in case.outputs or case.outputs["grad_W_enc"].shape == shape
        )

    fitting = [other for other in case.others.values() if fits(other)]
    if len(fitting) > 1:
        fitting = [other for other in fitting if re.findall(r"\d+", other.name) == re.findall(r"\d+", case.name)]
    if len(fitting) != 1:
        raise UnknownCase(case)
    return fitting[0]


def _classifier(case: Case) -> Outputs:
    given = {name: torch.tensor(array) for name, array in case.inputs.items()}
    sae = TopKSAE.from_tensors(
        given["W_enc"].T,
        encoder_bias=given.get("b_enc"),
        decoder=given.get("W_dec"),
        decoder_bias=given.get("b_dec"),
        k=int(case.number("topk", 1)),
    )
    mask = given["mask"] == 1
    reg = SelfReg(sae, mask, strength=case.number("penalty"), compat=True)
    weight = given["clf_weight"].requires_grad_()
    bias = given.get("clf_bias", torch.zeros(len(weight), dtype=weight.dtype)).requires_grad_()
    penalty = reg(weight)
    (of_penalty,) = torch.autograd.grad(penalty, weight)
    clean = reg.clean(given["hidden"])
    logits = F.linear(clean, weight, bias).squeeze(-1)
    loss = F.binary_cross_entropy_with_logits(logits, given["labels"].to(logits.dtype).reshape(logits.shape))
    loss = loss + reg(weight)
    of_weight, of_bias = torch.autograd.grad(loss, (weight, bias))
    activations = torch.zeros(len(clean), len(mask), dtype=clean.dtype)
    activations[:, mask] = reg.removal.activations(given["hidden"])
    return _arrays(
        hidden_clean=clean,
        unintended_act=activations,
        reg=penalty,
        reg_grad_weight=of_penalty,
        loss=loss,
        loss_grad_weight=of_weight,
        loss_grad_bias=of_bias,
    )


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _arrays(**tensors: Tensor) -> Outputs:
    return {name: tensor.detach().double().numpy() for name, tensor in tensors.items()}
