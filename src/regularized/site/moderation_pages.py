"""The moderators' page, and the forms that only they see. To everybody else it is not there."""

from typing import Annotated, Literal, TypeAlias

from fastapi import APIRouter, Depends, Form, Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse
from sqlalchemy import func, select
from sqlalchemy.orm import joinedload

from regularized.site.dependencies import Read, SiteOf, Write
from regularized.site.models import Comment, ModerationEvent, Paper, Person, Report, Submission
from regularized.site.moderation import CORRECTABLE, MODERATOR, Moderation, NotPossible
from regularized.site.pages import BadRequest, NotFound, paper_or_404
from regularized.site.rendering import page as render
from regularized.site.visitors import SignedIn, VisitorOf

__all__ = ["ModeratorOf", "Reason", "router"]

router: APIRouter = APIRouter(include_in_schema=False, default_response_class=HTMLResponse)

_SHOWN = 100
Reason = Annotated[str, Form(max_length=500)]


def _moderator(person: SignedIn) -> Person:
    if person.role != MODERATOR:
        raise NotFound("There is nothing at this address.")
    return person


ModeratorOf: TypeAlias = Annotated[Person, Depends(_moderator)]


@router.get("/moderation")
def moderation_page(site: SiteOf, request: Request, session: Read, visitor: VisitorOf) -> Response:
    """What was reported, who is banned, and what was done."""
    if visitor.person is None or visitor.person.role != MODERATOR:
        raise NotFound("There is nothing at this address.")
    reported = (
        select(Comment, func.count(Report.person_id), func.min(Report.at))
        .join(Report, Report.comment_id == Comment.id)
        .group_by(Comment.id)
        .order_by(func.count(Report.person_id).desc(), func.min(Report.at))
        .limit(_SHOWN)
    )
    rows = session.execute(reported).all()
    numbers = [row[0].id for row in rows]
    reasons: dict[int, list[str]] = {number: [] for number in numbers}
    for told in session.scalars(select(Report).where(Report.comment_id.in_(numbers)).order_by(Report.at)):
        reasons[told.comment_id].append(told.reason)
    papers = {
        paper.id: paper
        for paper in session.scalars(select(Paper).where(Paper.id.in_([row[0].paper_id for row in rows])))
    }
    latest = select(Comment).options(joinedload(Comment.person)).order_by(Comment.id.desc()).limit(20)
    return render(
        site,
        request,
        visitor,
        "moderation.html",
        reported=[(row[0], papers[row[0].paper_id], reasons[row[0].id]) for row in rows],
        latest=session.scalars(latest).all(),
        slugs=dict(session.execute(select(Paper.id, Paper.slug).where(Paper.comments > 0)).all()),
        submissions=session.scalars(
            select(Submission).options(joinedload(Submission.person)).order_by(Submission.at).limit(_SHOWN)
        ).all(),
        banned=session.scalars(select(Person).where(Person.banned_because.is_not(None)).order_by(Person.id)).all(),
        events=session.scalars(select(ModerationEvent).order_by(ModerationEvent.id.desc()).limit(_SHOWN)).all(),
    )


@router.post("/moderation/comments/{number}")
def moderate_comment(
    site: SiteOf,
    session: Write,
    moderator: ModeratorOf,
    number: int,
    act: Annotated[Literal["hide", "show"], Form()],
    reason: Reason = "",
) -> Response:
    """Hide a comment, or show it."""
    comment = session.get(Comment, number) if number < 2**31 else None
    if comment is None:
        raise NotFound("There is no such comment.")
    acting = Moderation(session, moderator.email, site.settings.now)
    try:
        (acting.hide if act == "hide" else acting.show)(comment, reason)
    except NotPossible as error:
        raise BadRequest(str(error)) from None
    return RedirectResponse("/moderation", 303)


@router.post("/moderation/people/{number}")
def moderate_person(
    site: SiteOf,
    session: Write,
    moderator: ModeratorOf,
    number: int,
    act: Annotated[Literal["ban", "unban"], Form()],
    reason: Reason = "",
    hide_comments: Annotated[str, Form(max_length=1)] = "",
) -> Response:
    """Ban a person, or lift the ban."""
    person = session.get(Person, number) if number < 2**31 else None
    if person is None:
        raise NotFound("There is no such person.")
    acting = Moderation(session, moderator.email, site.settings.now)
    try:
        if act == "ban":
            acting.ban(person, reason, hide_comments=bool(hide_comments))
        else:
            acting.unban(person, reason)
    except NotPossible as error:
        raise BadRequest(str(error)) from None
    return RedirectResponse("/moderation", 303)


@router.post("/moderation/papers/{slug}")
def moderate_paper(
    site: SiteOf,
    session: Write,
    moderator: ModeratorOf,
    slug: str,
    act: Annotated[Literal["remove", "correct"], Form()],
    field: Annotated[str, Form(max_length=20)] = "",
    value: Annotated[str, Form(max_length=5000)] = "",
    reason: Reason = "",
) -> Response:
    """Remove a paper, or correct a fact of it."""
    paper = paper_or_404(site, session, slug)
    acting = Moderation(session, moderator.email, site.settings.now)
    try:
        if act == "remove":
            acting.remove(paper, reason)
            return RedirectResponse("/moderation", 303)
        if field not in CORRECTABLE:
            raise NotPossible(f"choose what to correct: {', '.join(CORRECTABLE)}")
        acting.correct(paper, {field: value.replace("\0", "")}, reason)
    except NotPossible as error:
        raise BadRequest(str(error)) from None
    return RedirectResponse(f"/papers/{paper.slug}", 303)
