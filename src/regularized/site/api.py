"""Everything that the pages show, as JSON: read-only, without an account, described by OpenAPI."""

import datetime
from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any, Literal, cast

from fastapi import APIRouter, Depends, Path, Query, Request, Response
from pydantic import BaseModel

from regularized.evidence.claims import Kind, Verdict
from regularized.papers.card import FAMILIES
from regularized.site import queries, search
from regularized.site.api_schemas import (
    Board,
    ChangeItem,
    Changes,
    ClaimItem,
    CommentItem,
    CommentList,
    DayItem,
    FamilyItem,
    Import,
    PaperItem,
    PaperList,
    PaperPage,
    Plot,
    Problem,
    Totals,
    Verdicts,
)
from regularized.site.dependencies import Read, SiteOf
from regularized.site.feeds import code_state
from regularized.site.guides import guide
from regularized.site.models import ClaimRow, Comment, LastImport, Paper, VerdictChange
from regularized.site.pages import NotFound, bibtex, leading, paper_or_404, related
from regularized.site.plots import plots_of
from regularized.site.queries import Filters, Order, Period
from regularized.site.rendering import page as render
from regularized.site.responses import cached
from regularized.site.state import Site
from regularized.site.templating import shown_name, with_query
from regularized.site.visitors import VisitorOf

__all__ = ["router"]

router: APIRouter = APIRouter()

_NO_NULL = r"^[^\x00]*$"  # refused for all addresses, see security
Slug = Annotated[str, Path(max_length=120)]
Family = StrEnum("Family", {name: name for name in FAMILIES})  # type: ignore[misc]


_PROBLEM = {"content": {"application/problem+json": {"schema": Problem.model_json_schema()}}}
_ANSWERS: dict[int | str, dict[str, Any]] = {
    304: {"description": "What you have is up to date (If-None-Match)."},
    400: {
        "description": "The address has a null character.",
        "content": {"text/plain": {"schema": {"type": "string"}}},
    },
    422: {"description": "A parameter has a value that is not allowed.", **_PROBLEM},
}
_OR_NONE: dict[int | str, dict[str, Any]] = {404: {"description": "There is no such thing.", **_PROBLEM}, **_ANSWERS}


def _filters(
    family: Annotated[Family | None, Query(description="Problem family.")] = None,
    tag: Annotated[str, Query(max_length=80, pattern=_NO_NULL, description="Tag.")] = "",
    year: Annotated[int | None, Query(ge=1900, le=2999, description="Year in which it was posted.")] = None,
    verdict: Annotated[Verdict | None, Query(description="Verdict that at least one claim has.")] = None,
    implemented: Annotated[bool, Query(description="Only papers with code that runs.")] = False,
    listed: Annotated[datetime.date | None, Query(description="A day of the list on which they stand.")] = None,
    period: Annotated[
        Literal["day", "week", "month"], Query(description="With `listed`: that day, its ISO week, or its month.")
    ] = "day",
) -> Filters:
    around = None if listed is None else Period.containing(period, listed)
    return Filters(family.value if family else "", tag, year, verdict.value if verdict else "", implemented, around)


@router.get("/api", include_in_schema=False)
def api_page(site: SiteOf, request: Request, visitor: VisitorOf) -> Response:
    """What the API offers, for people."""
    paths = request.app.openapi()["paths"]
    operations = [(path, methods["get"]["summary"]) for path, methods in paths.items()]
    return render(site, request, visitor, "api.html", operations=operations)


@router.get("/api/v1/papers", response_model=PaperList, responses=_OR_NONE, summary="Lists, and search with filters")
def list_papers(
    site: SiteOf,
    request: Request,
    session: Read,
    filters: Annotated[Filters, Depends(_filters)],
    q: Annotated[str, Query(max_length=400, pattern=_NO_NULL, description="Your problem, in your words.")] = "",
    order: Annotated[Order, Query(description="Order where nothing is asked.")] = "best",
    page: Annotated[int, Query(ge=1, le=10_000)] = 1,
    per_page: Annotated[int, Query(ge=1, le=100)] = 20,
) -> Response:
    """Papers, best proven first; with ``q``, those that fit the question best: the search of the command line."""
    if q.strip():
        found = search.find(session, q, filters=filters, page=page, per_page=per_page, meaning=site.meaning)
        listed, by_meaning = found.page, found.by_meaning
    else:
        listed = queries.list_papers(session, order, filters=filters, page=page, per_page=per_page)
        by_meaning = False
    following = _following(site, "/api/v1/papers", dict(request.query_params), page, listed.last)
    body = PaperList(
        total=listed.total,
        page=page,
        per_page=per_page,
        next=following,
        by_meaning=by_meaning,
        papers=[PaperItem(**_item(site, paper)) for paper in listed.papers],
    )
    return _answer(request, body, following=following)


@router.get("/api/v1/papers/{slug}", response_model=PaperPage, responses=_OR_NONE, summary="A paper with its evidence")
def show_paper(site: SiteOf, request: Request, session: Read, slug: Slug) -> Response:
    """All that is known of a paper: facts, use, claims with verdicts, effects and intervals, cost, BibTeX."""
    paper = paper_or_404(site, session, slug)
    card = paper.card
    body = PaperPage(
        **_item(site, paper),
        abstract=paper.abstract,
        abstract_claims=card.get("abstract", []),
        changes=card.get("changes", ""),
        needs=card.get("needs", []),
        when_to_use=card.get("when_to_use", ""),
        when_not_to_use=card.get("when_not_to_use", ""),
        unconfirmed=card.get("unconfirmed", []),
        missing=card.get("missing", ["no card"]),
        names=(card.get("implementation") or {}).get("names", []),
        usage=card.get("usage", ""),
        bibtex=bibtex(paper),
        claims=[_claim(claim) for claim in paper.claims],
        evidence=card.get("evidence"),
        cost=card.get("cost"),
        floor=(card.get("implementation") or {}).get("floor"),
        official=card.get("official"),
        exceptions=card.get("exceptions", []),
        guide=guide(paper.slug, site.settings.package) if paper.runs else "",
        related=[other.slug for other in related(session, paper)],
    )
    return _answer(request, body)


@router.get(
    "/api/v1/papers/{slug}/comments",
    response_model=CommentList,
    responses=_OR_NONE,
    summary="What readers say of a paper, with answers",
)
def list_comments(
    site: SiteOf,
    request: Request,
    session: Read,
    slug: Slug,
    page: Annotated[int, Query(ge=1, le=10_000)] = 1,
) -> Response:
    """A page of the comments on a paper, oldest first; the answers to one come behind it and name it."""
    paper = paper_or_404(site, session, slug)
    last = queries.comment_pages(session, paper)
    following = _following(site, f"/api/v1/papers/{paper.slug}/comments", {}, page, last)
    shown = f"{site.settings.url}/papers/{paper.slug}" + (f"?comments={page}" if page > 1 else "")
    body = CommentList(
        page=page,
        pages=last,
        next=following,
        comments=[_comment(comment, shown) for comment in queries.comments_of(session, paper, page)],
    )
    return _answer(request, body, following=following)


@router.get(
    "/api/v1/papers/{slug}/plots", response_model=list[Plot], responses=_OR_NONE, summary="Plots of a paper's runs"
)
def list_plots(site: SiteOf, request: Request, session: Read, slug: Slug) -> Response:
    """The effect of each seed for every claim, and learning curves, as SVG; none without runs."""
    paper = paper_or_404(site, session, slug)
    drawn = plots_of(
        paper.slug, paper.fingerprint, package=site.settings.package, folder=site.settings.folder / "plots"
    )
    rows = [Plot(kind="effect", name=name, svg=svg) for name, svg in drawn.effects.items()]
    return _rows(request, rows + [Plot(kind="curve", name=name, svg=svg) for name, svg in drawn.curves])


@router.get(
    "/api/v1/leaders", response_model=list[Board], responses=_ANSWERS, summary="The best proven of each problem"
)
def list_leaders(site: SiteOf, request: Request, session: Read) -> Response:
    """For each problem the techniques of which most is proven, the best first."""
    boards = leading(session)
    rows = [
        Board(family=name, words=FAMILIES[name], papers=[PaperItem(**_item(site, paper)) for paper in papers])
        for name, papers in boards.items()
    ]
    return _rows(request, rows)


@router.get("/api/v1/changes", response_model=Changes, responses=_ANSWERS, summary="What changed, by day")
def show_changes(site: SiteOf, request: Request, session: Read) -> Response:
    """Verdicts that became others and papers that came in, the latest day first; when papers were last asked for."""
    last = session.get(LastImport, "daily")
    days = [
        DayItem(
            date=day.date,
            verdicts=[_change(change) for change in day.verdicts],
            papers=[PaperItem(**_item(site, paper)) for paper in day.papers],
            more=day.more,
        )
        for day in queries.changes_by_day(session)
    ]
    imported = None
    if last is not None:
        imported = Import(
            at=_moment(last.at),
            what=last.what,
            seen=last.seen,
            added=last.added,
            error=last.error,
            worked_at=None if last.worked_at is None else _moment(last.worked_at),
        )
    body = Changes(days=days, last_import=imported)
    return _answer(request, body)


@router.get("/api/v1/totals", response_model=Totals, responses=_ANSWERS, summary="How much there is")
def show_totals(site: SiteOf, request: Request, session: Read) -> Response:
    """How many papers there are, how many run, how many claims have each verdict; years and tags for filters."""
    counted = queries.counts(session)
    body = Totals(
        papers=counted.papers,
        implemented=counted.runs,
        claims=_verdicts(counted.claims),
        years=queries.years(session),
        tags=site.tags.of(session, site.settings.now),
    )
    return _answer(request, body)


@router.get("/api/v1/families", response_model=list[FamilyItem], responses=_ANSWERS, summary="Problem families")
def list_families(request: Request, session: Read) -> Response:
    """Problem families, in words, with the number of their papers."""
    numbers = queries.families(session)
    rows = [FamilyItem(name=name, words=words, papers=numbers.get(name, 0)) for name, words in FAMILIES.items()]
    return _rows(request, rows)


@router.get(
    "/api/v1/verdict-changes", response_model=list[ChangeItem], responses=_ANSWERS, summary="Verdicts that changed"
)
def list_changes(request: Request, session: Read, limit: Annotated[int, Query(ge=1, le=100)] = 50) -> Response:
    """Verdicts that became others, newest first."""
    rows = [_change(change) for change in queries.verdict_changes(session, limit=limit)]
    return _rows(request, rows)


@router.get("/api/{rest:path}", include_in_schema=False)
def nothing(rest: str) -> Response:
    """Any other address below the API."""
    raise NotFound(f"There is nothing at /api/{rest}.")


def _following(site: Site, path: str, query: Mapping[str, str], page: int, last: int) -> str | None:
    """Address of the next page; None behind the last one."""
    return site.settings.url + with_query(path, query, page=page + 1) if page < last else None


def _answer(request: Request, body: BaseModel, *, following: str | None = None) -> Response:
    headers = {"link": f'<{following}>; rel="next"'} if following else None
    return cached(request, body.model_dump_json().encode(), "application/json", headers=headers)


def _rows(request: Request, rows: list[Any]) -> Response:
    body = b"[" + b",".join(row.model_dump_json().encode() for row in rows) + b"]"
    return cached(request, body, "application/json")


def _moment(seconds: int) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC)


def _verdicts(counted: Mapping[str, int]) -> Verdicts:
    return Verdicts(**{verdict.value.replace(" ", "_"): counted.get(verdict.value, 0) for verdict in Verdict})


def _change(change: VerdictChange) -> ChangeItem:
    return ChangeItem(
        slug=change.paper.slug,
        title=change.paper.title,
        claim=change.claim,
        statement=change.statement,
        old=change.old,
        new=change.new,
        at=_moment(change.at),
    )


def _comment(comment: Comment, page: str) -> CommentItem:
    hidden = comment.hidden_because is not None
    return CommentItem(
        id=comment.id,
        answers=comment.thread_id,
        author=shown_name(comment.person),
        moderator=comment.person.role == "moderator",
        at=_moment(comment.at),
        url=f"{page}#comment-{comment.id}",
        text="" if hidden else comment.body,
        html="" if hidden else comment.html,
        hidden_because=comment.hidden_because,
    )


def _item(site: SiteOf, paper: Paper) -> dict[str, Any]:
    keys = ("slug", "title", "date", "authors", "authors_count", "organization", "venue", "problem")
    return {
        **{name: getattr(paper, name) for name in keys},
        "url": f"{site.settings.url}/papers/{paper.slug}",
        "arxiv": paper.arxiv or "",
        "summary": paper.summary or paper.abstract,
        "families": paper.families,
        "tags": paper.tags,
        "code": {"url": paper.code_url, "state": code_state(paper)},
        "implemented": paper.runs,
        "verdicts": _verdicts(paper.verdicts),
        "votes": paper.votes,
        "comments": paper.comments,
        "listed_comments": paper.listed_comments,
    }


def _claim(claim: ClaimRow) -> ClaimItem:
    keys = (
        *("metric", "unit", "direction", "relative", "differs", "baseline", "method", "smallest_effect", "seeds"),
        *("scale", "problem", "p_value", "worst_seed", "data", "model", "sampling", "toy", "reaching", "may_fail"),
        "pilot",
    )
    return ClaimItem(
        id=claim.name,
        statement=claim.statement,
        verdict=Verdict(claim.verdict),
        kind=cast(Kind, claim.kind),
        effect=claim.effect,
        interval=[claim.low, claim.high],
        counts_in_words=claim.details["counts"],
        note=claim.details["note"],
        reported=claim.details["reported"],
        attempts=claim.details.get("attempts", []),
        **{name: claim.details[name] for name in keys},
    )
