"""Signing in by an e-mailed link, and out again.

Links in messages only open a page with a button: programs that look at every link of a message must neither sign
anybody in nor use the link up.
"""

from typing import Annotated

from fastapi import APIRouter, Form, Query, Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse
from sqlalchemy import delete, select

from regularized.site import outbox
from regularized.site.database import insert_new
from regularized.site.dependencies import SiteOf, Write
from regularized.site.limits import HOUR, limit, limit_mail, where
from regularized.site.mail import valid_address
from regularized.site.models import Person, SignInToken
from regularized.site.pages import BadRequest
from regularized.site.rendering import page as render
from regularized.site.rendering import said
from regularized.site.security import hashed, local_path, new_token
from regularized.site.visitors import CheckedForm, VisitorOf, end_session, start_session

__all__ = ["LINK_AGE", "router"]

router: APIRouter = APIRouter(include_in_schema=False, default_response_class=HTMLResponse)

LINK_AGE = 15 * 60
"""Seconds for which a sign-in link works."""


@router.get("/sign-in")
def sign_in_page(
    site: SiteOf, request: Request, visitor: VisitorOf, next: Annotated[str, Query(max_length=500)] = "/"
) -> Response:
    """Ask for an address."""
    return render(site, request, visitor, "sign_in.html", goes_to=local_path(next))


@router.post("/sign-in")
def ask_for_link(
    site: SiteOf,
    request: Request,
    visitor: CheckedForm,
    email: Annotated[str, Form(max_length=300)] = "",
    next: Annotated[str, Form(max_length=500)] = "/",
) -> Response:
    """Mail a link. The answer is the same whether the address is known here or not."""
    address = valid_address(email)
    if address is None:
        raise BadRequest("This is not an e-mail address. Go back and correct it.")
    limit_mail(site, request, "link", address, most=5, seconds=HOUR)
    now = site.settings.now
    token = new_token()
    # Link and message are written together; a mail server may take its time, and nobody waits for it.
    with site.write.begin() as session:
        session.execute(delete(SignInToken).where(SignInToken.expires_at <= now))
        goes_to = local_path(next)
        session.add(SignInToken(digest=hashed(token), email=address, goes_to=goes_to, expires_at=now + LINK_AGE))
        outbox.put_page(
            session,
            site,
            address,
            "Sign in to regularized",
            "sign_in",
            expires_at=now + LINK_AGE,
            link=f"{site.settings.url}/sign-in/link?token={token}",
            minutes=LINK_AGE // 60,
        )
        late = outbox.is_late(session)
    site.posted.set()
    message = f"A link goes to {address}. It works once, for {LINK_AGE // 60} minutes."
    if site.settings.smtp is None:
        message += " (This site has no mail server: the message is in its outbox folder.)"
    elif late:
        message += " Our mail server does not take messages at the moment; if none comes, ask again later."
    return said(
        site,
        request,
        visitor,
        "Look into your mailbox",
        message,
    )


@router.get("/sign-in/link")
def link_page(
    site: SiteOf, request: Request, visitor: VisitorOf, token: Annotated[str, Query(max_length=100)] = ""
) -> Response:
    """The page that a mailed link opens: one button. Looking at it changes nothing."""
    return render(site, request, visitor, "sign_in_link.html", link_token=token)


@router.post("/sign-in/link")
def use_link(
    site: SiteOf,
    request: Request,
    session: Write,
    visitor: CheckedForm,
    link_token: Annotated[str, Form(max_length=100)] = "",
) -> Response:
    """Sign in with a link, which is used up by it."""
    now = site.settings.now
    works = (SignInToken.digest == hashed(link_token), SignInToken.expires_at > now)
    # Only tries that fail are counted: nobody who shares an address with others is kept from his own link.
    with site.read() as reading:
        known = reading.scalar(select(SignInToken.digest).where(*works)) is not None
    if not known:
        limit(site, f"token from {where(site, request)}", most=30, seconds=HOUR)
    used = session.execute(
        delete(SignInToken).where(*works).returning(SignInToken.email, SignInToken.goes_to)
    ).one_or_none()
    if used is None:
        return said(
            site,
            request,
            visitor,
            "This link does not work any more",
            f"It was used already, or is older than {LINK_AGE // 60} minutes. Ask for another one.",
            status=403,
            link=("/sign-in", "Ask for another link"),
        )
    insert_new(session, Person, [{"email": used.email, "name": "", "created_at": now}])
    person = session.scalars(select(Person).where(Person.email == used.email)).one()
    if person.banned_because is not None:
        message = f"A moderator has closed this account: {person.banned_because}"
        return said(site, request, visitor, "You cannot sign in", message, status=403)
    response = RedirectResponse(local_path(used.goes_to), 303)
    start_session(site, session, response, person)
    return response


@router.post("/sign-out")
def sign_out(site: SiteOf, session: Write, visitor: CheckedForm) -> Response:
    """Sign out: the cookie is worth nothing afterwards."""
    response = RedirectResponse("/", 303)
    end_session(site, session, response, visitor)
    return response
