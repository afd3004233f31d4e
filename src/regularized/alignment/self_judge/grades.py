"""The grade that a judge gives: the expected digit of its next-token distribution, so that grades hardly ever tie."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from regularized.mechanisms.ranges import allowed, count

__all__ = ["GRADES", "digit_token_ids", "expected_score"]

GRADES: range = range(10)
"""Grades of the paper, 0 to 9."""


@allowed(top_k=count(1).or_none("all"))
def expected_score(
    logits: Tensor, token_ids: Sequence[int], *, values: Sequence[float] = GRADES, top_k: int | None = None
) -> Tensor:
    """Expected value ``sum_v v p_v``, with the probabilities of the grades' tokens brought to the sum 1.

    Args:
        logits: (..., V) at the position that predicts the grade; log-probabilities will do, too.
        token_ids: the token of each grade, for example from :func:`digit_token_ids`.
        values: what each is worth; default 0 ... 9 (paper).
        top_k: only the k most likely tokens count, as where an API returns no others; default all. The official code
            has 20.

    Returns:
        (...) between the least and the largest value, in float32 at least.

    Raises:
        ValueError: not one token for each value, or one twice; no grade is among the ``top_k`` (the official code gives
            0 there).

    Examples:
        >>> z = torch.full((12,), -50.0)
        >>> z[[4, 7]] = 0.0  # a 3 or a 6, if token 1 + v means v
        >>> expected_score(z, range(1, 11))
        tensor(4.5000)
    """
    if len(token_ids) != len(values) or len(set(token_ids)) < len(token_ids):
        raise ValueError(
            f"each of the {len(values)} values needs a token of its own, got the tokens {list(token_ids)}; "
            "digit_token_ids finds them and says where two are one"
        )
    dtype = torch.promote_types(logits.dtype, torch.float32)
    grades = logits[..., torch.as_tensor(list(token_ids), device=logits.device)].to(dtype)
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[..., -1:]
        grades = grades.masked_fill(grades < least.to(dtype), -torch.inf)
        if bool((missing := grades.isneginf().all(dim=-1)).any()):
            raise ValueError(
                f"{int(missing.sum())} of {missing.numel()} answers have no grade among their {top_k} most likely "
                "tokens: the model does not answer with a digit. Train it, mend the prompt, or take a larger top_k"
            )
    return grades.softmax(dim=-1) @ torch.as_tensor(list(values), dtype=dtype, device=logits.device)


def digit_token_ids(
    encode: Callable[[str], Sequence[int]], *, after: str = "", values: Sequence[int] = GRADES
) -> tuple[int, ...]:
    """The token that a model with some tokenizer writes for each grade, behind the prompt.

    Args:
        encode: text to token ids without special tokens: ``partial(tokenizer.encode, add_special_tokens=False)``.
        after: the end of the prompt, behind which the digit stands: there it may be another token than alone.
        values: the grades; default 0 ... 9.

    Returns:
        One token id for each.

    Raises:
        ValueError: a grade is not one token behind ``after``, or two are the same; with the tokens of all.

    Examples:
        >>> digit_token_ids(lambda text: list(text.encode()), after="Grade: ")[:3]
        (48, 49, 50)
    """
    before = list(encode(after)) if after else []
    found = {str(value): list(encode(f"{after}{value}")) for value in values}
    tails = {word: ids[len(before) :] for word, ids in found.items()}
    alone = all(ids[: len(before)] == before and len(tails[word]) == 1 for word, ids in found.items())
    if not alone or len({tail[0] for tail in tails.values()}) < len(tails):
        told = {word: ids if len(ids) < 8 else [..., *ids[-7:]] for word, ids in found.items()}
        raise ValueError(
            f"the grades need one token each, all different, behind {after!r}; got {told}. End the prompt with what "
            "keeps a digit apart (a line break), or take another tokenizer"
        )
    return tuple(tail[0] for tail in tails.values())
