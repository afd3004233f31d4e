"""Subscribing to the digest and ending it: no account is needed, and nothing is sent before it is confirmed."""

from typing import Annotated

from fastapi import APIRouter, Form, Query, Request, Response
from fastapi.responses import HTMLResponse, PlainTextResponse
from sqlalchemy import select
from sqlalchemy.orm import Session

from regularized.papers.card import FAMILIES
from regularized.site import outbox
from regularized.site.database import insert_new
from regularized.site.dependencies import Read, SiteOf, Write
from regularized.site.limits import DAY, limit_mail
from regularized.site.mail import valid_address
from regularized.site.models import Follow, Subscription
from regularized.site.pages import BadRequest
from regularized.site.rendering import page as render
from regularized.site.rendering import said
from regularized.site.security import new_token, open_link, seal_link
from regularized.site.state import Site
from regularized.site.visitors import CheckedForm, VisitorOf

__all__ = ["FREQUENCIES", "router"]

router: APIRouter = APIRouter(include_in_schema=False, default_response_class=HTMLResponse)

FREQUENCIES = ("daily", "weekly")


@router.get("/digest")
def digest_page(site: SiteOf, request: Request, session: Read, visitor: VisitorOf) -> Response:
    """Ask for address, frequency and problems."""
    chosen: list[str] = []
    if visitor.person is not None:
        chosen = list(session.scalars(select(Follow.family).where(Follow.person_id == visitor.person.id)))
    return render(site, request, visitor, "digest.html", frequencies=FREQUENCIES, chosen=chosen)


@router.post("/digest")
def subscribe(
    site: SiteOf,
    request: Request,
    visitor: CheckedForm,
    email: Annotated[str, Form(max_length=300)] = "",
    frequency: Annotated[str, Form(max_length=10)] = "weekly",
    family: Annotated[list[str] | None, Form(max_length=len(FAMILIES))] = None,
) -> Response:
    """Ask the owner of an address to confirm; until then nothing is sent.

    The wish is in the signed link alone: an address that somebody else has typed in leaves no trace.
    """
    address = valid_address(email)
    if address is None:
        raise BadRequest("This is not an e-mail address. Go back and correct it.")
    if frequency not in FREQUENCIES:
        raise BadRequest(f"The frequency must be one of {', '.join(FREQUENCIES)}.")
    families = sorted(set(family or []))
    if unknown := set(families) - set(FAMILIES):
        raise BadRequest(f"There is no problem family {sorted(unknown)[0]!r}.")
    limit_mail(site, request, "digest", address, most=3, seconds=DAY)
    wish = {"email": address, "frequency": frequency, "families": families, "at": site.settings.now}
    link = f"{site.settings.url}/digest/confirm?wish={seal_link(site.settings, wish, purpose='subscribe')}"
    with site.write.begin() as session:
        outbox.put_page(
            session, site, address, "Confirm the regularized digest", "confirm", link=link, frequency=frequency
        )
    site.posted.set()
    return said(
        site,
        request,
        visitor,
        "Look into your mailbox",
        f"A link goes to {address}. The digest starts when you have confirmed it.",
    )


Wish = Annotated[str, Query(max_length=2000)]


@router.get("/digest/confirm")
def confirm_page(site: SiteOf, request: Request, visitor: VisitorOf, wish: Wish = "") -> Response:
    """The page that the link opens: one button."""
    value = open_link(site.settings, wish, purpose="subscribe")
    if value is None or value["at"] < site.settings.now - 3 * DAY:
        return _old_link(site, request, visitor)
    return render(site, request, visitor, "digest_confirm.html", wish=wish, value=value)


@router.post("/digest/confirm")
def confirm(
    site: SiteOf,
    request: Request,
    session: Write,
    visitor: CheckedForm,
    wish: Annotated[str, Form(max_length=2000)] = "",
) -> Response:
    """Start the digest."""
    value = open_link(site.settings, wish, purpose="subscribe")
    now = site.settings.now
    if value is None or value["at"] < now - 3 * DAY:
        return _old_link(site, request, visitor)
    fresh = {"email": value["email"], "key": new_token(), "created_at": now, "sent_at": now}
    insert_new(session, Subscription, [{**fresh, "frequency": value["frequency"], "families": value["families"]}])
    found = session.scalars(select(Subscription).where(Subscription.email == value["email"]).with_for_update()).one()
    found.frequency, found.families, found.confirmed_at = value["frequency"], value["families"], now
    return said(
        site,
        request,
        visitor,
        "You are subscribed",
        f"The {value['frequency']} digest goes to {value['email']}. Each message ends it with one click.",
    )


Key = Annotated[str, Query(max_length=300)]


@router.get("/digest/unsubscribe")
def unsubscribe_page(site: SiteOf, request: Request, session: Read, visitor: VisitorOf, key: Key = "") -> Response:
    """The page that the link in a digest opens: one button."""
    subscription = _subscription(site, session, key)
    if subscription is None:
        return _old_link(site, request, visitor)
    return render(site, request, visitor, "digest_end.html", key=key, email=subscription.email)


@router.post("/digest/unsubscribe")
def unsubscribe(site: SiteOf, request: Request, session: Write, visitor: VisitorOf, key: Key = "") -> Response:
    """End a subscription: from the page, or by the mail program itself (RFC 8058), which has no cookie of ours.

    The signed key in the address is the proof that is asked for; ending twice is no error.
    """
    subscription = _subscription(site, session, key)
    if subscription is not None:
        session.delete(subscription)
    elif open_link(site.settings, key, purpose="unsubscribe") is None:
        return _old_link(site, request, visitor)
    if "text/html" not in request.headers.get("accept", ""):
        return PlainTextResponse("unsubscribed\n")
    return said(
        site,
        request,
        visitor,
        "You are unsubscribed",
        "No further digest will come.",
        link=("/digest", "Subscribe again"),
    )


def _subscription(site: Site, session: Session, key: str) -> Subscription | None:
    value = open_link(site.settings, key, purpose="unsubscribe")
    found = session.get(Subscription, value[0]) if value else None
    return found if found is not None and found.key == value[1] else None


def _old_link(site: Site, request: Request, visitor: VisitorOf) -> Response:
    return said(
        site,
        request,
        visitor,
        "This link does not work any more",
        "It is too old, was used already, or is not complete: some mail programs break long lines.",
        status=403,
        link=("/digest", "Subscribe"),
    )
