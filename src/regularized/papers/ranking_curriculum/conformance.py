"""Golden vectors of Georgetown-IR-Lab/OpenNIR at 8cfcb7b against the public API."""

import math
from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from regularized.curriculum.ranking_curriculum.first_stage import (
    FirstStageRun,
    kde_score,
    normalised_score,
    reciprocal_rank,
)
from regularized.curriculum.ranking_curriculum.loss import (
    DifficultyWeightedLoss,
    RankingCurriculum,
    pairwise_difficulty,
    pointwise_difficulty,
)
from regularized.curriculum.ranking_curriculum.reranker_losses import (
    pairwise_cross_entropy_loss,
    pairwise_hinge_loss,
    pairwise_softmax_loss,
    pointwise_cross_entropy_loss,
    two_output_pairwise_loss,
)
from regularized.evidence.conformance import Case, UnknownCase
from regularized.mechanisms.sample_weights import Aggregate

Outputs = dict[str, NDArray[np.float64]]
TOLERANCE = 1e-12
"""The sheet's: relative, double precision."""

SINGLE = 2e-7
"""Where the official code casts ranks (always) or normalised scores (pointwise) to single precision; of the sheet."""

SMOOTHING = 1e-8
"""What the official code adds to the difficulty value."""

_COLUMNS: Mapping[str, str] = {"reciprank": "rank", "normscore": "normscore", "kdescore": "kdescore"}


def tolerance(case: Case, output: str) -> float:
    """Relative tolerance of an output of a case."""
    curriculum = case.text("curriculum")
    single = curriculum == "reciprank" or (curriculum == "normscore" and case.text("mode") == "pointwise")
    return SINGLE if single and output in ("loss", "grad_scores") else TOLERANCE


def compute(case: Case) -> Outputs:
    """Outputs of a case, by the keys that it has.

    Raises:
        UnknownCase: neither heuristics, nor a batch of pairs, nor one of single documents, or an unknown loss.
    """
    if case.has("in/query_scores"):
        return _heuristics(case)
    if case.has("in/scores") and case.text("mode") == "pairwise":
        return _pairwise(case)
    if case.has("in/scores", "in/relscore"):
        return _pointwise(case)
    raise UnknownCase(case)


def _heuristics(case: Case) -> Outputs:
    """Easiness by each heuristic: of the listed documents by rank, of others too by score."""
    listed = case.inputs["scores"].tolist()
    run = FirstStageRun.from_scores({"query": {str(i): score for i, score in enumerate(listed)}})
    ranks = torch.tensor([run.ranks["query"][str(i)] for i in range(len(listed))])
    scores, of = torch.tensor(case.inputs["query_scores"]), torch.tensor(case.inputs["scores"])
    return {
        "kde_cdf": kde_score(scores, of=of).numpy(),
        "norm": normalised_score(scores, of=of).numpy(),
        "rank": ranks.numpy(),
        "recip_rank": reciprocal_rank(ranks).numpy(),
    }


def _pairwise(case: Case) -> Outputs:
    """A batch of a relevant document and one or more others each."""
    losses: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "softmax": pairwise_softmax_loss,
        "cross_entropy": pairwise_cross_entropy_loss,
        "hinge": partial(pairwise_hinge_loss, margin=case.number("margin", 0.0)),
        # The official code looks at the first of several negatives alone.
        "nogueira_cross_entropy": lambda positive, negative: two_output_pairwise_loss(positive, negative[:, 0]),
    }
    if case.text("lossfn") not in losses:
        raise UnknownCase(case)
    scores = torch.tensor(case.inputs["scores"], requires_grad=True)
    # As the official trainer: at the end of the curriculum 0 (or below), the weights of the start stay forever.
    curriculum = _curriculum(case, without_end=True)
    if case.has("in/easy_pos", "in/easy_neg"):
        easy = torch.tensor(case.inputs["easy_pos"]), torch.tensor(case.inputs["easy_neg"])
    else:
        column = _easiness(case)
        easy = column[:, 0], column[:, 1:]
    difficulty = pairwise_difficulty(*easy, anti=bool(case.number("anti", 0)))
    loss = losses[case.text("lossfn")]
    return _batch(case, loss, scores, (scores[:, 0], scores[:, 1:]), difficulty, curriculum)


def _pointwise(case: Case) -> Outputs:
    """A batch of single documents with labels."""
    losses: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "mse": nn.MSELoss(reduction="none"),
        "l1": nn.L1Loss(reduction="none"),
        "smoothl1": nn.SmoothL1Loss(reduction="none"),
        "cross_entropy": lambda p, y: nn.functional.binary_cross_entropy(p, (y > 0).to(p), reduction="none"),
        "cross_entropy_logits": pointwise_cross_entropy_loss,
        "softmax": lambda z, y: torch.where(
            y > 0, pairwise_softmax_loss(z[:, 0], z[:, 1]), pairwise_softmax_loss(z[:, 1], z[:, 0])
        ),
    }
    if case.text("lossfn") not in losses:
        raise UnknownCase(case)
    labels = torch.tensor(case.inputs["relscore"])
    scores = torch.tensor(case.inputs["scores"], requires_grad=True)
    difficulty = pointwise_difficulty(_easiness(case), labels, anti=bool(case.number("anti", 0)))
    targets = labels.clamp(min=0)  # unjudged counts as 0
    outputs = scores if case.text("lossfn") in ("cross_entropy_logits", "softmax") else scores.flatten()
    curriculum = _curriculum(case, without_end=False)
    return _batch(case, losses[case.text("lossfn")], scores, (outputs, targets), difficulty, curriculum)


def _easiness(case: Case) -> Tensor:
    """The column of the case that its heuristic names."""
    name = _COLUMNS.get(case.text("curriculum"))
    if name is None or not case.has(f"in/{name}"):
        raise UnknownCase(case)
    column = torch.tensor(case.inputs[name])
    return reciprocal_rank(column) if name == "rank" else column.double()


def _curriculum(case: Case, *, without_end: bool) -> RankingCurriculum:
    end = case.number("eoc_epoch")
    if end <= 0:
        end = math.inf if without_end else 0
    official = case.text("aggregate", "mean_times_mean") == "mean_times_mean"
    curriculum = RankingCurriculum(end, smoothing=SMOOTHING if official else 0.0)
    curriculum.set_epoch(case.number("epoch"))
    return curriculum


def _batch(
    case: Case,
    loss: Callable[[Tensor, Tensor], Tensor],
    scores: Tensor,
    arguments: tuple[Tensor, Tensor],
    difficulty: Tensor,
    curriculum: RankingCurriculum,
) -> Outputs:
    forms: dict[str, Aggregate] = {"mean_times_mean": "batch_mean", "per_sample_numpy": "per_sample"}
    form = case.text("aggregate", "mean_times_mean")
    if form not in forms:
        raise UnknownCase(case)
    value = DifficultyWeightedLoss(loss, curriculum, aggregate=forms[form])(*arguments, difficulty)
    (gradient,) = torch.autograd.grad(value, scores)
    return {
        "loss": value.detach().numpy(),
        "grad_scores": gradient.numpy(),
        "difficulty": difficulty.numpy(),
        "weight": curriculum(difficulty).numpy(),
    }
