"""What the first stage of a search engine says about documents: its lists, and how easy it finds each document.

A first stage (BM25, say) gives each query a list of documents with scores; rank 1 is the best. The *easiness* of a
document, in [0, 1], is how relevant the first stage takes it to be.

===========  =======================================================  ==================================================
heuristic    easiness                                                 function
===========  =======================================================  ==================================================
reciprank    1 / r                                                    :func:`reciprocal_rank`
normscore    (s - min) / (max - min) over the query's list            :func:`normalised_score`
kdescore     mean over the list of Phi((s - s_k) / h),                :func:`kde_score`
             h = sd * n^(-1/5)
===========  =======================================================  ==================================================

All of this is done once, before training, and kept beside the training pairs.

    MacAvaney et al., "Training Curricula for Open Domain Answer Re-Ranking", SIGIR 2020, arXiv 2004.14269.
"""

import gzip
import math
import os
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from regularized.mechanisms.ranges import Choice, allowed, count

__all__ = [
    "Easiness",
    "FirstStageDifficulty",
    "FirstStageRun",
    "Heuristic",
    "kde_score",
    "normalised_score",
    "read_qrels",
    "read_run",
    "reciprocal_rank",
]

Heuristic: TypeAlias = Literal["reciprank", "normscore", "kdescore"]
Columns: TypeAlias = Literal["trec", "scores", "ranks"]

CONSTANT = 0.5  # easiness in a list that tells no document from another: ours, since the official code divides by zero
MISSING_RANK = 1000  # of the official code
_ENTRIES = 10_000_000  # of the table of differences that is held at once: 80 MB


# -- the heuristics, on tensors -----------------------------------------------------------------


def reciprocal_rank(ranks: Tensor) -> Tensor:
    """Easiness from ranks, ``1 / r``.

    Args:
        ranks: any shape; whole numbers, 1 is the best.

    Returns:
        The same shape, float64, in (0, 1].

    Raises:
        ValueError: a rank below 1, or not a whole number.

    Examples:
        >>> reciprocal_rank(torch.tensor([1, 2, 4]))
        tensor([1.0000, 0.5000, 0.2500], dtype=torch.float64)
    """
    values = ranks.double()
    wrong = values[~((values >= 1) & (values == values.floor()) & values.isfinite())]
    if len(wrong):
        raise ValueError(f"ranks must be whole numbers from 1 on, got {wrong[0].item():g}; if yours start at 0, add 1")
    return values.reciprocal()


def normalised_score(scores: Tensor, *, of: Tensor | None = None) -> Tensor:
    """Easiness from scores, ``(s - min) / (max - min)``.

    Args:
        scores: (L,) scores of one query's list, or of any documents if ``of`` is given.
        of: (K,) the list that minimum and maximum are taken from; default ``scores`` themselves.

    Returns:
        (L,) float64; in [0, 1] for documents of the list, possibly beyond for others. 0.5 for all where all scores of
        the list are equal.

    Raises:
        ValueError: a score is not finite, or the list is empty.

    Examples:
        >>> normalised_score(torch.tensor([9.0, 7.0, 5.0]))
        tensor([1.0000, 0.5000, 0.0000], dtype=torch.float64)
    """
    values, listed = _checked_scores(scores, of)
    low, high = listed.min() / 2, listed.max() / 2  # halves: the difference of two numbers may exceed the largest one
    if low == high:
        return torch.full_like(values, CONSTANT)
    return (values / 2 - low) / (high - low)


def kde_score(scores: Tensor, *, of: Tensor | None = None) -> Tensor:
    """Easiness from scores: the distribution function of a Gaussian kernel density estimate of the query's scores.

    The bandwidth is Scott's rule, ``h = sd * n**(-1/5)`` with the sample standard deviation, as in
    ``scipy.stats.gaussian_kde``; the integral has a closed form, so that all scores of a list take one table of
    L x K normal distribution functions.

    Args:
        scores: (L,) scores of one query's list, or of any documents if ``of`` is given.
        of: (K,) the list that the density is estimated from; default ``scores`` themselves.

    Returns:
        (L,) float64 in [0, 1]. 0.5 for all where all scores of the list are equal.

    Raises:
        ValueError: a score is not finite, or the list is empty.

    Examples:
        >>> kde_score(torch.tensor([9.0, 7.0, 5.0]))
        tensor([0.7957, 0.5000, 0.2043], dtype=torch.float64)
    """
    # The estimate does not change when scores are moved and stretched; in [0, 1] nothing overflows.
    values, listed = normalised_score(scores, of=of), normalised_score(scores if of is None else of)
    if bool((listed == listed[0]).all()):
        return torch.full_like(values, CONSTANT)
    width = listed.std() * len(listed) ** -0.2
    rows = max(_ENTRIES // len(listed), 1)
    parts = [torch.special.ndtr((part[:, None] - listed) / width).mean(dim=1) for part in values.split(rows)]
    return torch.cat(parts)


def _checked_scores(scores: Tensor, of: Tensor | None) -> tuple[Tensor, Tensor]:
    listed = scores if of is None else of
    for name, tensor in (("scores", scores), ("of", listed)):
        if tensor.ndim != 1:
            raise ValueError(f"{name} must have the shape (L,), the list of one query; got {tuple(tensor.shape)}")
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} must be finite, got {tensor[~torch.isfinite(tensor)][0].item()}")
    if len(listed) == 0:
        raise ValueError("the list of first-stage scores is empty")
    return scores.double(), listed.double()


# -- lists --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class FirstStageRun:
    """The first stage's lists of a set of queries.

    Args:
        ranks: query -> document -> rank, whole numbers from 1 on (1 is the best).
        scores: query -> document -> score, for the same documents; empty where the first stage gives ranks alone, which
            then allows ``"reciprank"`` alone.

    Raises:
        ValueError: no query, an empty list, a rank that is no whole number from 1 on or occurs twice in a list, a score
            that is not finite, or documents that differ between scores and ranks.

    Examples:
        >>> run = FirstStageRun.from_scores({"q1": {"a": 7.5, "b": 3.0}})
        >>> run.ranks
        {'q1': {'a': 1, 'b': 2}}
    """

    ranks: Mapping[str, Mapping[str, int]]
    scores: Mapping[str, Mapping[str, float]]

    def __post_init__(self) -> None:
        if not self.ranks:
            raise ValueError("a run needs at least one query")
        for query, listed in self.ranks.items():
            if not listed:
                raise ValueError(f"query {query!r} has an empty list; leave it out")
            for document, rank in listed.items():
                if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
                    raise ValueError(
                        f"query {query!r}, document {document!r}: ranks must be whole numbers from 1 on, got {rank!r}"
                    )
            if len(set(listed.values())) < len(listed):
                raise ValueError(f"query {query!r} has two documents of the same rank; count ranks from the scores")
        if not self.scores:
            return
        for query in self.ranks.keys() | self.scores.keys():
            given, ranked = self.scores.get(query, {}), self.ranks.get(query, {})
            if given.keys() != ranked.keys():
                odd = sorted(given.keys() ^ ranked.keys())[0]
                raise ValueError(f"query {query!r}: document {odd!r} has a rank or a score, but not both")
            _check_finite(query, given)

    @classmethod
    def from_scores(cls, scores: Mapping[str, Mapping[str, float] | Sequence[tuple[str, float]]]) -> "FirstStageRun":
        """Lists from scores alone; higher is better, ties keep the order in which they are given.

        Args:
            scores: query -> document -> score, or query -> (document, score) pairs.

        Raises:
            ValueError: as in the class, or a document that occurs twice for a query.
        """
        tables: dict[str, dict[str, float]] = {}
        for query, given in scores.items():
            tables[query] = {document: float(score) for document, score in _pairs(given)}
            if len(tables[query]) < len(given):
                raise ValueError(f"query {query!r} lists a document twice; keep its best score")
            _check_finite(query, tables[query])  # before sorting, where NaN has no place
        ranks = {
            query: {document: rank for rank, (document, _) in enumerate(sorted(t.items(), key=lambda x: -x[1]), 1)}
            for query, t in tables.items()
        }
        return cls(ranks, tables)


def _pairs(given: Mapping[str, float] | Sequence[tuple[str, float]]) -> Iterator[tuple[str, float]]:
    yield from given.items() if isinstance(given, Mapping) else given


def _check_finite(query: str, scores: Mapping[str, float]) -> None:
    for document, score in scores.items():
        if not math.isfinite(score):
            raise ValueError(f"query {query!r}, document {document!r}: scores must be finite, got {score}")


# -- files --------------------------------------------------------------------------------------

_FORMS: Mapping[str, tuple[int, str]] = {
    "trec": (6, "query Q0 document rank score tag"),
    "scores": (3, "query document score"),
    "ranks": (3, "query document rank"),
    "qrels": (4, "query iteration document label"),
}


@allowed(columns=Choice("trec", "scores", "ranks"), ranks=Choice("file", "scores"))
def read_run(
    path: str | os.PathLike[str], *, columns: Columns = "trec", ranks: Literal["file", "scores"] = "file"
) -> FirstStageRun:
    """Read a run file: what a first stage returned, one document a line, columns divided by blanks or tabs.

    Args:
        path: the file; ``.gz`` is unpacked.
        columns: ``"trec"``: query, Q0, document, rank, score, tag. ``"scores"``: query, document, score. ``"ranks"``:
            query, document, rank, as MS MARCO has it.
        ranks: for TREC files, where ranks come from. ``"file"`` (default) takes the column, which must start at 1.
            ``"scores"`` counts them from the scores, as ``trec_eval`` does, for files whose ranks start at 0.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: with file and line: a wrong number of columns, a rank that is no whole number from 1 on, a score
            that is no finite number, a document twice for a query; an empty, damaged or binary file.

    Warns:
        UserWarning: the rank column contradicts the scores, so that somewhere a worse rank has the higher score.

    Examples:
        >>> import pathlib, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = pathlib.Path(folder, "bm25.run")
        ...     _ = file.write_text("q1 Q0 d7 1 12.5 bm25\\nq1 Q0 d2 2 11.0 bm25\\n")
        ...     run = read_run(file)
        >>> run.scores
        {'q1': {'d7': 12.5, 'd2': 11.0}}
    """
    scores: dict[str, dict[str, float]] = {}
    places: dict[str, dict[str, int]] = {}
    for where, fields in _lines(path, columns):
        query, document = (fields[0], fields[2]) if columns == "trec" else (fields[0], fields[1])
        if document in scores.get(query, ()) or document in places.get(query, ()):
            raise ValueError(f"{where}: document {document!r} is listed twice for query {query!r}")
        if columns != "ranks":
            scores.setdefault(query, {})[document] = _number(fields[4 if columns == "trec" else 2], where)
        if columns == "ranks" or (columns == "trec" and ranks == "file"):
            places.setdefault(query, {})[document] = _rank(fields[3 if columns == "trec" else 2], where)
    if columns == "ranks":
        return FirstStageRun(places, {})
    if columns == "scores" or ranks == "scores":
        return FirstStageRun.from_scores(scores)
    run = FirstStageRun(places, scores)
    odd = next((query for query in places if not _agree(places[query], scores[query])), None)
    if odd is not None:
        warnings.warn(
            f"{os.fspath(path)}: ranks and scores contradict each other, first for query {odd!r}; the ranks are taken "
            'from their column. ranks="scores" counts them from the scores, as trec_eval does',
            UserWarning,
            stacklevel=3,
        )
    return run


def read_qrels(path: str | os.PathLike[str]) -> dict[str, dict[str, int]]:
    """Read relevance judgements in TREC form: query, iteration (not used), document, label.

    Args:
        path: the file; ``.gz`` is unpacked.

    Returns:
        Query -> document -> label, as in the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: with file and line: a wrong number of columns, a label that is no whole number, a pair that is
            judged twice; an empty, damaged or binary file.

    Examples:
        >>> import pathlib, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = pathlib.Path(folder, "qrels.txt")
        ...     _ = file.write_text("q1 0 d7 1\\nq1 0 d2 0\\n")
        ...     read_qrels(file)
        {'q1': {'d7': 1, 'd2': 0}}
    """
    judged: dict[str, dict[str, int]] = {}
    for where, (query, _, document, label) in _lines(path, "qrels"):
        labels = judged.setdefault(query, {})
        if document in labels:
            raise ValueError(f"{where}: document {document!r} is judged twice for query {query!r}")
        try:
            labels[document] = int(label)
        except ValueError:
            raise ValueError(f"{where}: labels must be whole numbers, got {label!r}") from None
    return judged


def _lines(path: str | os.PathLike[str], form: str) -> Iterator[tuple[str, list[str]]]:
    """Place and fields of each line that is not blank."""
    file = Path(path)
    count, names = _FORMS[form]
    opener: Callable[..., Iterator[str]] = gzip.open if file.suffix == ".gz" else open
    found = False
    try:
        with opener(file, "rt", encoding="utf-8-sig") as lines:  # type: ignore[attr-defined]
            for number, line in enumerate(lines, 1):
                fields = line.split()
                if not fields:
                    continue
                found = True
                if len(fields) != count:
                    raise ValueError(f"{file}:{number}: {len(fields)} columns, but {count} are needed: {names}")
                yield f"{file}:{number}", fields
    except (EOFError, zlib.error, gzip.BadGzipFile, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: damaged, or not a text file ({error}); copy it again") from error
    if not found:
        raise ValueError(f"{file}: the file is empty; lines of this form are needed: {names}")


def _number(text: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"{where}: scores must be numbers, got {text!r}") from None
    if not math.isfinite(value):
        raise ValueError(f"{where}: scores must be finite, got {text!r}")
    return value


def _rank(text: str, where: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise ValueError(
            f"{where}: ranks must be whole numbers from 1 on, got {text!r}; if yours start at 0, read a TREC file with "
            'ranks="scores"'
        )
    return int(text)


def _agree(ranks: Mapping[str, int], scores: Mapping[str, float]) -> bool:
    ordered = [scores[document] for document in sorted(ranks, key=ranks.__getitem__)]
    return all(better >= worse for better, worse in pairwise(ordered))


# -- easiness of documents ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Easiness:
    """Easiness of each document for each query, in [0, 1]; made by :class:`FirstStageDifficulty`.

    Args:
        values: query -> document -> easiness.
        unlisted: query -> easiness of a document that the first stage did not return.

    Raises:
        KeyError: at a look-up, the query is unknown.

    Examples:
        >>> easy = Easiness({"q1": {"a": 1.0, "b": 0.5}}, {"q1": 0.001})
        >>> easy["q1", "b"], easy["q1", "z"]
        (0.5, 0.001)
        >>> easy.lookup(["q1", "q1"], ["a", "z"])
        tensor([1.0000, 0.0010])
    """

    values: Mapping[str, Mapping[str, float]]
    unlisted: Mapping[str, float]

    def __getitem__(self, pair: tuple[str, str]) -> float:
        query, document = pair
        if query not in self.values:
            raise KeyError(
                f"the first stage has no list for query {query!r}; run it for all {len(self.values)} training queries "
                "and this one, or leave the pair out"
            )
        return self.values[query].get(document, self.unlisted[query])

    def lookup(self, queries: Sequence[str], documents: Sequence[str]) -> Tensor:
        """Easiness of many pairs, to be stored beside the training pairs.

        Args:
            queries: n query ids.
            documents: n document ids.

        Returns:
            (n,) tensor of the default type.

        Raises:
            ValueError: the lengths differ.
            KeyError: a query is unknown.
        """
        if len(queries) != len(documents):
            raise ValueError(f"lookup needs pairs, got {len(queries)} queries and {len(documents)} documents")
        return torch.tensor([self[pair] for pair in zip(queries, documents)])


class FirstStageDifficulty:
    """Turns the first stage's lists into the easiness of each document; called once, before training.

    Which heuristic is best depends on the collection; try all three on validation data. Costs L x L normal distribution
    functions a query for ``"kdescore"``, next to nothing for the others.

    Args:
        heuristic: ``"reciprank"`` (one over the rank: only the very top is easy), ``"normscore"`` (scores stretched to
            [0, 1]) or ``"kdescore"`` (share of the density of scores below: spread evenly).
        missing_rank: for ``"reciprank"``, rank of documents that the first stage did not return, at least 1; default
            1000 (official code).

    Raises:
        ValueError: the heuristic is unknown, ``missing_rank`` is not a whole number from 1 on; at the call: the run has
            no scores and the heuristic needs them, or a score is not finite.

    Warns:
        UserWarning: lists whose scores are all equal; their documents get 0.5. One warning a call.

    Examples:
        >>> run = FirstStageRun.from_scores({"q1": {"a": 9.0, "b": 7.0, "c": 5.0}})
        >>> FirstStageDifficulty("reciprank")(run).values
        {'q1': {'a': 1.0, 'b': 0.5, 'c': 0.3333333333333333}}
        >>> easy = FirstStageDifficulty("normscore")(run, outside={"q1": {"d": 6.0, "e": 1.0}})
        >>> easy["q1", "d"], easy["q1", "e"]
        (0.25, 0.0)
    """

    @allowed(heuristic=Choice("reciprank", "normscore", "kdescore"), missing_rank=count(1))
    def __init__(self, heuristic: Heuristic, *, missing_rank: int = MISSING_RANK) -> None:
        self.heuristic: Heuristic = heuristic
        self.missing_rank = missing_rank

    def __call__(self, run: FirstStageRun, *, outside: Mapping[str, Mapping[str, float]] | None = None) -> Easiness:
        """Easiness of the documents of a run.

        Args:
            run: the first stage's lists.
            outside: query -> document -> score of further documents, where the index knows it; measured by the scale of
                the query's list and clipped to [0, 1]. Not used by ``"reciprank"``. A document that is neither listed
                nor given here has the missing rank, or is as easy as the worst of the list.
        """
        if self.heuristic == "reciprank":
            values = {
                query: dict(zip(listed, reciprocal_rank(torch.tensor(list(listed.values()))).tolist()))
                for query, listed in run.ranks.items()
            }
            return Easiness(values, dict.fromkeys(values, 1.0 / self.missing_rank))
        if not run.scores:
            raise ValueError(f'{self.heuristic!r} needs scores, but the run has ranks alone; use "reciprank"')
        function = normalised_score if self.heuristic == "normscore" else kde_score
        values, unlisted, constant = {}, {}, []
        for query, listed in run.scores.items():
            of = torch.tensor(list(listed.values()), dtype=torch.float64)
            more = dict((outside or {}).get(query, {}))
            scores = torch.cat([of, torch.tensor(list(more.values()), dtype=torch.float64)])
            easy = function(scores, of=of).clamp_(0.0, 1.0)
            # What the run lists is what counts for documents that are in both.
            values[query] = dict(zip(more, easy[len(of) :].tolist())) | dict(zip(listed, easy.tolist()))
            unlisted[query] = float(easy[: len(of)].min())
            if bool((of == of[0]).all()):
                constant.append(query)
        if constant:
            warnings.warn(
                f"the first stage gives all its documents the same score for {len(constant)} of {len(values)} queries "
                f"(the first is {constant[0]!r}); they all get the easiness {CONSTANT}",
                UserWarning,
                stacklevel=2,
            )
        return Easiness(values, unlisted)
