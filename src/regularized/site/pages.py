"""The pages that anybody may read: lists, search, papers, comparison, and how evidence works."""

import datetime
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import HTMLResponse, PlainTextResponse, RedirectResponse
from sqlalchemy import select
from sqlalchemy.orm import Session

from regularized.papers.card import FAMILIES
from regularized.papers.catalogue import UnknownPaper, find
from regularized.site import queries, search
from regularized.site.dependencies import Read, SiteOf
from regularized.site.guides import guide
from regularized.site.models import Follow, LastImport, Paper, Vote
from regularized.site.plots import plots_of
from regularized.site.queries import VERDICTS, Filters, Order, Page, Period
from regularized.site.rendering import page as render
from regularized.site.state import Site
from regularized.site.visitors import Visitor, VisitorOf

__all__ = [
    "BadRequest",
    "FiltersOf",
    "NotFound",
    "PageNumber",
    "bibtex",
    "leading",
    "related",
    "router",
    "show_list",
]

router: APIRouter = APIRouter(include_in_schema=False, default_response_class=HTMLResponse)

PageNumber = Annotated[int, Query(alias="page", ge=1, le=10_000, description="Which page, from 1.")]
QuestionText = Annotated[str, Query(alias="q", max_length=400, description="Your problem, in your words.")]

_LEADERS = 5
"""Techniques of a problem on the leaderboard."""

ORDERS: dict[Order, tuple[str, str, str]] = {
    "best": (
        "Best proven",
        "Published techniques for regularized training, ordered by what could be measured: verdicts and effects, never "
        "votes.",
        "The catalogue is empty.",
    ),
    "new": ("Newest", "All papers, the latest first.", "The catalogue is empty."),
    "trending": (
        "Trending",
        "What readers vote for and discuss now; a vote counts half as much after every week. It says nothing about "
        "evidence.",
        "Nobody has voted or commented yet. Be the first: open a paper that you have tried.",
    ),
}


class NotFound(Exception):
    """There is no such page.

    Args:
        message: what there is not.
        suggestions: slugs that may have been meant.
    """

    def __init__(self, message: str, suggestions: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.suggestions = suggestions


class BadRequest(Exception):
    """A parameter has a value that is not allowed; the message says which are."""


def _filters(
    family: Annotated[str, Query(max_length=40, description="Problem family.")] = "",
    tag: Annotated[str, Query(max_length=80, description="Tag.")] = "",
    year: Annotated[str, Query(max_length=4, description="Year in which it was posted.")] = "",
    verdict: Annotated[str, Query(max_length=20, description="Verdict that at least one claim has.")] = "",
    runs: Annotated[str, Query(max_length=5, description="1: only papers with code that runs.")] = "",
) -> Filters:
    if family and family not in FAMILIES:
        raise BadRequest(f"there is no problem family {family!r}; there are: {', '.join(FAMILIES)}")
    if verdict and verdict not in VERDICTS:
        raise BadRequest(f"there is no verdict {verdict!r}; there are: {', '.join(VERDICTS)}")
    if year and not (year.isascii() and year.isdecimal() and 1900 <= int(year) <= 2999):
        raise BadRequest(f"year must be a year such as 2024, got {year!r}")
    if runs not in ("", "0", "1", "true", "false"):
        raise BadRequest(f"runs must be 1 or 0, got {runs!r}")
    return Filters(family, tag.strip(), int(year) if year else None, verdict, runs in ("1", "true"))


FiltersOf = Annotated[Filters, Depends(_filters)]


# -- lists --------------------------------------------------------------------------------------


def show_list(
    site: Site,
    request: Request,
    visitor: Visitor,
    page: Page,
    *,
    title: str,
    lead: str,
    empty: str,
    feed: str = "",
    **values: object,
) -> Response:
    """A page of a list of papers, with its title, what it is, and what it says when it is empty."""
    if page.number > page.last:
        raise NotFound(f"This list has {page.last} pages.")
    with site.read() as session:
        voted_ids = queries.voted_for(session, visitor.person, page.papers)
    shown: dict[str, Any] = {
        "page": page,
        "title": title,
        "lead": lead,
        "empty": empty,
        "feed": feed,
        "params": {},
        "voted_ids": voted_ids,
        **values,
    }
    return render(site, request, visitor, "list.html", **shown)


@router.get("/")
def best(site: SiteOf, request: Request, session: Read, visitor: VisitorOf, number: PageNumber = 1) -> Response:
    """Best proven papers, and the problems."""
    title, lead, empty = ORDERS["best"]
    return show_list(
        site,
        request,
        visitor,
        queries.list_papers(session, "best", page=number),
        title=title,
        lead=lead,
        empty=empty,
        feed="/feeds/best",
        counts=queries.counts(session),
        all_families=site.families.of(session, site.settings.now),
    )


@router.get("/new")
def newest(site: SiteOf, request: Request, session: Read, visitor: VisitorOf, number: PageNumber = 1) -> Response:
    """All papers, newest first."""
    title, lead, empty = ORDERS["new"]
    found = queries.list_papers(session, "new", page=number)
    return show_list(site, request, visitor, found, title=title, lead=lead, empty=empty, feed="/feeds/new")


@router.get("/trending")
def trending(site: SiteOf, request: Request, session: Read, visitor: VisitorOf, number: PageNumber = 1) -> Response:
    """What is voted for and discussed now."""
    title, lead, empty = ORDERS["trending"]
    found = queries.list_papers(session, "trending", page=number)
    return show_list(site, request, visitor, found, title=title, lead=lead, empty=empty, feed="/feeds/trending")


@router.get("/families/{family}")
def familyshow_list(
    site: SiteOf, request: Request, session: Read, visitor: VisitorOf, family: str, number: PageNumber = 1
) -> Response:
    """Papers of a problem family."""
    if family not in FAMILIES:
        raise NotFound(f"There is no problem family “{family}”.")
    words = FAMILIES[family]
    follows = visitor.person is not None and session.get(Follow, (visitor.person.id, family)) is not None
    return show_list(
        site,
        request,
        visitor,
        queries.list_papers(session, filters=Filters(family=family), page=number),
        title=words[0].upper() + words[1:],
        lead="Best proven first.",
        empty="No paper of this problem is in the catalogue yet.",
        feed=f"/feeds/family/{family}",
        family=family,
        follows=follows,
    )


PeriodKind = Literal["day", "week", "month"]


def _latest(kind: PeriodKind, session: Session, date: str) -> Response:
    if date:
        try:
            day = datetime.date.fromisoformat(date)
        except ValueError:
            raise BadRequest(f"date must be a date such as 2026-03-02, got {date!r}") from None
    else:
        day = queries.latest_day(session) or datetime.date.today()
    return RedirectResponse(f"/{kind}/{Period.containing(kind, day).name}", 302)


DateText = Annotated[str, Query(max_length=10)]


@router.get("/day")
def latest_day(session: Read, date: DateText = "") -> Response:
    """To a day: that of a date, or the latest with papers."""
    return _latest("day", session, date)


@router.get("/week")
def latest_week(session: Read, date: DateText = "") -> Response:
    """To a week."""
    return _latest("week", session, date)


@router.get("/month")
def latest_month(session: Read, date: DateText = "") -> Response:
    """To a month."""
    return _latest("month", session, date)


def _period(
    site: Site, request: Request, session: Session, visitor: Visitor, kind: PeriodKind, name: str, number: int
) -> Response:
    try:
        period = Period.parse(kind, name)
    except ValueError:
        raise NotFound(f"“{name}” is not a {kind}.") from None
    before, after = queries.periods_around(session, period)
    return show_list(
        site,
        request,
        visitor,
        queries.list_papers(session, filters=Filters(period=period), page=number),
        title=f"Papers of {period.words}",
        lead=f"What was posted on this {kind}, best proven first."
        if kind == "day"
        else f"What was posted in this {kind}, best proven first.",
        empty=f"No paper is listed for {period.words}. The nearest {kind}s with papers are linked above.",
        period=period,
        before=before,
        after=after,
    )


@router.get("/day/{name}")
def dayshow_list(
    site: SiteOf, request: Request, session: Read, visitor: VisitorOf, name: str, number: PageNumber = 1
) -> Response:
    """Papers of a day."""
    return _period(site, request, session, visitor, "day", name, number)


@router.get("/week/{name}")
def weekshow_list(
    site: SiteOf, request: Request, session: Read, visitor: VisitorOf, name: str, number: PageNumber = 1
) -> Response:
    """Papers of an ISO week."""
    return _period(site, request, session, visitor, "week", name, number)


@router.get("/month/{name}")
def monthshow_list(
    site: SiteOf, request: Request, session: Read, visitor: VisitorOf, name: str, number: PageNumber = 1
) -> Response:
    """Papers of a month."""
    return _period(site, request, session, visitor, "month", name, number)


# -- search -------------------------------------------------------------------------------------


@router.get("/search")
def search_page(
    site: SiteOf,
    request: Request,
    session: Read,
    visitor: VisitorOf,
    filters: FiltersOf,
    question: QuestionText = "",
    number: PageNumber = 1,
) -> Response:
    """Search with filters; every search is an address, and a feed."""
    found = search.find(session, question, filters=filters, page=number, meaning=site.meaning)
    if number > found.page.last:
        raise NotFound(f"This search has {found.page.last} pages.")
    return render(
        site,
        request,
        visitor,
        "search.html",
        query=question,
        filters=filters,
        params={"q": question, **filters.query()},
        page=found.page,
        voted_ids=queries.voted_for(session, visitor.person, found.page.papers),
        by_meaning=found.by_meaning,
        encoder=site.meaning is not None,
        is_loading=site.is_loading,
        verdicts=VERDICTS,
        years=queries.years(session),
        tags=site.tags.of(session, site.settings.now),
    )


# -- a paper ------------------------------------------------------------------------------------


def paper_or_404(site: Site, session: Session, slug: str) -> Paper:
    """The paper of a slug.

    Raises:
        NotFound: there is none; suggests the nearest of the catalogue.
    """
    paper = queries.by_slug(session, slug)
    if paper is not None:
        return paper
    suggestions: tuple[str, ...] = ()
    try:
        find(slug[:80], site.settings.package)
    except UnknownPaper as error:
        suggestions = error.suggestions
    raise NotFound(f"There is no paper “{slug}” here.", suggestions)


def bibtex(paper: Paper) -> str:
    """The paper as a BibTeX entry: that of its card, or one of the facts that are known."""
    if paper.card.get("bibtex"):
        return str(paper.card["bibtex"])

    @dataclass(frozen=True)
    class Facts:
        slug = paper.slug.replace("-", "_")
        title = paper.title
        date = paper.date
        authors = paper.authors
        authors_count = paper.authors_count
        arxiv = paper.arxiv or ""
        venue = paper.venue

    from regularized.papers.card import Card

    return Card.bibtex(Facts())  # type: ignore[arg-type]


@router.get("/papers/{slug}")
def paper_page(
    site: SiteOf,
    request: Request,
    session: Read,
    visitor: VisitorOf,
    slug: str,
    comments: Annotated[int, Query(ge=1, le=10_000, description="Which page of the comments, from 1.")] = 1,
) -> Response:
    """A paper: facts, use, evidence, discussion."""
    paper = paper_or_404(site, session, slug)
    if paper.slug != slug:
        return RedirectResponse(f"/papers/{paper.slug}", 301)
    last = queries.comment_pages(session, paper)
    if comments > last:
        raise NotFound(f"The comments on this paper have {last} pages.")
    voted = visitor.person is not None and session.get(Vote, (visitor.person.id, paper.id)) is not None
    return render(
        site,
        request,
        visitor,
        "paper.html",
        paper=paper,
        plots=plots_of(
            paper.slug, paper.fingerprint, package=site.settings.package, folder=site.settings.folder / "plots"
        ),
        related=related(session, paper),
        comments=queries.comments_of(session, paper, comments),
        reported=queries.reported_by(session, visitor.person, paper),
        comments_page=comments,
        comments_last=last,
        bibtex=bibtex(paper),
        guide=guide(paper.slug, site.settings.package) if paper.runs else "",
        voted=voted,
    )


def related(session: Session, paper: Paper) -> list[Paper]:
    """Papers that share tags and families with a paper; where it has no tags, words of its title."""
    return queries.related(session, paper) if paper.tags else search.similar(session, paper)


def leading(session: Session) -> dict[str, list[Paper]]:
    """For each problem the techniques of which most is proven, with their claims."""
    measured = [paper for paper in queries.comparison(session) if paper.held]
    boards = {name: [paper for paper in measured if name in paper.families][:_LEADERS] for name in FAMILIES}
    return {name: papers for name, papers in boards.items() if papers}


@router.get("/leaders")
def leaders(site: SiteOf, request: Request, session: Read, visitor: VisitorOf) -> Response:
    """For each problem, the techniques of which most is proven."""
    return render(site, request, visitor, "leaders.html", boards=leading(session))


@router.get("/changes")
def changes(site: SiteOf, request: Request, session: Read, visitor: VisitorOf) -> Response:
    """What became known when: verdicts that are others now, and papers that came in."""
    days, last = queries.changes_by_day(session), session.get(LastImport, "daily")
    return render(site, request, visitor, "changes.html", days=days, last_import=last)


@router.get("/compare")
def compare(site: SiteOf, request: Request, session: Read, visitor: VisitorOf) -> Response:
    """All techniques that run, side by side."""
    return render(site, request, visitor, "compare.html", papers=queries.comparison(session))


@router.get("/about")
def about(site: SiteOf, request: Request, visitor: VisitorOf) -> Response:
    """How evidence works."""
    encoder = site.meaning.encoder.name if site.meaning else ""
    return render(site, request, visitor, "about.html", encoder=encoder, is_loading=site.is_loading)


@router.get("/health", response_class=PlainTextResponse)
def health(session: Read) -> str:
    """Whether the site can read its database."""
    session.execute(select(1))
    return "ok\n"


@router.get("/robots.txt", response_class=PlainTextResponse)
def robots() -> str:
    """What crawlers may read: everything but searches and what people do."""
    return "User-agent: *\nDisallow: /search\nDisallow: /sign-in\nDisallow: /me\nDisallow: /digest\n"
