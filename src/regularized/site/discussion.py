"""Votes and comments: forms of ours that work without JavaScript and lead to the page that shows what they did."""

from typing import Annotated

from fastapi import APIRouter, Form, Response
from fastapi.responses import HTMLResponse, RedirectResponse
from sqlalchemy import delete
from sqlalchemy.orm import Session

from regularized.site import queries, trending
from regularized.site.database import insert_new
from regularized.site.dependencies import SiteOf, Write
from regularized.site.limits import DAY, HOUR, limit
from regularized.site.locks import lock_papers, lock_person
from regularized.site.markdown import render as render_markdown
from regularized.site.models import Comment, Paper, Person, Report, Vote
from regularized.site.pages import BadRequest, NotFound, paper_or_404
from regularized.site.security import local_path
from regularized.site.state import Site
from regularized.site.visitors import SignedIn

__all__ = ["LONGEST_COMMENT", "router"]

router: APIRouter = APIRouter(include_in_schema=False, default_response_class=HTMLResponse)

LONGEST_COMMENT = 8000


@router.post("/papers/{slug}/vote")
def vote(
    site: SiteOf,
    session: Write,
    person: SignedIn,
    slug: str,
    on: Annotated[str, Form(max_length=1)] = "",
    back: Annotated[str, Form(max_length=500)] = "",
) -> Response:
    """Vote, or take the vote back, and return to the list or the paper's page. Voting twice is voting once."""
    limit(site, f"vote {person.id}", most=60, seconds=HOUR)
    paper = paper_or_404(site, session, slug)
    lock_person(session, person.id)
    lock_papers(session, paper.id)
    if on:
        insert_new(session, Vote, [{"person_id": person.id, "paper_id": paper.id, "at": site.settings.now}])
    else:
        session.execute(delete(Vote).where(Vote.person_id == person.id, Vote.paper_id == paper.id))
    trending.update(session, paper)
    if back:
        return RedirectResponse(f"{local_path(back)}#paper-{paper.slug}", 303)
    return RedirectResponse(f"/papers/{paper.slug}", 303)


@router.post("/papers/{slug}/comments")
def comment(
    site: SiteOf,
    session: Write,
    person: SignedIn,
    slug: str,
    body: Annotated[str, Form(max_length=LONGEST_COMMENT)] = "",
) -> Response:
    """Say something about a paper."""
    _limit_comments(site, person)
    return _say(site, session, person, paper_or_404(site, session, slug), body)


@router.post("/comments/{number}/answers")
def answer(
    site: SiteOf,
    session: Write,
    person: SignedIn,
    number: int,
    body: Annotated[str, Form(max_length=LONGEST_COMMENT)] = "",
) -> Response:
    """Answer what somebody has said. An answer to an answer stands beside it, however long they talk."""
    _limit_comments(site, person)
    answered = session.get(Comment, number) if number < 2**31 else None
    if answered is None or answered.hidden_because is not None:
        raise NotFound("What you answer is not there any more. Go back and say it as a comment of its own.")
    paper = session.get_one(Paper, answered.paper_id)
    return _say(site, session, person, paper, body, thread=answered.thread_id or answered.id)


def _limit_comments(site: Site, person: Person) -> None:
    # Before the transaction of the request begins: it counts in one of its own.
    limit(site, f"comment {person.id}", most=10, seconds=600)


def _say(
    site: Site, session: Session, person: Person, paper: Paper, body: str, *, thread: int | None = None
) -> Response:
    text = body.replace("\0", "").replace("\r\n", "\n").strip()
    if not text:
        raise BadRequest("A comment cannot be empty. Go back and write one.")
    lock_person(session, person.id)
    lock_papers(session, paper.id)
    own = Comment(
        paper_id=paper.id,
        person_id=person.id,
        thread_id=thread,
        body=text,
        html=render_markdown(text),
        at=site.settings.now,
    )
    session.add(own)
    session.flush()
    trending.update(session, paper)
    at = queries.page_of_comment(session, own)
    shown = f"?comments={at}" if at > 1 else ""
    return RedirectResponse(f"/papers/{paper.slug}{shown}#comment-{own.id}", 303)


@router.post("/comments/{number}/report")
def report(
    site: SiteOf,
    session: Write,
    person: SignedIn,
    number: int,
    reason: Annotated[str, Form(max_length=500)] = "",
) -> Response:
    """Tell the moderators of a comment that should not be there; once a person."""
    limit(site, f"report {person.id}", most=20, seconds=DAY)
    found = session.get(Comment, number) if number < 2**31 else None
    if found is None or found.hidden_because is not None:
        raise NotFound("There is no such comment.")
    why = reason.replace("\0", "").strip()
    if not why:
        raise BadRequest("Say in a few words what is wrong with the comment.")
    row = {"comment_id": number, "person_id": person.id, "reason": why, "at": site.settings.now}
    insert_new(session, Report, [row])
    paper = session.get_one(Paper, found.paper_id)
    return RedirectResponse(
        f"/papers/{paper.slug}?comments={queries.page_of_comment(session, found)}#comment-{number}", 303
    )


@router.post("/comments/{number}/delete")
def delete_comment(session: Write, person: SignedIn, number: int) -> Response:
    """Delete one's own comment; those of others are not there for one."""
    own = session.get(Comment, number) if number < 2**31 else None
    if own is None or own.person_id != person.id:
        raise NotFound("You have no such comment.")
    paper = session.get_one(Paper, own.paper_id)
    lock_papers(session, paper.id)
    session.execute(delete(Comment).where(Comment.id == number))
    trending.update(session, paper)
    return RedirectResponse(f"/papers/{paper.slug}#discussion", 303)
