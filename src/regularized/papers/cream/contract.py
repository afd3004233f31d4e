"""What the contract suite checks of CREAM: two rounds of a small model, by its own rewards and by a noisy judge."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from regularized.alignment.cream.pairs import Label
from regularized.alignment.cream.procedure import CREAM
from regularized.alignment.cream.rewards import SyntheticJudge
from regularized.alignment.sampling import Responses, sample_responses
from regularized.evidence.contract import ProcedureSubject
from regularized.evidence.language_models import small_lm
from regularized.training.randomness import mix

_TOKENS = 8


def _model(seed: int) -> torch.nn.Module:
    return small_lm(seed, _TOKENS, width=16, layers=1, heads=2)


def small_loop(consistency: Label = "mean", **options: Any) -> CREAM:
    """Random models of eight tokens; answers of up to four."""
    return CREAM(
        _model(1),
        _model(0),
        sample=partial(sample_responses, count=4, max_new_tokens=4, end=_TOKENS - 1, temperature=1.0),
        optimizer=partial(torch.optim.AdamW, lr=3e-3, weight_decay=0.01),
        consistency=consistency,
        batch_size=4,
        **options,
    )


def _train(cream: CREAM, rounds: int) -> None:
    for _ in range(rounds):
        draws = torch.Generator().manual_seed(mix(0, cream.round) % 2**31)
        cream.run_round([torch.randint(_TOKENS, (3,), generator=draws) for _ in range(16)])


def _weights(cream: CREAM) -> Mapping[str, Tensor]:
    return cream.policy.state_dict()


def _lengths(responses: Responses) -> Tensor:
    return responses.lengths.float()


def subjects() -> list[ProcedureSubject]:
    """Plain is the same loop with the label 1: self-rewarding, or DPO on a judge's pairs."""
    judged = partial(small_loop, judge=SyntheticJudge(_lengths, noise=3.0))
    return [
        ProcedureSubject("own rewards", small_loop, partial(small_loop, 1.0), _train, _weights),
        ProcedureSubject(
            "a judge, labels of each pair", partial(judged, "each"), partial(judged, 1.0), _train, _weights
        ),
    ]
