"""How far two rankings of the same responses agree, in [0, 1]: what a pair's soft label is made of."""

from typing import Literal, TypeAlias

import torch
from torch import Tensor

__all__ = ["Agreement", "Ties", "rank_consistency"]

Agreement: TypeAlias = Literal["kendall", "spearman", "top_order"]
Ties: TypeAlias = Literal["neither", "ordinal"]


def rank_consistency(now: Tensor, before: Tensor, *, method: Agreement = "kendall", ties: Ties = "neither") -> Tensor:
    """Agreement of two rewards of the same responses: 1 the same order, 0 the reversed one, 1/2 unrelated.

    Args:
        now: (P, N) rewards of N >= 2 responses to each of P prompts, by one model.
        before: (P, N) rewards by the other.
        method: ``"kendall"`` (default, the paper's): of all pairs of responses, the share that both order alike;
            ``"spearman"``, the correlation of ranks, brought to [0, 1]; ``"top_order"``, whether best and worst
            response are the same, 0 or 1.
        ties: what two equal rewards count. ``"neither"`` (default): half, as pairs that agree by chance (Kendall's
            tau-a; mean ranks for Spearman's). ``"ordinal"``: by the position of the responses, as in the authors' code,
            where ties of both models agree.

    Returns:
        (P,) in the precision of the rewards.

    Raises:
        ValueError: shapes differ, fewer than two responses, a reward is not finite, an unknown option; or all rewards
            of a prompt are alike for ``"spearman"``, which is undefined then.

    Examples:
        >>> before = torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0]])
        >>> rank_consistency(before.exp(), before), rank_consistency(-before, before)
        (tensor([1.]), tensor([0.]))
        >>> rank_consistency(torch.tensor([[4.0, 5.0, 3.0, 2.0, 1.0]]), before)  # one of ten pairs
        tensor([0.9000])
    """
    _check(now, before, method, ties)
    if ties == "ordinal":
        now, before = (scores.argsort(dim=1, stable=True).argsort(dim=1).to(now.dtype) for scores in (now, before))
    if method == "top_order":
        alike = (now.argmax(dim=1) == before.argmax(dim=1)) & (now.argmin(dim=1) == before.argmin(dim=1))
        return alike.to(now.dtype)
    # (P, N, N): the sign of each pair of responses. Its sum over the second is a rank, but for scale and shift.
    signs_now, signs_before = (torch.sign(scores[:, :, None] - scores[:, None, :]) for scores in (now, before))
    if method == "kendall":
        pairs = now.shape[1] * (now.shape[1] - 1)  # each is there twice
        tau = (signs_now * signs_before).sum(dim=(1, 2)) / pairs
        return (tau + 1.0) / 2.0
    ranks_now, ranks_before = signs_now.sum(dim=2), signs_before.sum(dim=2)  # mean ranks, centred
    norms = ranks_now.norm(dim=1) * ranks_before.norm(dim=1)
    if not bool(norms.all()):
        raise ValueError(
            f"all rewards of prompt {int((norms == 0).nonzero()[0])} are alike, so Spearman's correlation is "
            "undefined; leave the prompt out, or use method='kendall', where it counts 1/2"
        )
    rho = (ranks_now * ranks_before).sum(dim=1) / norms
    found: Tensor = ((rho + 1.0) / 2.0).clamp(0.0, 1.0)
    return found


def _check(now: Tensor, before: Tensor, method: str, ties: str) -> None:
    if now.dim() != 2 or now.shape != before.shape:
        raise ValueError(
            f"both rewards must be (P, N), of the same responses; got {tuple(now.shape)} and {tuple(before.shape)}"
        )
    if now.shape[1] < 2:
        raise ValueError(f"a ranking needs at least two responses to each prompt, got {now.shape[1]}; the paper has 5")
    for name, scores in (("now", now), ("before", before)):
        if not bool(scores.isfinite().all()):
            place = int((~scores.isfinite()).any(dim=1).nonzero()[0])
            raise ValueError(f"a reward of prompt {place} in {name} is not finite, so it has no rank; leave it out")
    for name, value, words in (
        ("method", method, ("kendall", "spearman", "top_order")),
        ("ties", ties, ("neither", "ordinal")),
    ):
        if value not in words:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, words))}; got {value!r}")
