"""What stands around every request: headers, the limits of bodies, and the addresses that no page has."""

import logging
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeAlias

import anyio

from regularized.site.settings import Settings

__all__ = [
    "CONTENT_POLICY",
    "LARGEST_BODY",
    "SLOWEST_BODY",
    "BodyLimit",
    "Headers",
    "PlainText",
    "ProxyCheck",
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
