"""Full-text search over cards, for people who know their problem and not the technique's name.

SQLite's FTS5 does it, in memory: BM25 over the fields of a card, each with a weight, words reduced to their stems::

    for entry in search("my labels are wrong", load_catalogue()):
        print(entry.card.title)
"""

import difflib
import re
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Protocol, TypeVar

from regularized.papers.card import FAMILIES, Card

__all__ = [
    "RUNNABLE",
    "WEIGHTS",
    "Question",
    "explain",
    "fields",
    "nearest_word",
    "rank",
    "search",
    "strong",
    "with_joined",
]

# Weight of each field in BM25. What a person in need would type comes first; a word deep in the summary says little.
WEIGHTS: Mapping[str, float] = {
    "searches": 6.0,
    "problem": 6.0,
    "title": 4.0,
    "tags": 4.0,
    "families": 2.0,
    "claims": 1.0,
    "use": 1.0,
    "summary": 1.0,
    "names": 4.0,
}

# Who searches wants to run what is found: a paper with code comes first unless another fits more than twice as well.
RUNNABLE = 2.0

# What fits less than this share as well as the best holds only words that nearly every paper holds.
WEAK = 0.05

_ALIKE = 0.8
"""Share of the letters that the nearest spelling has in common with a word, in their order."""

# A pair of neighbours is rarer than its words, and BM25 values it as highly as a rare word; half of that is plenty.
PAIR_WEIGHT = 0.5

# Words that say nothing about a problem. "not", "without", "less" and the like do and are not here.
_STOP = """
a about after all also am an and any are as at be because been before being but by can cannot could did do does doing
done for from get gets getting give gives got had has have having help how i if in into is it its just keep let like
made make makes many me mine much must my need needs of on one only or other our out over please quite really same
should so some something than that the their them then there these they thing things this those through to too tool
trick try trying under up us use used using very want wants was way we well were what when where which while who why
will with would you your
"""
STOP_WORDS = frozenset(_STOP.split())

_WORD = re.compile(r"\w+")
_HYPHENATED = re.compile(r"\b\w+(?:-\w+)+")  # \b: a long word without a hyphen is tried once, not at each letter


class _HasCard(Protocol):
    @property
    def card(self) -> Card: ...


_Entry = TypeVar("_Entry", bound=_HasCard)


def search(query: str, entries: Iterable[_Entry], *, limit: int | None = None) -> list[_Entry]:
    """Papers that fit a question, best first.

    Any text is a question: there is no syntax, and quotation marks or operators mean nothing. A paper need not contain
    every word; those that contain more of them, more often, and in the weightier fields come first, and those that can
    be run before those that cannot, unless these fit more than twice as well. The last word may be unfinished, and a
    word that occurs nowhere is taken for its nearest spelling.

    Args:
        query: the question.
        entries: where to search, of the catalogue or whatever else has a card; their order decides between equals.
        limit: how many papers at most; default all that match.

    Returns:
        The papers; all of them, in the order given, when nothing was asked.

    Raises:
        ValueError: ``limit`` is below 1.
        RuntimeError: this Python's SQLite lacks FTS5.

    Examples:
        >>> from regularized.papers.catalogue import load_catalogue
        >>> search("", load_catalogue()) == list(load_catalogue())
        True
        >>> search("qzxv", load_catalogue())
        []
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    found = tuple(entries)
    if query.strip():
        index = _index(found)
        scores = rank(Question.parse(query), index.hits, index.match)
        scores = {n: score * (RUNNABLE if _runs(found[n]) else 1.0) for n, score in scores.items()}
        scores = strong(scores)
        found = tuple(found[number] for number in sorted(scores, key=lambda number: (-scores[number], number)))
    return list(found[:limit])


def explain(query: str, entry: _HasCard, entries: Iterable[_HasCard]) -> str:
    """Why a paper was found: the words of the question that it has, by field, the weightiest field first.

    Args:
        query: the question.
        entry: the paper.
        entries: where it was searched for.

    Returns:
        Such as ``"labels, wrong: searches; noise: tags"``; empty where nothing was asked, or nothing matches.

    Examples:
        >>> from regularized.papers.catalogue import find, load_catalogue
        >>> explain("wrong labels", find("early_learning"), load_catalogue())
        'wrong, labels: searches'
    """
    found = tuple(entries)
    if not query.strip() or entry not in found:
        return ""
    index, number = _index(found), found.index(entry)
    where: dict[str, list[str]] = {}
    question = Question.parse(query)
    for position, word in enumerate(question.words):
        if field := index.field_of(word, number, unfinished=position == len(question.words) - 1):
            where.setdefault(field, []).append(word)
    ordered = sorted(where, key=lambda field: -WEIGHTS[field])
    return "; ".join(f"{', '.join(where[field])}: {field}" for field in ordered)


def _runs(entry: object) -> bool:
    return bool(getattr(entry, "implemented", False))


@dataclass(frozen=True, slots=True)
class Question:
    """What is looked for.

    Args:
        words: words, without those that say nothing, unless there are no others.
        pairs: neighbouring words: "model smaller" is about models, "adapter smaller" is not.

    Examples:
        >>> Question.parse("my labels are wrong")
        Question(words=('labels', 'wrong'), pairs=())
    """

    words: tuple[str, ...]
    pairs: tuple[str, ...]

    @classmethod
    def parse(cls, query: str) -> "Question":
        """Read a question; any text is one."""
        # A slug is looked for as a phrase (FTS5 splits it again), and so are its parts.
        whole = _WORD.findall(with_joined(query.lower()))
        parts = [part for word in whole if "_" in word for part in word.split("_") if part]
        words = list(dict.fromkeys(parts + [word for word in whole if word.strip("_")]))
        told = [word for word in words if word not in STOP_WORDS] or words
        neighbours = dict.fromkeys(pairwise(_WORD.findall(query.lower())))
        return cls(tuple(told), tuple(f"{a} {b}" for a, b in neighbours if a != b and not {a, b} & STOP_WORDS))


def rank(
    question: Question,
    hits: Callable[[str, bool], Mapping[int, float]],
    match: Callable[[str], Mapping[int, float]],
) -> dict[int, float]:
    """Scores of what matches any word of a question; pairs of neighbours count on top.

    Args:
        question: the question.
        hits: scores of what holds a word, which may be unfinished where the flag says so.
        match: scores of what holds a phrase.

    Returns:
        The score of each number that matches, the higher the better.
    """
    scores: dict[int, float] = {}
    matched: dict[int, int] = {}
    for position, word in enumerate(question.words):
        for number, score in hits(word, position == len(question.words) - 1).items():
            scores[number] = scores.get(number, 0.0) + score
            matched[number] = matched.get(number, 0) + 1
    for pair in question.pairs:
        for number, score in match(f'"{pair}"').items():
            if number in scores:
                scores[number] += PAIR_WEIGHT * score
    # BM25 of a rare word can outweigh that of several common ones together. A paper that answers more of the
    # question is the better answer, so its score counts by the share of the words that it has.
    return {number: score * matched[number] / len(question.words) for number, score in scores.items()}


def strong(scores: Mapping[int, float]) -> dict[int, float]:
    """Scores without those that are weak beside the best.

    Examples:
        >>> strong({1: 8.0, 2: 0.5, 3: 0.1})
        {1: 8.0, 2: 0.5}
    """
    least = WEAK * max(scores.values(), default=0.0)
    return {number: score for number, score in scores.items() if score >= least}


def nearest_word(word: str, vocabulary: Sequence[str]) -> str:
    """The nearest spelling of a word that occurs nowhere; empty without one."""
    if len(word) < 4:
        return ""
    # Two words that differ in more letters than that are not so alike, and most of a large vocabulary does: this tells
    # it at a hundredth of the time.
    letters = set(word)
    alike = [
        other
        for other in vocabulary
        if len(letters.symmetric_difference(other)) <= (1 - _ALIKE) * len(word + other) + 1e-9
    ]
    near = difflib.get_close_matches(word, alike, n=1, cutoff=_ALIKE)
    return near[0] if near else ""


def with_joined(text: str) -> str:
    """Text with its hyphenated words written as one, too: people write over-confident and overconfident.

    Examples:
        >>> with_joined("an over-confident net")
        'an over-confident net overconfident'
    """
    return " ".join([text, *(word.replace("-", "") for word in _HYPHENATED.findall(text))])


@lru_cache(maxsize=4)
def _index(entries: tuple[_HasCard, ...]) -> "_Index":
    return _Index([entry.card for entry in entries])


class _Index:
    def __init__(self, cards: Sequence[Card]) -> None:
        # The process may be a server: SQLite itself is safe for threads, and nothing is written after this.
        self._connection = sqlite3.connect(":memory:", check_same_thread=False)
        rows = [fields(card) for card in cards]
        columns = ", ".join(WEIGHTS)
        try:
            self._connection.execute(
                f"CREATE VIRTUAL TABLE card USING fts5({columns}, tokenize = 'porter unicode61 remove_diacritics 2')"
            )
        except sqlite3.OperationalError as error:
            raise RuntimeError(f"search needs a Python whose SQLite has FTS5: {error}") from error
        self._connection.executemany(
            f"INSERT INTO card(rowid, {columns}) VALUES (?, {', '.join('?' for _ in WEIGHTS)})",
            [(number, *(row[field] for field in WEIGHTS)) for number, row in enumerate(rows)],
        )
        self._vocabulary = sorted(
            {word for row in rows for text in row.values() for word in _WORD.findall(text.lower())}
        )

    def hits(self, word: str, unfinished: bool) -> Mapping[int, float]:
        """Scores of the cards that hold a word: as it is, as a beginning, or in its nearest spelling."""
        return next(filter(None, map(self.match, self._readings(word, unfinished))), {})

    def field_of(self, word: str, number: int, *, unfinished: bool) -> str:
        """The weightiest field of a card that holds a word; empty where none does."""
        reading = next((reading for reading in self._readings(word, unfinished) if self.match(reading)), "")
        for field in sorted(WEIGHTS, key=lambda field: -WEIGHTS[field]) if reading else ():
            if number in self.match(f"{{{field}}} : {reading}"):
                return field
        return ""

    def _readings(self, word: str, unfinished: bool) -> Iterator[str]:
        """What a word may mean: itself, a beginning, its nearest spelling; what comes later only if all before fail."""
        yield f'"{word}"'
        if unfinished and len(word) >= 3:
            yield f'"{word}"*'
        if near := nearest_word(word, self._vocabulary):
            yield f'"{near}"'

    def match(self, expression: str) -> Mapping[int, float]:
        """Scores of the cards that match an FTS5 expression."""
        weights = ", ".join(map(str, WEIGHTS.values()))
        # bm25() is negative, the better the lower.
        rows = self._connection.execute(
            f"SELECT rowid, -bm25(card, {weights}) FROM card WHERE card MATCH ?", [expression]
        )
        return dict(rows.fetchall())


def fields(card: Card) -> dict[str, str]:
    """What is searched of a card, a text for each of :data:`WEIGHTS`."""
    return {name: with_joined(text) for name, text in _fields(card).items()}


def _fields(card: Card) -> dict[str, str]:
    names = card.implementation.names if card.implementation else ()
    return {
        "searches": "\n".join(card.searches),
        "problem": card.problem,
        "title": card.title,
        "tags": "\n".join((*card.tags, card.changes)),
        "families": "\n".join(f"{name.replace('_', ' ')} {FAMILIES[name]}" for name in card.families),
        "claims": "\n".join(claim.statement for claim in card.claims),
        "use": card.when_to_use,  # what it is not for would lead those there who must not go
        "summary": card.summary,
        "names": "\n".join(
            [
                card.slug.replace("_", " "),
                card.slug.replace("_", ""),
                card.arxiv,
                *(n.rpartition(".")[2] for n in names),
                *card.authors,
                card.organization,
                card.venue,
            ]
        ),
    }
