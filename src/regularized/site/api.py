"""Everything that the pages show, as JSON: read-only, without an account, described by OpenAPI."""

import datetime
from enum import StrEnum
from typing import Annotated, Any, Literal, cast

from fastapi import APIRouter, Depends, Path, Query, Request, Response
from pydantic import BaseModel, Field

from regularized.evidence.claims import Kind, Verdict
from regularized.papers.card import FAMILIES
from regularized.site import queries, search
from regularized.site.feeds import code_state
from regularized.site.models import ClaimRow, Paper
from regularized.site.pages import NotFound, bibtex, paper_or_404
from regularized.site.queries import Filters, Order
from regularized.site.rendering import page as render
from regularized.site.rendering import with_query
from regularized.site.responses import cached
from regularized.site.state import Read, SiteOf
from regularized.site.visitors import VisitorOf

__all__ = ["router"]

router: APIRouter = APIRouter()

_NO_NULL = r"^[^\x00]*$"  # refused for all addresses, see security
Family = StrEnum("Family", {name: name for name in FAMILIES})  # type: ignore[misc]


class Problem(BaseModel):
    """An error (RFC 9457)."""

    type: str
    title: str
    status: int
    detail: str


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


class Code(BaseModel):
    """Code of a paper, and its state."""

    url: str = Field(description="The authors' code; empty if none is known.")
    state: Literal["runs here", "authors' code only", "none known"]


class Verdicts(BaseModel):
    """How many claims have each verdict."""

    holds: int
    smaller_than_promised: int
    no_effect_shown: int
    opposite: int
    open: int
    not_run: int


class PaperItem(BaseModel):
    """A paper in a list."""

    slug: str
    title: str
    url: str = Field(description="Its page.")
    date: datetime.date = Field(description="First posted.")
    arxiv: str
    authors: list[str]
    authors_count: int
    organization: str
    venue: str
    problem: str
    summary: str
    families: list[str]
    tags: list[str]
    code: Code
    implemented: bool = Field(description="Whether it has code that runs here.")
    verdicts: Verdicts
    votes: int
    comments: int
    listed_comments: int = Field(description="Comments where it was first listed.")


class ReportedNumber(BaseModel):
    """A number that the paper reports itself."""

    setting: str
    baseline: float | None
    method: float | None
    source: str


class ClaimItem(BaseModel):
    """A claim, and what was measured."""

    id: str
    statement: str
    verdict: Verdict
    metric: str
    unit: str
    direction: Literal["higher", "lower"]
    kind: Kind = Field(description="sanity: true by construction, not counted.")
    relative: bool = Field(description="Whether the effect is a share of the baseline.")
    differs: list[str] = Field(description="Settings in which the two arms may differ.")
    baseline: str
    method: str
    smallest_effect: float | None
    effect: float | None = Field(description="Mean improvement over seeds; positive is better.")
    interval: list[float | None] = Field(description="95 % interval of the effect; two numbers or nulls.")
    p_value: float | None = Field(description="Corrected for the number of claims of the paper.")
    worst_seed: dict[str, float] | None = Field(description="The seed with the smallest effect, and that effect.")
    seeds: int
    data: str
    model: str
    sampling: str = Field(description="fresh: each seed has data of its own; resplit: one small pool, split again.")
    toy: bool = Field(description="Data or model are small where the paper's are not.")
    scale: str
    problem: str
    note: str
    reported: list[ReportedNumber]


class PaperPage(PaperItem):
    """All that is known of a paper."""

    abstract: str
    changes: str
    needs: list[str]
    when_to_use: str
    when_not_to_use: str
    unconfirmed: list[str]
    missing: list[str] = Field(description="What is lacking before it counts as implemented.")
    names: list[str] = Field(description="Public names that implement it.")
    usage: str
    bibtex: str
    claims: list[ClaimItem]
    evidence: dict[str, Any] | None = Field(description="Where the shipped runs come from.")
    cost: dict[str, Any] | None = Field(description="What a step costs.")


class PaperList(BaseModel):
    """A page of a list."""

    total: int
    page: int
    per_page: int
    next: str | None = Field(description="Address of the next page.")
    by_meaning: bool = Field(description="Whether a sentence encoder had a say in the order.")
    papers: list[PaperItem]


class FamilyItem(BaseModel):
    """A problem family."""

    name: str
    words: str
    papers: int


class ChangeItem(BaseModel):
    """A verdict that became another one."""

    slug: str
    title: str
    claim: str
    statement: str
    old: str = Field(description="As it was called then: the words of the rule have changed once.")
    new: str
    at: datetime.datetime


def _filters(
    family: Annotated[Family | None, Query(description="Problem family.")] = None,
    tag: Annotated[str, Query(max_length=80, pattern=_NO_NULL, description="Tag.")] = "",
    year: Annotated[int | None, Query(ge=1900, le=2999, description="Year in which it was posted.")] = None,
    verdict: Annotated[Verdict | None, Query(description="Verdict that at least one claim has.")] = None,
    implemented: Annotated[bool, Query(description="Only papers with code that runs.")] = False,
) -> Filters:
    return Filters(family.value if family else "", tag, year, verdict.value if verdict else "", implemented)


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
    following = None
    if page < listed.last:
        following = site.settings.url + with_query("/api/v1/papers", dict(request.query_params), page=page + 1)
    body = PaperList(
        total=listed.total,
        page=page,
        per_page=per_page,
        next=following,
        by_meaning=by_meaning,
        papers=[PaperItem(**_item(site, paper)) for paper in listed.papers],
    )
    headers = {"link": f'<{following}>; rel="next"'} if following else None
    return cached(request, body.model_dump_json().encode(), "application/json", headers=headers)


@router.get("/api/v1/papers/{slug}", response_model=PaperPage, responses=_OR_NONE, summary="A paper with its evidence")
def show_paper(site: SiteOf, request: Request, session: Read, slug: Annotated[str, Path(max_length=120)]) -> Response:
    """All that is known of a paper: facts, use, claims with verdicts, effects and intervals, cost, BibTeX."""
    paper = paper_or_404(site, session, slug)
    card = paper.card
    body = PaperPage(
        **_item(site, paper),
        abstract=paper.abstract,
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
    )
    return cached(request, body.model_dump_json().encode(), "application/json")


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
    rows = [
        ChangeItem(
            slug=change.paper.slug,
            title=change.paper.title,
            claim=change.claim,
            statement=change.statement,
            old=change.old,
            new=change.new,
            at=datetime.datetime.fromtimestamp(change.at, datetime.UTC),
        )
        for change in queries.verdict_changes(session, limit=limit)
    ]
    return _rows(request, rows)


@router.get("/api/{rest:path}", include_in_schema=False)
def nothing(rest: str) -> Response:
    """Any other address below the API."""
    raise NotFound(f"There is nothing at /api/{rest}.")


def _rows(request: Request, rows: list[Any]) -> Response:
    body = b"[" + b",".join(row.model_dump_json().encode() for row in rows) + b"]"
    return cached(request, body, "application/json")


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
        "verdicts": {verdict.value.replace(" ", "_"): paper.verdicts.get(verdict, 0) for verdict in Verdict},
        "votes": paper.votes,
        "comments": paper.comments,
        "listed_comments": paper.listed_comments,
    }


def _claim(claim: ClaimRow) -> ClaimItem:
    keys = (
        *("metric", "unit", "direction", "relative", "differs", "baseline", "method", "smallest_effect", "seeds"),
        *("scale", "problem", "p_value", "worst_seed", "data", "model", "sampling", "toy"),
    )
    return ClaimItem(
        id=claim.name,
        statement=claim.statement,
        verdict=Verdict(claim.verdict),
        kind=cast(Kind, claim.kind),
        effect=claim.effect,
        interval=[claim.low, claim.high],
        note=claim.details["note"],
        reported=claim.details["reported"],
        **{name: claim.details[name] for name in keys},
    )
