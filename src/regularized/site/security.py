"""What keeps hostile input harmless: headers, limits, signatures, and the checks of forms and addresses."""

import hashlib
import hmac
import ipaddress
import logging
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeAlias
from urllib.parse import urlsplit

import anyio
from itsdangerous import BadSignature, TimestampSigner, URLSafeSerializer
from sqlalchemy import delete, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from regularized.site.models import RateCount
from regularized.site.settings import Settings

__all__ = [
    "CONTENT_POLICY",
    "LARGEST_BODY",
    "SLOWEST_BODY",
    "BodyLimit",
    "Headers",
    "PlainText",
    "ProxyCheck",
    "TooOften",
    "address_of",
    "count_try",
    "form_token",
    "hashed",
    "is_form_token",
    "local_path",
    "new_token",
    "open_cookie",
    "open_link",
    "seal_cookie",
    "seal_link",
    "security_headers",
]

log: logging.Logger = logging.getLogger(__name__)

Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send: TypeAlias = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

LARGEST_BODY = 128 * 1024
"""Bytes of a request: the longest comment that is allowed, in any script, fits in."""

SLOWEST_BODY = 20.0
"""Seconds in which a request must have arrived: a connection that is never done is a place that nobody else has."""

CONTENT_POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "form-action 'self'",
        "base-uri 'none'",
        "frame-ancestors 'none'",
    ]
)


def security_headers(*, secure: bool) -> dict[str, str]:
    """Headers of every answer.

    Args:
        secure: whether people come by https.
    """
    headers = {
        "content-security-policy": CONTENT_POLICY,
        "x-content-type-options": "nosniff",
        "referrer-policy": "same-origin",
        "permissions-policy": "camera=(), geolocation=(), microphone=()",
        "cross-origin-opener-policy": "same-origin",
        "cross-origin-resource-policy": "same-origin",
    }
    return headers | ({"strict-transport-security": "max-age=31536000"} if secure else {})


class Headers:
    """Adds the security headers to every answer, also to errors; what a handler has set stays.

    Args:
        app: the application.
        secure: whether people come by https.
    """

    def __init__(self, app: Application, *, secure: bool) -> None:
        self._app = app
        self._headers = [(name.encode(), value.encode()) for name, value in security_headers(secure=secure).items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""

        async def with_headers(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                given = list(message.get("headers", []))
                names = {name.lower() for name, _ in given}
                message["headers"] = given + [header for header in self._headers if header[0] not in names]
            await send(message)

        await self._app(scope, receive, with_headers if scope["type"] == "http" else send)


class BodyLimit:
    """Refuses requests whose body is too large (413) or does not arrive in time (408), before anything reads it.

    Args:
        app: the application.
        largest: bytes.
        slowest: seconds.
    """

    def __init__(self, app: Application, *, largest: int = LARGEST_BODY, slowest: float = SLOWEST_BODY) -> None:
        self._app = app
        self._largest = largest
        self._slowest = slowest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self._largest:
            await self._too_large(send)
            return
        # The length may be missing or a lie: what arrives is counted, too, before the application sees any of it.
        body = b""
        more = True
        with anyio.move_on_after(self._slowest):
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return
                body += message.get("body", b"")
                more = message.get("more_body", False)
                if len(body) > self._largest:
                    await self._too_large(send)
                    return
        if more:
            await _refuse(send, 408, f"The request did not arrive within {self._slowest:g} seconds.")
            return
        passed_on = False

        async def replay() -> MutableMapping[str, Any]:
            nonlocal passed_on
            if passed_on:
                return await receive()
            passed_on = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, replay, send)

    async def _too_large(self, send: Send) -> None:
        await _refuse(send, 413, f"The request is larger than {self._largest} bytes.")


class ProxyCheck:
    """Tells the operator, once, that a proxy in front is not believed although it says for whom it asks.

    All visitors then count as one, and the limits of a few lock out everybody.

    Args:
        app: the application.
        settings: settings of the site.
    """

    def __init__(self, app: Application, *, settings: Settings) -> None:
        self._app = app
        self._silent = settings.proxies > 0
        if settings.secure and not self._silent:
            self._warn(f"{settings.url} is reached by https, which a proxy in front must speak")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        if not self._silent and scope["type"] == "http":
            forwarded = {b"x-forwarded-for", b"forwarded"} & {name for name, _ in scope["headers"]}
            if forwarded:
                self._silent = True
                self._warn(f"a request came with the header {min(forwarded).decode()}")
        await self._app(scope, receive, send)

    @staticmethod
    def _warn(what: str) -> None:
        log.warning(
            "%s, but REGULARIZED_SITE_PROXIES is 0: all visitors count as one address, and a few can use up the limits "
            "of all. Set it to the number of proxies in front of this server",
            what,
        )


class PlainText:
    """Refuses addresses with a null character, which PostgreSQL does not store and nobody types: 400.

    Args:
        app: the application.
    """

    def __init__(self, app: Application) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        if scope["type"] == "http" and ("\0" in scope["path"] or b"%00" in scope["query_string"]):
            await _refuse(send, 400, "The address has a null character.")
            return
        await self._app(scope, receive, send)


async def _refuse(send: Send, status: int, message: str) -> None:
    """Answer, and close the connection: what else comes over it is not wanted."""
    text = f"{message}\n".encode()
    headers = [
        (b"content-type", b"text/plain; charset=utf-8"),
        (b"content-length", str(len(text)).encode()),
        (b"connection", b"close"),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text})


# -- tokens and signatures ----------------------------------------------------------------------


def new_token() -> str:
    """A token that nobody can guess: 256 bits."""
    return secrets.token_urlsafe(32)


def hashed(token: str) -> str:
    """What is kept of a token: who reads the database cannot use it."""
    return hashlib.sha256(token.encode()).hexdigest()


def seal_cookie(settings: Settings, value: str, *, salt: str) -> str:
    """Sign the value of a cookie, with the time."""
    return TimestampSigner(settings.secret, salt=salt).sign(value).decode()


def open_cookie(settings: Settings, sealed: str, *, salt: str, max_age: int) -> str | None:
    """The value of a signed cookie; None when it is not ours or too old."""
    try:
        return TimestampSigner(settings.secret, salt=salt).unsign(sealed, max_age=max_age).decode()
    except (BadSignature, UnicodeDecodeError):
        return None


def seal_link(settings: Settings, value: object, *, purpose: str) -> str:
    """A signed part of an address: it says what it is for, and serves for nothing else."""
    return str(URLSafeSerializer(settings.secret, salt=f"link:{purpose}").dumps(value))


def open_link(settings: Settings, sealed: str, *, purpose: str) -> Any:
    """The value of :func:`seal_link`; None when it is not ours."""
    try:
        return URLSafeSerializer(settings.secret, salt=f"link:{purpose}").loads(sealed)
    except BadSignature:
        return None


def form_token(settings: Settings, visitor: str) -> str:
    """What a form of ours carries: another site cannot know it, since it depends on the visitor's cookie.

    It is masked anew each time: pages go out compressed, and beside words that a visitor was made to search for, a
    token that stays the same could be read from their length (BREACH).
    """
    mask = secrets.token_bytes(32)
    return (mask + _masked(mask, _form_key(settings, visitor))).hex()


def is_form_token(settings: Settings, visitor: str, token: str) -> bool:
    """Whether a form carries the token of this visitor."""
    try:
        given = bytes.fromhex(token)
    except ValueError:
        return False
    return len(given) == 64 and hmac.compare_digest(_masked(given[:32], given[32:]), _form_key(settings, visitor))


def _form_key(settings: Settings, visitor: str) -> bytes:
    return hmac.new(settings.secret.encode(), f"form:{visitor}".encode(), hashlib.sha256).digest()


def _masked(mask: bytes, value: bytes) -> bytes:
    return bytes(a ^ b for a, b in zip(mask, value))


# -- addresses ----------------------------------------------------------------------------------


def local_path(target: str, default: str = "/") -> str:
    """A path of this site to go to next; what leads anywhere else becomes the default.

    Examples:
        >>> local_path("/papers/x?y=1#z")
        '/papers/x?y=1#z'
        >>> [local_path(bad) for bad in ("https://e.com", "//e.com", "/\\\\e.com", "/\\t/e.com", "javascript:x", "")]
        ['/', '/', '/', '/', '/', '/']
    """
    fine = target.startswith("/") and not target.startswith("//") and target.isprintable() and "\\" not in target
    if not fine or len(target) > 500:
        return default
    parts = urlsplit(target)
    return target if not parts.scheme and not parts.netloc else default


def address_of(settings: Settings, scope: Scope) -> str:
    """The visitor's address, for limits: that of the connection, or what the last believed proxy saw.

    Addresses of version 6 count by their first 64 bits, of which one visitor has them all.
    """
    client = scope.get("client")
    address = client[0] if client else "unknown"
    if settings.proxies:
        forwarded = dict(scope["headers"]).get(b"x-forwarded-for", b"").decode("latin-1")
        hops = [hop.strip() for hop in forwarded.split(",") if hop.strip()]
        if len(hops) >= settings.proxies:
            address = hops[-settings.proxies]
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address[:60]
    return str(ipaddress.ip_network((parsed, 64), strict=False)) if parsed.version == 6 else str(parsed)


# -- limits -------------------------------------------------------------------------------------


class TooOften(Exception):
    """Something was tried too often.

    Args:
        wait: seconds after which it may be tried again.
    """

    def __init__(self, wait: int) -> None:
        super().__init__(f"too many tries; wait {wait} seconds")
        self.wait = wait


def count_try(session: Session, key: str, *, most: int, seconds: int, now: int) -> None:
    """Count a try, and refuse it beyond a number in a window of time.

    The count is in the database, so that several server processes share it.

    Args:
        session: a session that writes.
        key: what is tried, and by whom.
        most: tries in a window.
        seconds: length of the window.
        now: seconds since 1970.

    Raises:
        TooOften: there were more.
    """
    window = now - now % seconds
    dialect = sqlite if session.get_bind().dialect.name == "sqlite" else postgresql
    tried = dialect.insert(RateCount).values(key=f"{key[:180]}/{seconds}", window=window, count=1)
    session.execute(tried.on_conflict_do_update(index_elements=["key", "window"], set_={"count": RateCount.count + 1}))
    number = session.scalar(
        select(RateCount.count).where(RateCount.key == f"{key[:180]}/{seconds}", RateCount.window == window)
    )
    if number == 1:
        session.execute(delete(RateCount).where(RateCount.window < now - 7 * 24 * 3600))
    if (number or 0) > most:
        raise TooOften(window + seconds - now)
