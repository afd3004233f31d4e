"""Search in the tables: the ranking of :mod:`regularized.papers.search`, fed by FTS5 or by PostgreSQL's full text.

On a catalogue of cards it finds what ``regularized papers --search`` finds, in the same order. A word that thousands of
papers hold says little and would cost most of the time: it is scored only among the papers that the rarer words
found; where there is no rarer word, among those that hold all words, the catalogue's own and the newest first.

With a sentence encoder, the ranking by words and that by meaning are joined by reciprocal ranks.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from sqlalchemy import ColumnElement, Select, String, bindparam, column, func, literal_column, select, table, text
from sqlalchemy.orm import Session

from regularized.papers.search import RUNNABLE, WEIGHTS, Question, nearest_word, rank, strong
from regularized.site.meaning import Meaning
from regularized.site.models import Paper, SearchWord
from regularized.site.queries import PER_PAGE, Filters, Page, list_papers, shown

__all__ = ["Found", "find"]

COMMON = 2000
"""A word that more papers hold is common."""

_MOST_WORDS = 24

_MOST_COMMON = 6
"""Common words, and pairs of neighbours, of a question that are looked at: each costs a look at thousands of papers."""

_NEAREST = 50
"""Papers that the meaning adds at most."""

_RANK = 60.0
"""Added to a rank before it is inverted: the usual constant of reciprocal-rank fusion."""


@dataclass(frozen=True, slots=True)
class Found:
    """Answer to a question.

    Args:
        page: the papers.
        by_meaning: whether the meaning had a say, or the words alone.
    """

    page: Page
    by_meaning: bool


def find(
    session: Session,
    query: str,
    *,
    filters: Filters = Filters(),  # noqa: B008 - frozen
    page: int = 1,
    per_page: int = PER_PAGE,
    meaning: Meaning | None = None,
) -> Found:
    """Papers that fit a question, best first; the default list where nothing is asked.

    Args:
        session: the database.
        query: the question, in any words.
        filters: which papers are wanted.
        page: which page, from 1.
        per_page: papers on a page.
        meaning: vectors of the papers; None searches by words.
    """
    if not query.strip():
        return Found(list_papers(session, "best", filters=filters, page=page, per_page=per_page), False)
    conditions = filters.conditions()
    kind = _Sqlite if session.get_bind().dialect.name == "sqlite" else _Postgresql
    words = kind(session, _bounded(Question.parse(query[:400])), conditions)
    runnable = set(session.scalars(select(Paper.id).where(Paper.runs)))
    scores = strong({n: score * (RUNNABLE if n in runnable else 1.0) for n, score in words.scores().items()})
    if meaning is not None:
        near = _only(session, meaning.nearest(session, query[:400], _NEAREST), conditions)
        scores = _joined(scores, near)
    ids = _by_score(session, scores)
    shown_ids = ids[(page - 1) * per_page : page * per_page]
    return Found(Page(shown(session, shown_ids), len(ids), page, per_page), meaning is not None)


def _bounded(question: Question) -> Question:
    """A question whose cost is bounded: nobody types more, who wants an answer."""
    return Question(question.words[:_MOST_WORDS], question.pairs[:_MOST_COMMON])


def _joined(*rankings: Mapping[int, float]) -> dict[int, float]:
    """Reciprocal-rank fusion.

    Examples:
        >>> joined = _joined({1: 9.0, 2: 8.0}, {2: 0.9, 3: 0.8})
        >>> sorted(joined, key=joined.get, reverse=True)
        [2, 1, 3]
    """
    scores: dict[int, float] = {}
    for ranking in rankings:
        for position, number in enumerate(sorted(ranking, key=lambda n: (-ranking[n], n)), 1):
            scores[number] = scores.get(number, 0.0) + 1.0 / (_RANK + position)
    return scores


def _only(session: Session, scores: Mapping[int, float], conditions: Sequence[ColumnElement[bool]]) -> dict[int, float]:
    if not conditions or not scores:
        return dict(scores)
    kept = set(session.scalars(select(Paper.id).where(Paper.id.in_(list(scores)), *conditions)))
    return {number: score for number, score in scores.items() if number in kept}


def _by_score(session: Session, scores: Mapping[int, float]) -> list[int]:
    """Numbers, best first; among equals the better proven."""
    if not scores:
        return []
    ordered = sorted(scores, key=lambda number: -scores[number])
    values = [scores[number] for number in ordered]
    if len(set(values)) == len(values):
        return ordered
    # Equal scores are rare beyond small catalogues; only of those the standing is looked up.
    twice = [n for i, n in enumerate(ordered) if values[i] in (values[i - 1 : i] + values[i + 1 : i + 2])][:COMMON]
    standing = {
        row[0]: tuple(row[1:])
        for row in session.execute(
            select(Paper.id, Paper.standing, Paper.margin, Paper.date).where(Paper.id.in_(twice))
        )
    }
    best = sorted(standing, key=lambda number: standing[number], reverse=True)
    place = {number: i for i, number in enumerate(best)}
    return sorted(ordered, key=lambda number: (-scores[number], place.get(number, len(place))))


class _Words:
    """Scores by words. What the databases do differently is in the subclasses."""

    def __init__(self, session: Session, question: Question, conditions: Sequence[ColumnElement[bool]]) -> None:
        self._session = session
        self._question = question
        self._conditions = conditions

    def scores(self) -> dict[int, float]:
        raise NotImplementedError

    def _nearest(self, word: str) -> str:
        """Nearest spelling among the words that begin alike and are about as long."""
        if len(word) < 4:
            return ""
        alike = select(SearchWord.word).where(
            SearchWord.word >= word[0],
            SearchWord.word < chr(ord(word[0]) + 1),
            func.length(SearchWord.word).between(len(word) - 2, len(word) + 2),
        )
        return nearest_word(word, list(self._session.scalars(alike)))


class _Sqlite(_Words):
    _fts = table("paper_fts", column("rowid"))

    def scores(self) -> dict[int, float]:
        expressions = {
            word: self._expression(word, unfinished=position == len(self._question.words) - 1)
            for position, word in enumerate(self._question.words)
        }
        everywhere = [word for word, expression in expressions.items() if expression and self._is_common(expression)]
        common = set(everywhere[:_MOST_COMMON])
        for word in everywhere[_MOST_COMMON:]:
            expressions[word] = ""
        rare = {word: self._match(e) for word, e in expressions.items() if e and word not in common}
        among = ""
        base: dict[int, float] = {}
        if any(rare.values()):
            among = " OR ".join(expressions[word] for word in rare if rare[word])
            for found in rare.values():
                for number, score in found.items():
                    base[number] = base.get(number, 0.0) + score
        together: Mapping[int, float] = {}
        if common and not base:
            together = self._some(" AND ".join(expressions[word] for word in sorted(common)))

        def hits(word: str, _unfinished: bool) -> Mapping[int, float]:
            if word in rare:
                return rare[word]
            if word not in common:
                return {}
            if base:
                # BM25 of an expression is the sum over its words: what is not the rare words' is this one's.
                both = self._match(f"{expressions[word]} AND ({among})")
                return {number: score - base[number] for number, score in both.items() if number in base}
            if together:
                return {number: score / len(common) for number, score in together.items()}
            return self._some(expressions[word])

        def match(pair: str) -> Mapping[int, float]:
            if not common:
                return self._match(pair)
            if base:
                both = self._match(f"{pair} AND ({among})")
                return {number: score - base[number] for number, score in both.items() if number in base}
            return self._some(pair)

        return rank(self._question, hits, match)

    def _expression(self, word: str, *, unfinished: bool) -> str:
        """What to look for: the word as it is, as a beginning, or in its nearest spelling; empty for none of them."""
        exact = f'"{word}"'
        if self._count(exact, 1):
            return exact
        if unfinished and len(word) >= 3 and self._count(f"{exact}*", 1):
            return f"{exact}*"
        near = self._nearest(word)
        return f'"{near}"' if near and self._count(f'"{near}"', 1) else ""

    def _is_common(self, expression: str) -> bool:
        return self._count(expression, COMMON + 1) > COMMON

    def _count(self, expression: str, most: int) -> int:
        found: Select[Any] = (
            select(literal_column("1")).select_from(self._fts).where(self._matches(expression)).limit(most)
        )
        return self._session.scalar(select(func.count()).select_from(found.subquery())) or 0

    def _matches(self, expression: str) -> ColumnElement[bool]:
        return text("paper_fts MATCH :expression").bindparams(bindparam("expression", expression, type_=String))  # type: ignore[return-value]

    @cached_property
    def _score(self) -> ColumnElement[float]:
        # bm25() is negative, the better the lower.
        return literal_column(f"-bm25(paper_fts, {', '.join(map(str, WEIGHTS.values()))})")

    def _selection(self, expression: str) -> "Select[tuple[int, float]]":
        return select(self._fts.c.rowid, self._score).select_from(self._fts).where(self._matches(expression))

    def _match(self, expression: str) -> dict[int, float]:
        return self._rows(self._filtered(self._selection(expression)))

    def _some(self, expression: str) -> dict[int, float]:
        """Of many: the catalogue's own, and the newest."""
        own = self._fts.c.rowid.in_(select(Paper.id).where(Paper.has_card, *self._conditions))
        newest = self._filtered(self._selection(expression)).order_by(self._fts.c.rowid.desc()).limit(COMMON)
        return self._rows(newest) | self._rows(self._selection(expression).where(own))

    def _filtered(self, selection: "Select[tuple[int, float]]") -> "Select[tuple[int, float]]":
        if not self._conditions:
            return selection
        # The plus keeps SQLite from asking the full-text index once for each paper that passes the filters.
        return selection.where(literal_column("+paper_fts.rowid").in_(select(Paper.id).where(*self._conditions)))

    def _rows(self, selection: "Select[tuple[int, float]]") -> dict[int, float]:
        rows: list[Any] = list(self._session.execute(selection))
        return {row[0]: row[1] for row in rows}


class _Postgresql(_Words):
    _table = table("search_text", column("paper_id"), column("vector"))

    def scores(self) -> dict[int, float]:
        self._total = self._session.scalar(text("SELECT count(*) FROM search_text")) or 1
        return rank(self._question, self._hits, self._phrase)

    def _hits(self, word: str, unfinished: bool) -> Mapping[int, float]:
        hits = self._match("plainto_tsquery('english', :words)", word)
        if not hits and unfinished and len(word) >= 3 and re.fullmatch(r"\w+", word):
            hits = self._match("to_tsquery('english', :words)", f"'{word}':*")
        if not hits and (near := self._nearest(word)):
            hits = self._match("plainto_tsquery('english', :words)", near)
        return hits

    def _phrase(self, pair: str) -> Mapping[int, float]:
        return self._match("phraseto_tsquery('english', :words)", pair.strip('"'))

    def _match(self, query: str, words: str) -> dict[int, float]:
        """Rank by the weights of the fields, times the rarity of the words, as BM25 has it."""
        asked = text(query).bindparams(words=words)
        rows: Select[Any] = select(
            self._table.c.paper_id.label("id"),
            func.ts_rank(literal_column("'{0.1,0.3,0.6,1.0}'::float4[]"), self._table.c.vector, asked).label("rank"),
            func.count().over().label("number"),
        ).where(self._table.c.vector.op("@@")(asked))
        if self._conditions:
            rows = rows.where(self._table.c.paper_id.in_(select(Paper.id).where(*self._conditions)))
        found = self._session.execute(rows.order_by(text("rank DESC")).limit(COMMON)).all()
        return {row.id: row.rank * math.log(1.0 + self._total / row.number) for row in found}


def similar(session: Session, paper: Paper, limit: int = 5) -> list[Paper]:
    """Papers whose words are nearest to a paper's title: for papers without tags."""
    found = find(session, paper.title, per_page=limit + 1).page.papers
    return [other for other in found if other.id != paper.id][:limit]
