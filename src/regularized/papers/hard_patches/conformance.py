"""Golden vectors of Haochen-Wang409/HPM at c15ae90: both losses of the predictor, the pixels' loss, and the masks."""

from collections.abc import Mapping
from typing import Any

import torch
from numpy.typing import NDArray

from regularized.evidence.conformance import Case, UnknownCase
from regularized.mechanisms.patches import patch_vectors, split_of, take
from regularized.self_supervised.hard_patches.loss import (
    absolute_loss,
    reconstruction_losses,
    relative_loss,
    standardised_patches,
)
from regularized.self_supervised.hard_patches.masking import hard_patch_split
from regularized.self_supervised.hard_patches.mining import EASY_TO_HARD
from regularized.training.progress import Progress

DRAWS = 2000
"""Masks that are drawn of each image: their frequencies are then nearer to the truth than those of the file's 200."""


def tolerance(case: Case, output: str) -> float:
    """Masks are counted exactly, frequencies are those of 200 draws, the rest is double precision."""
    return {"freq_masked": 0.15, "num_masked": 0.0, "always_masked": 0.0, "one_mask": 0.0}.get(output, 1e-10)


def compute(case: Case) -> Mapping[str, NDArray[Any]]:
    """Outputs of a case, by the kind that its keys show.

    Raises:
        UnknownCase: the keys fit neither a loss nor a mask.
    """
    if case.has("in/loss_pred", "in/loss_target"):
        return _ranking(case)
    if case.has("in/imgs", "in/pred", "in/mask", "hp/patch_size"):
        return _pixels(case)
    if case.has("in/loss_pred", "hp/mask_ratio"):
        return _masks(case)
    raise UnknownCase(case)


def _ranking(case: Case) -> Mapping[str, NDArray[Any]]:
    predicted = torch.tensor(case.inputs["loss_pred"]).requires_grad_()
    target = torch.tensor(case.inputs["loss_target"])
    if case.number("relative", 1):
        loss = relative_loss(predicted, target, eps=case.number("eps", 1e-6))
    else:
        loss = absolute_loss(predicted, target)
    (gradient,) = torch.autograd.grad(loss, predicted)
    return {"loss": loss.detach().numpy(), "grad": gradient.numpy()}


def _pixels(case: Case) -> Mapping[str, NDArray[Any]]:
    split = split_of(torch.tensor(case.inputs["mask"]).bool())
    target = take(patch_vectors(torch.tensor(case.inputs["imgs"]), int(case.number("patch_size"))), split.hidden)
    if case.number("norm_pix_loss", 0):
        target = standardised_patches(target)
    losses = reconstruction_losses(torch.tensor(case.inputs["pred"]), target)
    return {"matrix": losses.numpy(), "mean": losses.mean().numpy()}


def _masks(case: Case) -> Mapping[str, NDArray[Any]]:
    """Counts and frequencies of many draws, and whether the file's example is one that ours can give."""
    scores = torch.tensor(case.inputs["loss_pred"])
    progress = Progress(0, 1, epoch=int(case.number("epoch", 0)), total_epochs=int(case.number("total_epoch", 1)))
    hard = EASY_TO_HARD(progress) if case.number("guide", 1) else 0.5
    generator = torch.Generator().manual_seed(0)
    split = hard_patch_split(
        scores.repeat(DRAWS, 1), mask_ratio=case.number("mask_ratio", 0.75), hard=hard, generator=generator
    )
    masks = split.mask.view(DRAWS, *scores.shape)
    computed = {
        "num_masked": masks[0].sum(dim=1).numpy(),
        "always_masked": masks.all(dim=0).numpy(),
        "freq_masked": masks.double().mean(dim=0).numpy(),
    }
    if case.has("out/one_mask"):
        # Another generator drew it. It is possible where it hides as many, and what all of ours hide.
        example = torch.tensor(case.outputs["one_mask"]).bool()
        possible = (example.sum(dim=1) == masks[0].sum(dim=1)) & (example | ~masks.all(dim=0)).all(dim=1)
        computed["one_mask"] = torch.where(possible[:, None], example, masks[0]).numpy()
    return computed
