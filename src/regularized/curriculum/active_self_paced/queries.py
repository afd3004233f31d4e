"""What a person should look at: samples to ask about, and certified ones whose label deserves a second look.

Symbols as in :mod:`regularized.curriculum.active_self_paced.loss`. Which rule is whose: :func:`lowest_best_score` and
:func:`doubtful` are those of the released code (kezewang/ASPL at 31f743d); the paper's text was not at hand, and asks,
by what is remembered of it, where classifiers disagree (:func:`disagreement`) or are otherwise the most ambiguous
(:func:`ambiguity`).
"""

from collections.abc import Callable, Mapping
from typing import Literal, TypeAlias

from torch import Tensor

__all__ = ["Query", "QueryName", "ambiguity", "disagreement", "doubtful", "lowest_best_score", "query_rule"]

Query: TypeAlias = Callable[[Tensor], Tensor]
QueryName: TypeAlias = Literal["ambiguity", "disagreement", "lowest_best_score"]


def ambiguity(scores: Tensor) -> Tensor:
    """How unsure the classifiers are: minus the gap between the two best scores. The default query rule.

    Args:
        scores: (n, m), m >= 2.

    Returns:
        (n,), larger is asked first.

    Examples:
        >>> import torch
        >>> ambiguity(torch.tensor([[1.0, 0.9], [2.0, -1.0]])).argmax()
        tensor(0)
    """
    best = scores.topk(2, dim=1).values
    return best[:, 1] - best[:, 0]


def disagreement(scores: Tensor) -> Tensor:
    """How many classifiers claim a sample beyond one, ties broken by :func:`ambiguity`.

    Args:
        scores: (n, m), m >= 2.

    Returns:
        (n,), larger is asked first.

    Examples:
        >>> import torch
        >>> disagreement(torch.tensor([[1.0, 0.2], [0.1, -1.0]])).argmax()
        tensor(0)
    """
    gap = ambiguity(scores)
    return (scores > 0).sum(dim=1).clamp(min=1) + 0.5 / (1 - gap)


def lowest_best_score(scores: Tensor) -> Tensor:
    """How little the surest classifier thinks of a sample: minus its best score. The rule of the released code.

    The procedure asks with it about samples only that have no pseudo-label at present, as the released code does.

    Args:
        scores: (n, m).

    Returns:
        (n,), larger is asked first.

    Examples:
        >>> import torch
        >>> lowest_best_score(torch.tensor([[1.0, 0.9], [0.2, -1.0]])).argmax()
        tensor(1)
    """
    return -scores.max(dim=1).values


_RULES: Mapping[str, Query] = {
    "ambiguity": ambiguity,
    "disagreement": disagreement,
    "lowest_best_score": lowest_best_score,
}


def query_rule(query: QueryName | Query) -> Query:
    """The rule of a name; a function is its own rule.

    Raises:
        ValueError: no rule has this name.

    Examples:
        >>> query_rule("ambiguity") is ambiguity
        True
    """
    if callable(query):
        return query
    if query not in _RULES:
        raise ValueError(f"query must be one of {', '.join(_RULES)}, or a function of the scores (n, m), got {query!r}")
    return _RULES[query]


def doubtful(scores: Tensor, labels: Tensor) -> Tensor:
    """Labelled samples that the classifiers see otherwise: another class scores best, or not one alone is positive.

    Args:
        scores: (n, m).
        labels: (n, m) in {-1, +1}, one +1 a row.

    Returns:
        (n,) bool.

    Examples:
        >>> import torch
        >>> doubtful(torch.tensor([[1.0, -0.5], [1.0, 0.5], [-0.5, 1.0]]), torch.tensor([[1, -1]]).expand(3, 2))
        tensor([False,  True,  True])
    """
    return (scores.argmax(dim=1) != labels.argmax(dim=1)) | ((scores > 0).sum(dim=1) != 1)
