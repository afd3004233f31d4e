"""Measures of rankings, computed by ``ir-measures`` (which drives ``trec_eval``), not by us."""

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["evaluate_ranking"]


def evaluate_ranking(
    labels: Mapping[str, Mapping[str, int]],
    scores: Mapping[str, Mapping[str, float]],
    measures: Sequence[str] = ("RR", "P@1"),
) -> dict[str, float]:
    """Measures of a ranking, mean over all queries that have judgements; a query without scores counts 0.

    Args:
        labels: query -> document -> label, as from :func:`~regularized.curriculum.ranking_curriculum.read_qrels`;
            negative labels count as 0.
        scores: query -> document -> score of the ranker; ties are broken by the document's name, as ``trec_eval`` does.
        measures: names that ``ir-measures`` knows, such as ``"RR"`` (reciprocal rank), ``"RR(rel=3)@10"``, ``"P@1"``,
            ``"nDCG@10"``; default the two of the paper's abstract.

    Returns:
        Measure -> mean, with the names as given.

    Raises:
        ImportError: the package is missing: ``pip install "regularized[ranking]"``.
        ValueError: no measure, a name that ``ir-measures`` does not know, or nothing is judged.

    Examples:
        >>> labels = {"q1": {"a": 0, "b": 1}, "q2": {"c": 1, "d": 0}}
        >>> ranked = {"q1": {"a": 2.0, "b": 1.0}, "q2": {"c": 2.0, "d": 1.0}}
        >>> evaluate_ranking(labels, ranked)
        {'RR': 0.75, 'P@1': 0.5}
    """
    library = _library()
    if not measures:
        raise ValueError('name at least one measure, such as "RR" or "nDCG@10"')
    if not any(labels.values()):
        raise ValueError("nothing is judged: labels hold no document")
    parsed = {}
    for name in measures:
        try:
            parsed[name] = library.parse_measure(name)
        except (NameError, ValueError, SyntaxError) as error:
            raise ValueError(
                f"ir-measures does not know the measure {name!r} ({error}); all names are at "
                "https://ir-measur.es/en/latest/measures.html"
            ) from None
    means = library.calc_aggregate(
        list(parsed.values()),
        {query: dict(judged) for query, judged in labels.items()},
        {query: dict(listed) for query, listed in scores.items()},
    )
    return {name: float(means[measure]) for name, measure in parsed.items()}


def _library() -> Any:
    try:
        return importlib.import_module("ir_measures")
    except ImportError as error:
        raise ImportError(
            "measures of rankings are computed by ir-measures, which is not installed: "
            'pip install "regularized[ranking]"'
        ) from error
