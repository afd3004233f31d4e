"""Questions to the tables. Each list is one query for its rows and one for their number, whatever it shows."""

import datetime
from calendar import monthrange
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from sqlalchemy import (
    ColumnElement,
    CompoundSelect,
    Integer,
    Select,
    exists,
    func,
    intersect,
    literal,
    literal_column,
    select,
    tuple_,
)
from sqlalchemy.orm import Session, joinedload, load_only, selectinload

from regularized.evidence.claims import Verdict
from regularized.papers.card import FAMILIES
from regularized.site.models import (
    Alias,
    ClaimRow,
    Comment,
    Paper,
    PaperFamily,
    PaperTag,
    Person,
    Report,
    VerdictChange,
    Vote,
)

__all__ = [
    "PER_PAGE",
    "VERDICTS",
    "Day",
    "Filters",
    "Ids",
    "Order",
    "Page",
    "Period",
    "by_slug",
    "changes_by_day",
    "comment_pages",
    "comments_of",
    "comparison",
    "counts",
    "how_many",
    "in_all",
    "in_order",
    "list_papers",
    "page_of_comment",
    "periods_around",
    "person_of",
    "related",
    "reported_by",
    "tags",
    "verdict_changes",
    "voted_for",
    "years",
]

_thread = func.coalesce(Comment.thread_id, Comment.id)

Ids: TypeAlias = Select[int]
"""A selection of papers by their numbers."""

PER_PAGE = 20
_FEW = 2000
"""Papers that are looked up one by one at most; of more, an index is read."""
COMMENTS_PER_PAGE = 50
VERDICTS = tuple(verdict.value for verdict in Verdict)
Order: TypeAlias = Literal["best", "new", "trending"]

# What a list shows of a paper; the rest of the row stays where it is.
_SHOWN = (
    Paper.slug, Paper.title, Paper.arxiv, Paper.date, Paper.listed_on, Paper.added_at, Paper.changed_at, Paper.problem,
    Paper.summary, Paper.abstract, Paper.authors, Paper.authors_count, Paper.organization, Paper.venue, Paper.families,
    Paper.tags, Paper.code_url, Paper.has_card, Paper.runs, Paper.held, Paper.verdicts,
    Paper.standing, Paper.votes, Paper.comments, Paper.listed_comments, Paper.listed_votes, Paper.heat, Paper.source,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Filters:
    """Which papers are wanted; an empty value asks for nothing.

    Args:
        family: problem family.
        tag: tag.
        year: year in which they were posted.
        verdict: verdict that at least one of their claims has.
        runs: only those with code that runs here.
        period: only those on the list of this day, week or month.

    Examples:
        >>> Filters(family="curriculum", runs=True).query()
        {'family': 'curriculum', 'runs': '1'}
    """

    family: str = ""
    tag: str = ""
    year: int | None = None
    verdict: str = ""
    runs: bool = False
    period: "Period | None" = None

    def ids(self) -> "list[Ids]":
        """For each filter, the numbers of the papers that pass it: each is read from an index, and no paper is."""
        wanted: list[Ids] = []
        if self.family:
            wanted.append(select(PaperFamily.paper_id).where(PaperFamily.family == self.family))
        if self.tag:
            wanted.append(select(PaperTag.paper_id).where(PaperTag.tag == self.tag))
        if self.year is not None:
            first, last = datetime.date(self.year, 1, 1), datetime.date(self.year, 12, 31)
            wanted.append(select(Paper.id).where(Paper.date.between(first, last)))
        if self.verdict:
            wanted.append(select(ClaimRow.paper_id).where(ClaimRow.verdict == self.verdict).distinct())
        if self.runs:
            wanted.append(select(Paper.id).where(Paper.runs))
        if self.period is not None:
            wanted.append(select(Paper.id).where(Paper.listed_on.between(self.period.first, self.period.last)))
        return wanted

    def query(self) -> dict[str, str]:
        """As parameters of an address; the period stands in its path."""
        given = {"family": self.family, "tag": self.tag, "year": str(self.year or ""), "verdict": self.verdict}
        return {name: value for name, value in (given | {"runs": "1" if self.runs else ""}).items() if value}

    def __bool__(self) -> bool:
        return bool(self.ids())


@dataclass(frozen=True, slots=True)
class Page:
    """A page of a list.

    Args:
        papers: its papers.
        total: how many papers the whole list has.
        number: which page, from 1.
        per_page: papers on a page.
    """

    papers: Sequence[Paper]
    total: int
    number: int = 1
    per_page: int = PER_PAGE

    @property
    def last(self) -> int:
        """Number of the last page."""
        return max(1, -(-self.total // self.per_page))


@dataclass(frozen=True, slots=True)
class Period:
    """A day, an ISO week or a month.

    Args:
        kind: ``"day"``, ``"week"`` or ``"month"``.
        first: its first day.

    Examples:
        >>> week = Period.containing("week", datetime.date(2026, 3, 4))
        >>> week.name, week.first.isoformat(), week.last.isoformat()
        ('2026-W10', '2026-03-02', '2026-03-08')
        >>> Period.parse("month", "2024-12").last.isoformat()
        '2024-12-31'
    """

    kind: Literal["day", "week", "month"]
    first: datetime.date

    @classmethod
    def containing(cls, kind: Literal["day", "week", "month"], day: datetime.date) -> "Period":
        """The period that a day lies in."""
        if kind == "week":
            day -= datetime.timedelta(days=day.weekday())
        return cls(kind, day.replace(day=1) if kind == "month" else day)

    @classmethod
    def parse(cls, kind: Literal["day", "week", "month"], name: str) -> "Period":
        """The period of a name.

        Raises:
            ValueError: it is none.
        """
        if not name.isascii() or len(name) != {"day": 10, "week": 8, "month": 7}[kind]:
            raise ValueError(f"not a {kind}: {name!r}")
        day = datetime.date.fromisoformat(f"{name}-01" if kind == "month" else name)
        period = cls.containing(kind, day)
        if period.name != name:
            raise ValueError(f"not a {kind}: {name!r}")
        return period

    @property
    def name(self) -> str:
        """``2026-03-02``, ``2026-W10`` or ``2026-03``."""
        if self.kind == "week":
            year, week, _ = self.first.isocalendar()
            return f"{year}-W{week:02}"
        return self.first.isoformat()[: 7 if self.kind == "month" else 10]

    @property
    def last(self) -> datetime.date:
        """Its last day; the last week of the year 9999 ends with the calendar."""
        if self.kind == "month":
            return self.first.replace(day=monthrange(self.first.year, self.first.month)[1])
        left = (datetime.date.max - self.first).days
        return self.first + datetime.timedelta(days=min(6 if self.kind == "week" else 0, left))

    @property
    def words(self) -> str:
        """For a heading."""
        if self.kind == "month":
            return f"{self.first:%B %Y}"
        day = f"{self.first.day} {self.first:%B %Y}"
        return f"the week of {day}" if self.kind == "week" else day


def in_order(statement: Select[Any], order: Order) -> Select[Any]:
    """A selection of papers in one of the three orders. Votes count in ``trending`` alone."""
    if order == "trending":
        return statement.where(Paper.heat.is_not(None)).order_by(Paper.heat.desc(), Paper.id.desc())
    if order == "new":
        return statement.order_by(Paper.date.desc(), Paper.id.desc())
    return statement.order_by(Paper.standing.desc(), Paper.margin.desc(), Paper.date.desc(), Paper.id.desc())


def list_papers(
    session: Session,
    order: Order = "best",
    *,
    filters: Filters = Filters(),
    families: Sequence[str] | None = None,
    page: int = 1,
    per_page: int = PER_PAGE,
) -> Page:
    """A page of a list."""
    wanted = filters.ids()
    if families is not None:
        wanted.append(select(PaperFamily.paper_id).where(PaperFamily.family.in_(families)).distinct())
    if order == "trending":
        wanted.append(select(Paper.id).where(Paper.heat.is_not(None)))
    together = in_all(wanted)
    total = session.scalar(select(func.count()).select_from(together.subquery())) or 0
    listed = in_order(select(Paper.id), order)
    if wanted:
        # Few are looked up and sorted. Of many, a walk along the index of the order meets a page of them sooner; the
        # plus keeps SQLite from looking them up all the same.
        number = Paper.id if total <= _FEW else literal_column("+paper.id", Integer)
        listed = listed.where(number.in_(together))
    ids = session.scalars(listed.limit(per_page).offset((page - 1) * per_page)).all()
    return Page(shown(session, ids), total, page, per_page)


def in_all(wanted: "Sequence[Ids]") -> "Ids | CompoundSelect[int]":
    """Numbers of the papers that are in all of some selections; of all papers without any."""
    if not wanted:
        return select(Paper.id)
    return wanted[0] if len(wanted) == 1 else intersect(*wanted)


def shown(session: Session, ids: Sequence[int]) -> list[Paper]:
    """Papers of these numbers, in their order, with what lists show."""
    found = {
        paper.id: paper for paper in session.scalars(select(Paper).options(load_only(*_SHOWN)).where(Paper.id.in_(ids)))
    }
    return [found[number] for number in ids if number in found]


def by_slug(session: Session, slug: str) -> Paper | None:
    """The paper of a slug, present or former, with its claims."""
    paper = session.scalars(select(Paper).where(Paper.slug == slug).options(selectinload(Paper.claims))).first()
    if paper is None:
        former = select(Paper).join(Alias, Alias.paper_id == Paper.id).where(Alias.slug == slug)
        paper = session.scalars(former.options(selectinload(Paper.claims))).first()
    return paper


def comment_pages(session: Session, paper: Paper) -> int:
    """How many pages the comments of a paper fill."""
    count = session.scalar(select(func.count()).select_from(Comment).where(Comment.paper_id == paper.id)) or 0
    return max(1, -(-count // COMMENTS_PER_PAGE))


def voted_for(session: Session, person: Person | None, papers: Sequence[Paper]) -> set[int]:
    """Those of some papers that a person has voted for."""
    if person is None or not papers:
        return set()
    shown_ids = [paper.id for paper in papers]
    return set(session.scalars(select(Vote.paper_id).where(Vote.person_id == person.id, Vote.paper_id.in_(shown_ids))))


def person_of(session: Session, email: str) -> Person | None:
    """The person of an address."""
    return session.scalars(select(Person).where(Person.email == email)).first()


def reported_by(session: Session, person: Person | None, paper: Paper) -> set[int]:
    """Comments on a paper that a person has reported."""
    if person is None:
        return set()
    own = select(Report.comment_id).join(Comment, Comment.id == Report.comment_id)
    return set(session.scalars(own.where(Comment.paper_id == paper.id, Report.person_id == person.id)))


def page_of_comment(session: Session, comment: Comment) -> int:
    """On which page of its paper's comments one stands."""
    place = tuple_(_thread, Comment.id)
    before = select(func.count()).where(
        Comment.paper_id == comment.paper_id, place < tuple_(literal(comment.thread_id or comment.id), comment.id)
    )
    return (session.scalar(before) or 0) // COMMENTS_PER_PAGE + 1


def comments_of(session: Session, paper: Paper, page: int = 1) -> Sequence[Comment]:
    """A page of the comments of a paper with their authors, oldest first, each with its answers below it."""
    return session.scalars(
        select(Comment)
        .where(Comment.paper_id == paper.id)
        .options(joinedload(Comment.person))
        .order_by(_thread, Comment.id)
        .limit(COMMENTS_PER_PAGE)
        .offset((page - 1) * COMMENTS_PER_PAGE)
    ).all()


def related(session: Session, paper: Paper, limit: int = 5) -> list[Paper]:
    """Papers that share most tags and families with a paper; among equals those with a card, and the better proven.

    A family counts among papers with a card only: of others there may be tens of thousands. Of thousands that share as
    much, the newest are looked at.
    """
    if not paper.tags and not paper.families:
        return []
    carded = select(Paper.id).where(Paper.has_card)
    common = (
        select(PaperTag.paper_id.label("id"), (2 * func.count()).label("shared"))
        .where(PaperTag.tag.in_(paper.tags), PaperTag.paper_id != paper.id)
        .group_by(PaperTag.paper_id)
        .union_all(
            select(PaperFamily.paper_id, func.count())
            .where(PaperFamily.family.in_(paper.families), PaperFamily.paper_id != paper.id)
            .where(PaperFamily.paper_id.in_(carded))
            .group_by(PaperFamily.paper_id)
        )
        .subquery()
    )
    shared = func.sum(common.c.shared).label("shared")
    found = select(common.c.id, shared).group_by(common.c.id)
    most = dict(
        session.execute(
            found.order_by(shared.desc(), common.c.id.in_(carded).desc(), common.c.id.desc()).limit(10 * limit)
        ).all()
    )
    papers = shown(session, list(most))
    papers.sort(key=lambda other: (most[other.id], other.standing, other.date, -other.id), reverse=True)
    return papers[:limit]


def comparison(session: Session) -> Sequence[Paper]:
    """All techniques that run, best proven first, with their claims and what they cost."""
    return session.scalars(in_order(select(Paper).where(Paper.runs).options(selectinload(Paper.claims)), "best")).all()


def periods_around(session: Session, period: Period) -> tuple[Period | None, Period | None]:
    """The nearest periods before and after that have papers."""
    before = session.scalar(select(func.max(Paper.listed_on)).where(Paper.listed_on < period.first))
    after = session.scalar(select(func.min(Paper.listed_on)).where(Paper.listed_on > period.last))
    return (
        None if before is None else Period.containing(period.kind, before),
        None if after is None else Period.containing(period.kind, after),
    )


def latest_day(session: Session) -> datetime.date | None:
    """The last day that has papers."""
    return session.scalar(select(func.max(Paper.listed_on)))


@dataclass(frozen=True, slots=True)
class Counts:
    """How much there is.

    Args:
        papers: all papers.
        runs: those with code that runs.
        claims: claims with each verdict.
    """

    papers: int
    runs: int
    claims: Mapping[str, int] = field(default_factory=dict)


def counts(session: Session) -> Counts:
    """How much there is."""
    verdicts = session.execute(
        select(ClaimRow.verdict, func.count()).where(ClaimRow.kind == "claim").group_by(ClaimRow.verdict)
    )
    return Counts(*how_many(session), dict(verdicts.all()))


def how_many(session: Session) -> tuple[int, int]:
    """How many papers there are, and how many of them have code that runs."""
    return (
        session.scalar(select(func.count()).select_from(Paper)) or 0,
        session.scalar(select(func.count()).select_from(Paper).where(Paper.runs)) or 0,
    )


def families(session: Session) -> dict[str, int]:
    """Problem families that have papers, in the order of the cards' list, with their number."""
    found = dict(session.execute(select(PaperFamily.family, func.count()).group_by(PaperFamily.family)).all())
    return {name: found[name] for name in FAMILIES if name in found}


def tags(session: Session, limit: int = 60) -> list[str]:
    """The most frequent tags."""
    number = func.count().label("number")
    return list(
        session.scalars(select(PaperTag.tag).group_by(PaperTag.tag).order_by(number.desc(), PaperTag.tag).limit(limit))
    )


def years(session: Session) -> list[int]:
    """From the year of the newest paper back to that of the oldest."""
    # One after the other: SQLite answers the minimum or the maximum from the index, but not both in one query.
    newest, oldest = session.scalar(select(func.max(Paper.date))), session.scalar(select(func.min(Paper.date)))
    return [] if newest is None or oldest is None else list(range(newest.year, oldest.year - 1, -1))


def verdict_changes(session: Session, *, since: int = 0, limit: int = 50) -> Sequence[VerdictChange]:
    """Verdicts that became others, newest first, with their papers."""
    return session.scalars(
        select(VerdictChange)
        .where(VerdictChange.at >= since)
        .options(joinedload(VerdictChange.paper).load_only(*_SHOWN))
        .order_by(VerdictChange.at.desc(), VerdictChange.id.desc())
        .limit(limit)
    ).all()


@dataclass(slots=True)
class Day:
    """What became known on a day.

    Args:
        date: the day (UTC).
        verdicts: verdicts that became others.
        papers: papers that came in.
        more: how many more came in.
    """

    date: datetime.date
    verdicts: list[VerdictChange] = field(default_factory=list)
    papers: list[Paper] = field(default_factory=list)
    more: int = 0


def changes_by_day(session: Session, *, most: int = 200, papers_a_day: int = 10) -> list[Day]:
    """The latest days on which something became known, the latest first."""
    days: dict[datetime.date, Day] = {}

    def day_of(at: int) -> Day:
        date = datetime.datetime.fromtimestamp(at, datetime.UTC).date()
        return days.setdefault(date, Day(date))

    for change in verdict_changes(session, limit=most):
        day_of(change.at).verdicts.append(change)
    came = select(Paper).options(load_only(*_SHOWN)).order_by(Paper.added_at.desc(), Paper.standing.desc()).limit(most)
    for paper in session.scalars(came):
        day = day_of(paper.added_at)
        if len(day.papers) < papers_a_day:
            day.papers.append(paper)
        else:
            day.more += 1
    return sorted(days.values(), key=lambda day: day.date, reverse=True)[:30]


def has_claim(verdict: str) -> ColumnElement[bool]:
    """Whether a paper has a claim of this verdict."""
    return exists().where(ClaimRow.paper_id == Paper.id, ClaimRow.verdict == verdict)
