"""A person's own page: name, followed problems, and how to leave."""

from typing import Annotated

from fastapi import APIRouter, Form, Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse
from sqlalchemy import delete, select, update

from regularized.papers.card import FAMILIES
from regularized.site import queries, trending
from regularized.site.database import insert_new
from regularized.site.dependencies import Read, SiteOf, Write
from regularized.site.locks import lock_with_papers
from regularized.site.models import Follow, Paper, Person, Subscription
from regularized.site.moderation import MODERATOR
from regularized.site.names import is_reserved, shown_name, skeleton
from regularized.site.pages import BadRequest, NotFound, PageNumber, show_list
from regularized.site.rendering import page as render
from regularized.site.visitors import SignedIn, VisitorOf

__all__ = ["router"]

router: APIRouter = APIRouter(include_in_schema=False, default_response_class=HTMLResponse)


@router.get("/me")
def me(site: SiteOf, request: Request, session: Read, visitor: VisitorOf) -> Response:
    """What is kept of the person."""
    if visitor.person is None:
        return RedirectResponse("/sign-in?next=/me", 303)
    subscription = session.scalars(select(Subscription).where(Subscription.email == visitor.person.email)).first()
    return render(
        site,
        request,
        visitor,
        "me.html",
        follows=list(session.scalars(select(Follow.family).where(Follow.person_id == visitor.person.id))),
        subscription=subscription if subscription and subscription.confirmed_at else None,
    )


@router.get("/me/problems")
def my_problems(site: SiteOf, request: Request, session: Read, visitor: VisitorOf, number: PageNumber = 1) -> Response:
    """Papers of the problems that a person follows."""
    if visitor.person is None:
        return RedirectResponse("/sign-in?next=/me/problems", 303)
    followed = list(session.scalars(select(Follow.family).where(Follow.person_id == visitor.person.id)))
    words = "; ".join(FAMILIES.get(family, family) for family in followed)
    return show_list(
        site,
        request,
        visitor,
        queries.list_papers(session, "new", families=followed, page=number),
        title="My problems",
        lead=f"The newest papers on what you follow: {words}." if followed else "You follow no problem yet.",
        empty="No paper yet. Open a problem on the first page and follow it: its papers stand here and in your digest.",
    )


@router.post("/me")
def rename(session: Write, person: SignedIn, name: Annotated[str, Form(max_length=60)] = "") -> Response:
    """Choose the name that stands beside one's comments."""
    kept = shown_name(name)
    key = skeleton(kept)[:120] or None
    if kept and key is None:
        raise BadRequest("A name needs a letter or a digit. Go back and choose another one.")
    if person.role != MODERATOR and is_reserved(kept):
        raise BadRequest(f"The name “{kept}” is reserved for who runs this site. Go back and choose another one.")
    if key and session.scalar(select(Person.id).where(Person.name_key == key, Person.id != person.id)):
        raise BadRequest(f"Somebody is called “{kept}”, or so that readers would mix you up. Choose another name.")
    session.execute(update(Person).where(Person.id == person.id).values(name=kept, name_key=key))
    return RedirectResponse("/me", 303)


@router.post("/me/delete")
def delete_me(site: SiteOf, session: Write, person: SignedIn) -> Response:
    """Delete the person with all votes, comments and subscriptions."""
    papers = lock_with_papers(session, person.id)
    session.execute(delete(Subscription).where(Subscription.email == person.email))
    session.execute(delete(Person).where(Person.id == person.id))
    for number in papers:
        trending.update(session, session.get_one(Paper, number))
    response = RedirectResponse("/", 303)
    return response


@router.post("/families/{family}/follow")
def follow(session: Write, person: SignedIn, family: str, on: Annotated[str, Form(max_length=1)] = "") -> Response:
    """Follow a problem, or stop."""
    if family not in FAMILIES:
        raise NotFound(f"There is no problem family “{family}”.")
    if on:
        insert_new(session, Follow, [{"person_id": person.id, "family": family}])
    else:
        session.execute(delete(Follow).where(Follow.person_id == person.id, Follow.family == family))
    return RedirectResponse(f"/families/{family}", 303)
