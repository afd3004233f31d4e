"""Who asks: sessions in signed cookies, and forms that only our own pages can send.

A person's cookie holds a random token, signed; the table holds its hash, so that signing out ends it. Somebody who is
about to fill in a form without being signed in gets a cookie for the form alone; who only reads gets none.
"""

from dataclasses import dataclass
from typing import Annotated, TypeAlias
from urllib.parse import urlsplit

from fastapi import Depends, Form, Request, Response
from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from regularized.site import security
from regularized.site.dependencies import Read, SiteOf
from regularized.site.models import LoginSession, Person
from regularized.site.settings import Settings
from regularized.site.state import Site

__all__ = [
    "CheckedForm",
    "Forbidden",
    "SignInNeeded",
    "SignedIn",
    "Visitor",
    "VisitorOf",
    "end_session",
    "start_session",
    "visitor_of",
]

SESSION_AGE = 30 * 24 * 3600
_FORM_AGE = 24 * 3600


class Forbidden(Exception):
    """A form did not come from a page of ours."""


class SignInNeeded(Exception):
    """Only a person who has signed in may do this.

    Args:
        goes_to: where to go afterwards.
    """

    def __init__(self, goes_to: str) -> None:
        super().__init__("sign in first")
        self.goes_to = goes_to


@dataclass(slots=True)
class Visitor:
    """Who asks.

    Args:
        settings: settings of the site.
        person: the person; None for somebody who has not signed in.
        key: what identifies the browser, for the tokens of forms; empty when it has no cookie yet.
        totals: how many papers there are, and how many run: every page says so.
    """

    settings: Settings
    person: Person | None = None
    key: str = ""
    totals: tuple[int, int] = (0, 0)
    _new_key: bool = False

    @property
    def form_token(self) -> str:
        """Token for a form; a page that shows one calls :meth:`keep` with its answer."""
        if not self.key:
            self.key, self._new_key = security.new_token(), True
        return security.form_token(self.settings, self.key)

    def keep(self, response: Response) -> None:
        """Set the cookie that a form needs, if one was shown to somebody who had none."""
        if self._new_key:
            sealed = security.seal_cookie(self.settings, self.key, salt="form")
            _set_cookie(self.settings, response, "form", sealed, _FORM_AGE)


def cookie_name(settings: Settings, name: str) -> str:
    """Name of a cookie; the prefix makes browsers refuse one that another host or plain http has set."""
    return f"__Host-{name}" if settings.secure else name


def _set_cookie(settings: Settings, response: Response, name: str, value: str, age: int) -> None:
    response.set_cookie(
        cookie_name(settings, name), value, max_age=age, path="/", secure=settings.secure, httponly=True, samesite="lax"
    )


def _visitor(request: Request, site: SiteOf) -> Visitor:
    # In a session of its own, closed at once: a handler that held one connection and waited for another could wait for
    # others that do the same.
    with site.read() as session:
        visitor = _recognised(request, site.settings, session)
        visitor.totals = site.totals.of(session, site.settings.now)
    request.state.visitor = visitor
    return visitor


def visitor_of(request: Request, site: Site) -> Visitor:
    """Who asks, where no handler could ask for it: an address that does not exist, a form that is refused.

    Args:
        request: the request.
        site: the site.
    """
    known: Visitor | None = getattr(request.state, "visitor", None)
    if known is not None:
        return known
    return _visitor(request, site)


def _recognised(request: Request, settings: Settings, session: Session) -> Visitor:
    cookie = request.cookies.get(cookie_name(settings, "session"), "")
    if cookie:
        token = security.open_cookie(settings, cookie, salt="session", max_age=SESSION_AGE)
        if token is not None:
            found = select(Person).join(LoginSession, LoginSession.person_id == Person.id)
            person = session.scalars(
                found.where(
                    LoginSession.digest == security.hashed(token),
                    LoginSession.expires_at > settings.now,
                    Person.banned_because.is_(None),
                )
            ).first()
            if person is not None:
                return Visitor(settings, person, token)
    sealed = request.cookies.get(cookie_name(settings, "form"), "")
    key = security.open_cookie(settings, sealed, salt="form", max_age=_FORM_AGE) if sealed else None
    return Visitor(settings, None, key or "")


VisitorOf: TypeAlias = Annotated[Visitor, Depends(_visitor)]


def _checked(request: Request, site: SiteOf, visitor: VisitorOf, token: Annotated[str, Form()] = "") -> Visitor:
    """The sender of a form of ours.

    Raises:
        Forbidden: it comes from elsewhere, or its page is too old.
    """
    if request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        raise Forbidden("the form was sent by another site")
    origin = request.headers.get("origin")
    if origin is not None and origin != "null":
        allowed = {urlsplit(site.settings.url).netloc, request.headers.get("host", "")}
        if urlsplit(origin).netloc not in allowed:
            raise Forbidden("the form was sent by another site")
    if not visitor.key or not security.is_form_token(site.settings, visitor.key, token):
        raise Forbidden("the form is too old, or your browser keeps no cookies")
    return visitor


CheckedForm: TypeAlias = Annotated[Visitor, Depends(_checked)]


def _signed_in(request: Request, site: SiteOf, visitor: VisitorOf, token: Annotated[str, Form()] = "") -> Person:
    # First of all: the form of a session that has ended carries a token of nobody.
    if visitor.person is None:
        raise SignInNeeded(security.local_path(urlsplit(request.headers.get("referer", "")).path))
    _checked(request, site, visitor, token)
    return visitor.person


SignedIn: TypeAlias = Annotated[Person, Depends(_signed_in)]
"""The person who sent a form of ours."""


def start_session(site: SiteOf, session: Read, response: Response, person: Person) -> None:
    """Sign a person in: a new token, whatever the browser had before.

    Args:
        site: the site.
        session: a session that writes.
        response: gets the cookie.
        person: who.
    """
    settings = site.settings
    token = security.new_token()
    session.execute(delete(LoginSession).where(LoginSession.expires_at <= settings.now))
    session.add(LoginSession(digest=security.hashed(token), person_id=person.id, expires_at=settings.now + SESSION_AGE))
    sealed = security.seal_cookie(settings, token, salt="session")
    _set_cookie(settings, response, "session", sealed, SESSION_AGE)


def end_session(site: SiteOf, session: Read, response: Response, visitor: Visitor) -> None:
    """Sign a browser out: its cookie is worth nothing afterwards, even to who has copied it."""
    session.execute(delete(LoginSession).where(LoginSession.digest == security.hashed(visitor.key)))
    response.delete_cookie(
        cookie_name(site.settings, "session"), path="/", secure=site.settings.secure, httponly=True, samesite="lax"
    )
