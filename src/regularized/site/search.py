"""Search in the tables: the ranking of :mod:`regularized.papers.search`, fed by FTS5 or by PostgreSQL's full text.

On a catalogue of cards it finds what ``regularized papers --search`` finds, in the same order. A word that thousands of
papers hold says little and would cost most of the time: it is scored only among the papers that the rarer words
found; where there is no rarer word, among those that hold all words, the catalogue's own and the newest first.

With a sentence encoder, the ranking by words and that by meaning are joined by reciprocal ranks.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from sqlalchemy import (
    ColumnElement,
    CompoundSelect,
    Float,
    Integer,
    Select,
    String,
    bindparam,
    column,
    func,
    literal_column,
    or_,
    select,
    table,
    text,
)
from sqlalchemy.orm import Session

from regularized.papers.search import RUNNABLE, WEIGHTS, Question, nearest_word, rank, strong
from regularized.site.models import Paper, SearchWord
from regularized.site.queries import PER_PAGE, Filters, Ids, Page, in_all, list_papers, shown

if TYPE_CHECKING:
    from regularized.site.meaning import Meaning

__all__ = ["Found", "find"]

COMMON = 2000
"""A word that more papers hold is common."""

_MOST_WORDS = 24

_MOST_COMMON = 6
"""Common words of a question that are looked at: each costs a look at thousands of papers."""

_MOST_PAIRS = 6
_MOST_COMMON_PAIRS = 3
"""Pairs of neighbours that are looked at, and those of two common words: they cost most."""

_SOME = 500
"""Papers that are looked at where all words are common: the newest, beside the catalogue's own."""

_SAMPLE = 200
"""Papers from which the rarity of two neighbours is told."""

_NEAREST = 50
"""Papers that the meaning adds at most."""

_RANK = 60.0
"""Added to a rank before it is inverted: the usual constant of reciprocal-rank fusion."""


# The plus keeps SQLite from asking the full-text index, and for the rarity of its words, once for each of these papers.
_ROWID: ColumnElement[int] = literal_column("+paper_fts.rowid", Integer)

# bm25() is negative, the better the lower.
_SCORE: ColumnElement[float] = literal_column(f"-bm25(paper_fts, {', '.join(map(str, WEIGHTS.values()))})", Float)

Wanted: TypeAlias = Ids | CompoundSelect[int] | None
"""Numbers of the papers that pass the filters; None for all."""


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
    meaning: "Meaning | None" = None,
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
    wanted = in_all(filters.ids()) if filters else None
    kind = _Sqlite if session.get_bind().dialect.name == "sqlite" else _Postgresql
    words = kind(session, _bounded(Question.parse(query[:400])), wanted)
    own = {
        row.id: row
        for row in session.execute(
            select(Paper.id, Paper.runs, Paper.standing, Paper.margin, Paper.date).where(Paper.has_card)
        )
    }
    scores = strong({n: score * (RUNNABLE if n in own and own[n].runs else 1.0) for n, score in words.scores().items()})
    if meaning is not None:
        near = _only(session, meaning.nearest(session, query[:400], _NEAREST), wanted)
        scores = _joined(scores, near)

    def place(number: int) -> tuple[Any, ...]:
        """Among equals the better proven, then the newest."""
        standing = (own[number].standing, own[number].margin, own[number].date) if number in own else ()
        return scores[number], standing, number

    ids = sorted(scores, key=place, reverse=True)
    shown_ids = ids[(page - 1) * per_page : page * per_page]
    return Found(Page(shown(session, shown_ids), len(ids), page, per_page), meaning is not None)


def _bounded(question: Question) -> Question:
    """A question whose cost is bounded: nobody types more, who wants an answer."""
    return Question(question.words[:_MOST_WORDS], question.pairs[:_MOST_PAIRS])


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


def _only(session: Session, scores: Mapping[int, float], wanted: Wanted) -> dict[int, float]:
    if wanted is None or not scores:
        return dict(scores)
    kept = set(session.scalars(select(Paper.id).where(Paper.id.in_(list(scores)), Paper.id.in_(wanted))))
    return {number: score for number, score in scores.items() if number in kept}


class _Words:
    """Scores by words. What the databases do differently is in the subclasses."""

    def __init__(self, session: Session, question: Question, wanted: Wanted) -> None:
        self._session = session
        self._question = question
        self._wanted = wanted

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
    """Scores by FTS5.

    Its BM25 reads, for every word of an expression, all papers that hold it, to know how rare it is; for two
    neighbours, all places of both. That is asked once for a common word, and not at all for two common neighbours.
    """

    _fts = table("paper_fts", column("rowid", Integer))

    def scores(self) -> dict[int, float]:
        expressions = {
            word: self._expression(word, unfinished=position == len(self._question.words) - 1)
            for position, word in enumerate(self._question.words)
        }
        everywhere = [word for word, expression in expressions.items() if expression and self._is_common(expression)]
        common = everywhere[:_MOST_COMMON]
        rare = {
            word: self._match(expression)
            for word, expression in expressions.items()
            if expression and word not in everywhere
        }
        base: dict[int, float] = {}
        for found in rare.values():
            for number, score in found.items():
                base[number] = base.get(number, 0.0) + score
        among = " OR ".join(expressions[word] for word, found in rare.items() if found)
        together: Mapping[int, float] = {}
        if common and not base:
            together = self._some(" AND ".join(expressions[word] for word in common))

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

        both_common = [pair for pair in self._question.pairs if set(pair.split()) <= set(everywhere)]

        def match(pair: str) -> Mapping[int, float]:
            told = pair.strip('"')
            if told not in both_common:
                return self._match(pair)
            return self._side_by_side(pair, among) if told in both_common[:_MOST_COMMON_PAIRS] else {}

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
        found = self._ids(expression).limit(most)
        return self._session.scalar(select(func.count()).select_from(found.subquery())) or 0

    def _ids(self, expression: str) -> "Select[int]":
        asked = text("paper_fts MATCH :expression").bindparams(bindparam("expression", expression, type_=String))
        return select(self._fts.c.rowid).select_from(self._fts).where(asked)

    def _match(self, expression: str) -> dict[int, float]:
        return self._rows(self._filtered(self._ids(expression)).add_columns(_SCORE))

    def _some(self, expression: str) -> dict[int, float]:
        """Of many: the catalogue's own, and the newest."""
        newest = self._session.scalars(
            self._filtered(self._ids(expression)).order_by(self._fts.c.rowid.desc()).limit(_SOME)
        ).all()
        if len(newest) < _SOME:
            return self._match(expression)
        own = _ROWID.in_(select(Paper.id).where(Paper.has_card))
        some = self._filtered(self._ids(expression)).where(or_(newest[-1] <= _ROWID, own))
        return self._rows(some.add_columns(_SCORE))

    def _side_by_side(self, pair: str, among: str) -> dict[int, float]:
        """Two common neighbours count as if they stood once in a text: the logarithm of how rare they are."""
        asked = self._ids(f"{pair} AND ({among})" if among else pair)
        newest_first = self._fts.c.rowid.desc()
        found = set(self._session.scalars(self._filtered(asked).order_by(newest_first).limit(COMMON)))
        # Asked for each by its number, which is cheap as long as nothing is scored.
        found |= set(self._session.scalars(asked.where(self._fts.c.rowid.in_(select(Paper.id).where(Paper.has_card)))))
        newest = self._session.scalars(self._ids(pair).order_by(newest_first).limit(_SAMPLE)).all()
        last = self._session.scalar(select(func.max(Paper.id))) or 1
        # As many as they are among the newest, they are everywhere.
        between = last - newest[-1] + 1 if len(newest) == _SAMPLE else last
        return dict.fromkeys(found, math.log(1.0 + between / max(1, len(newest))))

    def _filtered(self, selection: "Select[int]") -> "Select[int]":
        return selection if self._wanted is None else selection.where(_ROWID.in_(self._wanted))

    def _rows(self, selection: "Select[int, float]") -> dict[int, float]:
        rows: list[Any] = list(self._session.execute(selection).all())
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
        if self._wanted is not None:
            rows = rows.where(self._table.c.paper_id.in_(self._wanted))
        found = self._session.execute(rows.order_by(text("rank DESC")).limit(COMMON)).all()
        return {row.id: row.rank * math.log(1.0 + self._total / row.number) for row in found}


def similar(session: Session, paper: Paper, limit: int = 5) -> list[Paper]:
    """Papers whose words are nearest to a paper's title: for papers without tags."""
    found = find(session, paper.title, per_page=limit + 1).page.papers
    return [other for other in found if other.id != paper.id][:limit]
