"""From rewards of responses to preference pairs with a soft label."""

import warnings
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from regularized.alignment.cream.consistency import Agreement, Ties, rank_consistency
from regularized.alignment.cream.loss import check_consistency
from regularized.alignment.sampling import Responses
from regularized.mechanisms.ranges import share

__all__ = ["Label", "PreferencePairs", "build_preference_pairs"]

Label: TypeAlias = Literal["mean", "each"] | float
"""What C of a pair is: the mean agreement of all pairs (the paper's main form), that of its own prompt, or a number."""


@dataclass(frozen=True, slots=True, eq=False)
class PreferencePairs:
    """K pairs of a chosen and a rejected response to the same prompt.

    Args:
        tokens: (K, 2, T) ids, the chosen response first, from position 0 on and padded on the right.
        mask: (K, 2, T) bool, the tokens of the responses.
        prompt: (K,) number of the prompt.
        place: (K, 2) number of each response among those to its prompt.
        agreement: (K,) agreement of both rankings of the prompt's responses.
        consistency: (K,) C, the soft label.
        dropped: prompts that gave no pair.
    """

    tokens: Tensor
    mask: Tensor
    prompt: Tensor
    place: Tensor
    agreement: Tensor
    consistency: Tensor
    dropped: int

    def __len__(self) -> int:
        """K."""
        return len(self.tokens)

    def of(self, values: Tensor) -> Tensor:
        """(K, 2) of (P, N) values, those of the pairs' responses: log-probabilities, or whether they are right."""
        return values[self.prompt[:, None], self.place]

    def state_dict(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        return asdict(self)


def build_preference_pairs(
    responses: Responses,
    now: Tensor,
    before: Tensor,
    *,
    consistency: Label = "mean",
    method: Agreement = "kendall",
    ties: Ties = "neither",
) -> PreferencePairs:
    """Best against worst response to each prompt, by the present rewards, and how far the earlier ones agree.

    A prompt whose best and worst response are the same (equal tokens, or equal rewards of all) gives no pair. Every
    agreement stays with its own prompt; the authors' code moves them on by one at each such prompt. The mean is over
    the pairs that are left, as there.

    Args:
        responses: N to each of P prompts.
        now: (P, N) rewards by the model of this round.
        before: (P, N) rewards by the model of the round before.
        consistency: C of the pairs: ``"mean"`` of all agreements (default, the paper's main form), that of ``"each"``
            prompt, or a number in [0, 1]: 1 is plain self-rewarding, and less is DPO with constant label smoothing.
        method: how agreement is measured, see :func:`~regularized.alignment.cream.rank_consistency`.
        ties: what equal rewards count there.

    Returns:
        The pairs.

    Raises:
        ValueError: shapes do not fit, there is one response to each prompt, or no prompt gives a pair.

    Warns:
        UserWarning: both rewards are the same throughout, so the agreement is 1 and says nothing.

    Examples:
        >>> from regularized.alignment.sampling import pack_responses
        >>> a, b, c = (torch.tensor([k]) for k in (1, 2, 3))
        >>> answers = pack_responses([torch.tensor([9])] * 3, [[a, b, c], [b, b, b], [c, b, a]])
        >>> now = torch.tensor([[3.0, 2.0, 1.0], [1.0, 1.0, 1.0], [1.0, 2.0, 3.0]])
        >>> before = torch.tensor([[2.0, 3.0, 1.0], [1.0, 1.0, 1.0], [1.0, 2.0, 3.0]])
        >>> pairs = build_preference_pairs(answers, now, before)
        >>> pairs.place.tolist(), pairs.prompt.tolist(), pairs.dropped
        ([[0, 2], [2, 0]], [0, 2], 1)
        >>> pairs.agreement, pairs.consistency
        (tensor([0.6667, 1.0000]), tensor([0.8333, 0.8333]))
    """
    shape = tuple(responses.mask.shape[:2])
    if shape != tuple(now.shape) or shape != tuple(before.shape):
        raise ValueError(
            f"rewards must be (P, N) = {shape} as the responses are, by both models; got {tuple(now.shape)} and "
            f"{tuple(before.shape)}"
        )
    if shape[1] < 2:
        raise ValueError(f"{shape[1]} response to each prompt makes no pair; sample two or more (the paper has 5)")
    chosen, rejected = now.argmax(dim=1), now.argmin(dim=1)
    first = responses.first_identical()
    prompts = torch.arange(shape[0], device=now.device)
    kept = (chosen != rejected) & (first[prompts, chosen] != first[prompts, rejected])
    dropped = int((~kept).sum())
    if dropped == shape[0]:
        raise ValueError(
            f"none of the {dropped} prompts gives a pair: all its responses are identical, or have the same reward. "
            "Sample more responses, or at a higher temperature"
        )
    if torch.equal(now, before):
        warnings.warn(
            "both models give the same rewards throughout, so they agree completely and training is plain "
            "self-rewarding; is the model of the round before the same as the present one?",
            stacklevel=2,
        )
    prompt = prompts[kept]
    place = torch.stack([chosen, rejected], dim=1)[prompt]
    agreement = rank_consistency(now[prompt], before[prompt], method=method, ties=ties)
    return PreferencePairs(
        tokens=responses.tokens[prompt[:, None], place],
        mask=responses.mask[prompt[:, None], place],
        prompt=prompt,
        place=place,
        agreement=agreement,
        consistency=_labels(agreement, consistency),
        dropped=dropped,
    )


def _labels(agreement: Tensor, consistency: Label) -> Tensor:
    check_consistency(agreement)
    if consistency == "mean":
        return agreement.mean().expand_as(agreement).clone()
    if consistency == "each":
        return agreement.clone()
    if isinstance(consistency, str):
        raise ValueError(f"consistency must be 'mean', 'each', or a number in [0, 1]; got {consistency!r}")
    share("1 is plain self-rewarding")("consistency", consistency)
    return torch.full_like(agreement, consistency)
