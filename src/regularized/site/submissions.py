"""Readers propose papers by their arXiv identifier; a moderator looks before anything is listed."""

from typing import Annotated, Literal

from fastapi import APIRouter, Form, Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse
from sqlalchemy import select

from regularized.site import importing, remote
from regularized.site.database import insert_new
from regularized.site.dependencies import SiteOf, Write
from regularized.site.limits import DAY, limit
from regularized.site.listing import ImportFailed
from regularized.site.models import Paper, RemovedPaper, Submission
from regularized.site.moderation import Moderation, NotPossible
from regularized.site.moderation_pages import ModeratorOf, Reason
from regularized.site.pages import BadRequest, NotFound
from regularized.site.rendering import page as render
from regularized.site.rendering import said
from regularized.site.visitors import SignedIn, VisitorOf

__all__ = ["router"]

router: APIRouter = APIRouter(include_in_schema=False, default_response_class=HTMLResponse)


@router.get("/submit")
def submit_page(site: SiteOf, request: Request, visitor: VisitorOf) -> Response:
    """The form."""
    return render(site, request, visitor, "submit.html")


@router.post("/submit")
def submit(
    site: SiteOf,
    request: Request,
    session: Write,
    visitor: VisitorOf,
    person: SignedIn,
    paper: Annotated[str, Form(max_length=200)] = "",
    reason: Reason = "",
) -> Response:
    """Propose a paper; one that is listed already is shown instead."""
    limit(site, f"submit {person.id}", most=5, seconds=DAY)
    try:
        wanted = remote.arxiv_id(paper)
    except ImportFailed as error:
        raise BadRequest(str(error)) from None
    known = session.scalar(select(Paper.slug).where(Paper.arxiv == wanted))
    if known is not None:
        return RedirectResponse(f"/papers/{known}", 303)
    if session.scalar(select(RemovedPaper.title_key).where(RemovedPaper.arxiv == wanted)) is not None:
        raise BadRequest(f"A moderator has removed arXiv {wanted} from this catalogue.")
    why = reason.replace("\0", "").strip()
    row = {"arxiv": wanted, "person_id": person.id, "reason": why, "at": site.settings.now}
    insert_new(session, Submission, [row])
    thanks = f"A moderator will look at arXiv {wanted}. If it is taken it stands among the newest papers."
    return said(site, request, visitor, "Thank you", thanks, link=("/new", "Newest papers"))


@router.post("/moderation/submissions/{arxiv}")
def decide(
    site: SiteOf,
    moderator: ModeratorOf,
    arxiv: str,
    act: Annotated[Literal["take", "decline"], Form()],
    reason: Reason = "",
) -> Response:
    """List what was proposed, or do not."""
    with site.read() as session:
        if session.get(Submission, arxiv) is None:
            raise NotFound("Nobody has proposed this paper, or it is decided already.")
    # Before the transaction: nobody else's writing waits for arXiv.
    try:
        paper = remote.fetch_arxiv(arxiv, endpoint=remote.ARXIV) if act == "take" else None
    except (ImportFailed, remote.Offline) as error:
        raise BadRequest(f"{error} The proposal waits on.") from None
    with site.write.begin() as session:
        acting = Moderation(session, moderator.email, site.settings.now)
        try:
            acting.decide_submission(arxiv, reason, taken=paper is not None)
        except NotPossible as error:
            raise BadRequest(str(error)) from None
        if paper is None:
            return RedirectResponse("/moderation", 303)
        (stored,) = importing.store(session, [paper], now=site.settings.now)
    return RedirectResponse(f"/papers/{stored.slug}", 303)
