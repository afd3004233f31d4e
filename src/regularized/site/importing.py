"""Getting papers in: what comes from elsewhere is matched with what is known, and nothing is doubled.

Papers are matched by arXiv identifier, then by title. What comes in is listed as "no runnable code yet", and never
changes what a card says. Where it comes from: :mod:`~regularized.site.listing` (a saved page) and
:mod:`~regularized.site.remote` (arXiv and the Daily Papers).
"""

import datetime
import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from sqlalchemy import select
from sqlalchemy.orm import Session

from regularized.site.database import one_at_a_time
from regularized.site.listing import Listed, PageDay
from regularized.site.models import Alias, LastImport, Paper, RemovedPaper
from regularized.site.sync import find_known, index_paper, title_key

__all__ = ["Incoming", "Stored", "dated", "remember", "store"]

Outcome: TypeAlias = Literal["added", "known", "updated", "removed"]


@dataclass(frozen=True, slots=True)
class Incoming:
    """A paper from elsewhere.

    Args:
        title: title.
        date: first posted.
        source: ``"listing"``, ``"arxiv"`` or ``"daily"``.
        abstract: abstract.
        authors: names.
        authors_count: how many; 0 if unknown.
        organization: that of the authors.
        comments: discussion entries where it is listed.
        votes: votes where it is listed.
        arxiv: identifier.
        code_url: the authors' code.
        listed_on: the day on whose list it stands; default the day when it was posted.
    """

    title: str
    date: datetime.date
    source: str
    abstract: str = ""
    authors: tuple[str, ...] = ()
    authors_count: int = 0
    organization: str = ""
    comments: int = 0
    votes: int = 0
    arxiv: str = ""
    code_url: str = ""
    listed_on: datetime.date | None = None


@dataclass(frozen=True, slots=True)
class Stored:
    """What became of a paper.

    Args:
        title: its title.
        slug: where it is.
        outcome: ``"added"``, ``"known"``, ``"updated"`` where something was missing before, or ``"removed"`` for one
            that a moderator has removed, and which is left out.
    """

    title: str
    slug: str
    outcome: Outcome


def dated(
    session: Session, entries: Sequence[Listed], saved: datetime.date, *, own_day: PageDay | None = None
) -> list[Incoming]:
    """Entries with their full dates.

    Where the page leaves the year out, it means the year when it was saved. A paper that is known here settles it; else
    the day that is given counts.

    Args:
        session: the database.
        entries: entries of one page.
        saved: the day when the page was saved, as far as is known.
        own_day: the day in the page's head, on whose list the papers stand; default none.
    """
    keys = [title_key(entry.title) for entry in entries]
    known = dict(session.execute(select(Paper.title_key, Paper.date).where(Paper.title_key.in_(keys))).all())
    years = {
        known[key].year
        for key, entry in zip(keys, entries)
        if entry.year is None and key in known and (known[key].month, known[key].day) == (entry.month, entry.day)
    }
    if years and max(years) < saved.year:
        # The page was saved in that year; on which day does not matter any more.
        saved = datetime.date(max(years), 12, 31)
    listed_on = own_day.on(saved) if own_day else None
    # What stands on the list of a day was posted by then.
    saved = listed_on or saved
    return [
        Incoming(
            title=entry.title,
            date=entry.on(saved),
            source="listing",
            abstract=entry.abstract,
            authors_count=entry.authors_count,
            organization=entry.organization,
            comments=entry.comments,
            listed_on=listed_on,
        )
        for entry in entries
    ]


def store(session: Session, papers: Iterable[Incoming], *, now: int) -> list[Stored]:
    """Add what is new, complete what is known.

    Args:
        session: a session that writes; the caller commits.
        papers: papers from elsewhere.
        now: seconds since 1970.
    """
    one_at_a_time(session, "catalogue")
    return [_store(session, incoming, now) for incoming in papers]


def remember(
    session: Session, source: str, what: str, *, now: int, stored: Sequence[Stored] = (), error: str = ""
) -> None:
    """Keep what an import brought, or why it failed, for the page of changes.

    Args:
        session: a session that writes; the caller commits.
        source: where from, as of :class:`Incoming`.
        what: the day or week.
        now: seconds since 1970.
        stored: what became of the papers.
        error: why there are none; empty where it worked.
    """
    one_at_a_time(session, "catalogue")
    last = session.get(LastImport, source) or LastImport(source=source, worked_at=None)
    last.at, last.what, last.error = now, what, error
    last.added, last.seen = sum(row.outcome == "added" for row in stored), len(stored)
    last.worked_at = last.worked_at if error else now
    session.add(last)


def _is_removed(session: Session, incoming: Incoming) -> bool:
    """Whether a moderator has removed this paper."""
    same = RemovedPaper.title_key == title_key(incoming.title)
    if incoming.arxiv:
        same |= RemovedPaper.arxiv == incoming.arxiv
    return session.scalar(select(RemovedPaper.title_key).where(same).limit(1)) is not None


def _store(session: Session, incoming: Incoming, now: int) -> Stored:
    paper = find_known(session, arxiv=incoming.arxiv or None, title=incoming.title)
    if paper is None and _is_removed(session, incoming):
        return Stored(incoming.title, "", "removed")
    if paper is None:
        paper = Paper(
            slug=_free_slug(session, incoming),
            title=incoming.title,
            title_key=title_key(incoming.title),
            arxiv=incoming.arxiv or None,
            date=incoming.date,
            listed_on=incoming.listed_on or incoming.date,
            source=incoming.source,
            added_at=now,
            changed_at=now,
            abstract=incoming.abstract,
            authors=list(incoming.authors),
            authors_count=incoming.authors_count or len(incoming.authors),
            organization=incoming.organization,
            listed_comments=incoming.comments,
            listed_votes=incoming.votes,
            code_url=incoming.code_url,
            families=[],
            tags=[],
            card={},
        )
        session.add(paper)
        session.flush()
        index_paper(session, paper)
        return Stored(paper.title, paper.slug, "added")
    changed = _complete(paper, incoming)
    if changed:
        paper.changed_at = now
        if not paper.has_card:
            session.flush()
            index_paper(session, paper)
    return Stored(paper.title, paper.slug, "updated" if changed else "known")


def _complete(paper: Paper, incoming: Incoming) -> bool:
    """Fill in what a known paper lacks. Numbers of a listing grow; facts of a card stay."""
    new: dict[str, Any] = {
        "abstract": paper.abstract or incoming.abstract,
        "listed_votes": max(paper.listed_votes, incoming.votes),
        # The first list counts; before it, a paper stands on the day when it was posted.
        "listed_on": (incoming.listed_on if paper.listed_on == paper.date else None) or paper.listed_on,
    }
    if not paper.has_card:
        new |= {
            "listed_comments": max(paper.listed_comments, incoming.comments),
            "arxiv": paper.arxiv or incoming.arxiv or None,
            "authors": paper.authors or list(incoming.authors),
            "authors_count": paper.authors_count or incoming.authors_count or len(incoming.authors),
            "organization": paper.organization or incoming.organization,
            "code_url": paper.code_url or incoming.code_url,
        }
    changed = {name: value for name, value in new.items() if getattr(paper, name) != value}
    for name, value in changed.items():
        setattr(paper, name, value)
    return bool(changed)


def _free_slug(session: Session, incoming: Incoming) -> str:
    """An address for a paper without a card; its dashes tell it from slugs of cards, which have none."""
    if incoming.arxiv:
        base = f"arxiv-{incoming.arxiv}"
    else:
        words = re.findall(r"[a-z0-9]+", incoming.title.lower())
        # A title without such letters is named after its hash, to have an address that stays.
        name = "-".join(words)[:60].strip("-") or hashlib.sha256(incoming.title.encode()).hexdigest()[:12]
        base = f"paper-{name}"
    taken = {
        *session.scalars(select(Paper.slug).where(Paper.slug.startswith(base, autoescape=True))),
        *session.scalars(select(Alias.slug).where(Alias.slug.startswith(base, autoescape=True))),
    }
    return next(slug for slug in (base, *(f"{base}-{i}" for i in range(2, len(taken) + 3))) if slug not in taken)
