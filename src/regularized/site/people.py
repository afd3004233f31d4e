"""What people do: sign in by an e-mailed link, vote, comment, follow problems, subscribe to the digest.

Every change is a form of ours (``visitors.CheckedForm``), works without JavaScript, and answers with a redirect to the
page that shows it. Links in messages only open a page with a button: programs that look at every link
of a message must neither sign anybody in nor use the link up.
"""

from typing import Annotated

from fastapi import APIRouter, Form, Query, Request, Response
from fastapi.responses import HTMLResponse, PlainTextResponse, RedirectResponse
from sqlalchemy import delete, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from regularized.papers.card import FAMILIES
from regularized.site import queries, security, trending
from regularized.site.mail import MailError, valid_address
from regularized.site.markdown import render as render_markdown
from regularized.site.models import Comment, Follow, Paper, Person, SignInToken, Subscription, Vote
from regularized.site.pages import BadRequest, NotFound, paper_or_404
from regularized.site.rendering import page as render
from regularized.site.security import count_try, hashed, new_token, open_link, seal_link
from regularized.site.state import Read, Site, SiteOf, Write
from regularized.site.visitors import (
    CheckedForm,
    SignedIn,
    VisitorOf,
    end_session,
    start_session,
)

__all__ = ["FREQUENCIES", "LONGEST_COMMENT", "router", "unsubscribe_link"]

router: APIRouter = APIRouter(include_in_schema=False, default_response_class=HTMLResponse)

FREQUENCIES = ("daily", "weekly")
LONGEST_COMMENT = 8000
LINK_AGE = 15 * 60
"""Seconds for which a sign-in link works."""

_HOUR, _DAY = 3600, 24 * 3600


# -- signing in ---------------------------------------------------------------------------------


@router.get("/sign-in")
def sign_in_page(
    site: SiteOf, request: Request, visitor: VisitorOf, next: Annotated[str, Query(max_length=500)] = "/"
) -> Response:
    """Ask for an address."""
    return render(site, request, visitor, "sign_in.html", goes_to=security.local_path(next))


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
    _limit_mail(site, request, "link", address, most=5, seconds=_HOUR)
    now = site.settings.now
    token = new_token()
    # Written before the message goes out, and no lock is held while a mail server takes its time.
    with site.write.begin() as session:
        session.execute(delete(SignInToken).where(SignInToken.expires_at <= now))
        goes_to = security.local_path(next)
        session.add(SignInToken(digest=hashed(token), email=address, goes_to=goes_to, expires_at=now + LINK_AGE))
    _mail(
        site,
        address,
        "Sign in to regularized",
        "sign_in",
        link=f"{site.settings.url}/sign-in/link?token={token}",
        minutes=LINK_AGE // 60,
    )
    return _said(
        site,
        request,
        visitor,
        "Look into your mailbox",
        f"We have sent a link to {address}. It works once, for {LINK_AGE // 60} minutes."
        + ("" if site.settings.smtp else " (This site has no mail server: the message is in its outbox folder.)"),
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
        _limit(site, f"token from {_where(site, request)}", most=30, seconds=_HOUR)
    used = session.execute(
        delete(SignInToken).where(*works).returning(SignInToken.email, SignInToken.goes_to)
    ).one_or_none()
    if used is None:
        return _said(
            site,
            request,
            visitor,
            "This link does not work any more",
            f"It was used already, or is older than {LINK_AGE // 60} minutes. Ask for another one.",
            status=403,
            link=("/sign-in", "Ask for another link"),
        )
    dialect = sqlite if site.engine.dialect.name == "sqlite" else postgresql
    session.execute(dialect.insert(Person).values(email=used.email, name="", created_at=now).on_conflict_do_nothing())
    person = session.scalars(select(Person).where(Person.email == used.email)).one()
    response = RedirectResponse(security.local_path(used.goes_to), 303)
    start_session(site, session, response, person)
    return response


@router.post("/sign-out")
def sign_out(site: SiteOf, session: Write, visitor: CheckedForm) -> Response:
    """Sign out: the cookie is worth nothing afterwards."""
    response = RedirectResponse("/", 303)
    end_session(site, session, response, visitor)
    return response


# -- one's own page -----------------------------------------------------------------------------


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


@router.post("/me")
def rename(session: Write, person: SignedIn, name: Annotated[str, Form(max_length=60)] = "") -> Response:
    """Choose the name that stands beside one's comments."""
    kept = "".join(letter for letter in " ".join(name.split()) if letter.isprintable())
    session.merge(person, load=True).name = kept
    return RedirectResponse("/me", 303)


@router.post("/me/delete")
def delete_me(site: SiteOf, session: Write, person: SignedIn) -> Response:
    """Delete the person with all votes, comments and subscriptions."""
    papers = {
        *session.scalars(select(Vote.paper_id).where(Vote.person_id == person.id)),
        *session.scalars(select(Comment.paper_id).where(Comment.person_id == person.id)),
    }
    session.execute(delete(Subscription).where(Subscription.email == person.email))
    session.execute(delete(Person).where(Person.id == person.id))
    for number in papers:
        trending.update(session, session.get_one(Paper, number))
    response = RedirectResponse("/", 303)
    return response


# -- votes, comments, follows -------------------------------------------------------------------


@router.post("/papers/{slug}/vote")
def vote(
    site: SiteOf, session: Write, person: SignedIn, slug: str, on: Annotated[str, Form(max_length=1)] = ""
) -> Response:
    """Vote, or take the vote back. Voting twice is voting once."""
    _limit(site, f"vote {person.id}", most=60, seconds=_HOUR)
    paper = paper_or_404(site, session, slug)
    own = session.get(Vote, (person.id, paper.id))
    if on and own is None:
        session.add(Vote(person_id=person.id, paper_id=paper.id, at=site.settings.now))
    elif not on and own is not None:
        session.delete(own)
    session.flush()
    trending.update(session, paper)
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
    _limit(site, f"comment {person.id}", most=10, seconds=600)
    paper = paper_or_404(site, session, slug)
    text = body.replace("\0", "").replace("\r\n", "\n").strip()
    if not text:
        raise BadRequest("A comment cannot be empty. Go back and write one.")
    own = Comment(paper_id=paper.id, person_id=person.id, body=text, html=render_markdown(text), at=site.settings.now)
    session.add(own)
    session.flush()
    trending.update(session, paper)
    last = queries.comment_pages(session, paper)
    shown = f"?comments={last}" if last > 1 else ""
    return RedirectResponse(f"/papers/{paper.slug}{shown}#comment-{own.id}", 303)


@router.post("/comments/{number}/delete")
def delete_comment(session: Write, person: SignedIn, number: int) -> Response:
    """Delete one's own comment; those of others are not there for one."""
    own = session.get(Comment, number) if number < 2**31 else None
    if own is None or own.person_id != person.id:
        raise NotFound("You have no such comment.")
    paper = session.get_one(Paper, own.paper_id)
    session.delete(own)
    session.flush()
    trending.update(session, paper)
    return RedirectResponse(f"/papers/{paper.slug}#discussion", 303)


@router.post("/families/{family}/follow")
def follow(session: Write, person: SignedIn, family: str, on: Annotated[str, Form(max_length=1)] = "") -> Response:
    """Follow a problem, or stop."""
    if family not in FAMILIES:
        raise NotFound(f"There is no problem family “{family}”.")
    own = session.get(Follow, (person.id, family))
    if on and own is None:
        session.add(Follow(person_id=person.id, family=family))
    elif not on and own is not None:
        session.delete(own)
    return RedirectResponse(f"/families/{family}", 303)


# -- the digest ---------------------------------------------------------------------------------


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
    _limit_mail(site, request, "digest", address, most=3, seconds=_DAY)
    wish = {"email": address, "frequency": frequency, "families": families, "at": site.settings.now}
    link = f"{site.settings.url}/digest/confirm?wish={seal_link(site.settings, wish, purpose='subscribe')}"
    _mail(site, address, "Confirm the regularized digest", "confirm", link=link, frequency=frequency)
    return _said(
        site,
        request,
        visitor,
        "Look into your mailbox",
        f"We have sent a link to {address}. The digest starts when you have confirmed it.",
    )


Wish = Annotated[str, Query(max_length=2000)]


@router.get("/digest/confirm")
def confirm_page(site: SiteOf, request: Request, visitor: VisitorOf, wish: Wish = "") -> Response:
    """The page that the link opens: one button."""
    value = open_link(site.settings, wish, purpose="subscribe")
    if value is None or value["at"] < site.settings.now - 3 * _DAY:
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
    if value is None or value["at"] < now - 3 * _DAY:
        return _old_link(site, request, visitor)
    found = session.scalars(select(Subscription).where(Subscription.email == value["email"])).first()
    if found is None:
        found = Subscription(email=value["email"], key=new_token(), created_at=now, sent_at=now)
        session.add(found)
    found.frequency, found.families, found.confirmed_at = value["frequency"], value["families"], now
    return _said(
        site,
        request,
        visitor,
        "You are subscribed",
        f"The {value['frequency']} digest goes to {value['email']}. Each message ends it with one click.",
    )


def unsubscribe_link(site: Site, subscription: Subscription) -> str:
    """Address that ends a subscription, for the headers and the foot of its messages."""
    sealed = seal_link(site.settings, [subscription.id, subscription.key], purpose="unsubscribe")
    return f"{site.settings.url}/digest/unsubscribe?key={sealed}"


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
    return _said(
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


# -- shared -------------------------------------------------------------------------------------


def _limit(site: Site, key: str, *, most: int, seconds: int) -> None:
    # In a transaction of its own: what is refused or fails afterwards has been tried all the same.
    with site.write.begin() as session:
        count_try(session, key, most=most, seconds=seconds, now=site.settings.now)


def _limit_mail(site: Site, request: Request, kind: str, address: str, *, most: int, seconds: int) -> None:
    """Limit messages by who asks for them.

    What all together may ask for one mailbox is much more than what one may: else a stranger's few requests would keep
    its owner out.
    """
    where = _where(site, request)
    name, _, host = address.partition("@")
    mailbox = f"{name.partition('+')[0]}@{host}"  # ada+1 and ada+2 arrive in one mailbox
    _limit(site, f"{kind} from {where} to {mailbox}", most=most, seconds=seconds)
    _limit(site, f"{kind} from {where}", most=20, seconds=_HOUR)
    _limit(site, f"{kind} to {mailbox}", most=10 * most, seconds=seconds)


def _where(site: Site, request: Request) -> str:
    return security.address_of(site.settings, request.scope)


def _mail(site: Site, address: str, subject: str, template: str, **values: object) -> None:
    shown = {"site_url": site.settings.url, **values}
    text, html = (site.templates.get_template(f"mail/{template}.{kind}").render(shown) for kind in ("txt", "html"))
    try:
        site.mailer.send(address, subject, text, html)
    except MailError as error:
        raise MailFailed from error


class MailFailed(Exception):
    """A message could not be sent; the log says why."""


def _said(
    site: Site,
    request: Request,
    visitor: VisitorOf,
    title: str,
    message: str,
    *,
    status: int = 200,
    link: tuple[str, str] = ("/", "Best proven papers"),
) -> Response:
    return render(
        site, request, visitor, "said.html", status=status, **{"title": title, "message": message, "link": link}
    )


def _old_link(site: Site, request: Request, visitor: VisitorOf) -> Response:
    return _said(
        site,
        request,
        visitor,
        "This link does not work any more",
        "It is too old, was used already, or is not complete: some mail programs break long lines.",
        status=403,
        link=("/digest", "Subscribe"),
    )
