"""Answers that a client may keep, with an ETag and 304 for who has them already; and answers without their body."""

import hashlib
from collections.abc import MutableMapping
from typing import Any

from fastapi import Request, Response

from regularized.site.middleware import Application, Receive, Scope, Send

__all__ = ["Head", "cached", "has_this", "tag_of"]


def tag_of(body: bytes) -> str:
    """The ETag of an answer: a weak one, since it may go out compressed or not."""
    return f'W/"{hashlib.sha256(body).hexdigest()[:32]}"'


def has_this(request: Request, tag: str) -> bool:
    """Whether the client has the answer of a tag already."""
    given = {part.strip().removeprefix("W/") for part in request.headers.get("if-none-match", "").split(",")}
    return tag.removeprefix("W/") in given or "*" in given


def cached(
    request: Request, body: bytes, media_type: str, *, age: int = 60, headers: dict[str, str] | None = None
) -> Response:
    """An answer with an ETag; 304 without a body where the client has this one.

    Args:
        request: the request.
        body: the answer.
        media_type: its type.
        age: seconds for which it may be used without asking.
        headers: further headers.
    """
    tag = tag_of(body)
    own = {"etag": tag, "cache-control": f"public, max-age={age}", "access-control-allow-origin": "*"}
    # For everybody, on other sites, too: it is public, and no cookie has a say in it.
    own |= {"cross-origin-resource-policy": "cross-origin"} | (headers or {})
    if has_this(request, tag):
        return Response(status_code=304, headers=own)
    return Response(body, media_type=media_type, headers=own)


class Head:
    """Answers ``HEAD`` as ``GET``, without the body (RFC 9110): monitors and link checkers ask so.

    Args:
        app: the application.
    """

    def __init__(self, app: Application) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""

        async def without_body(message: MutableMapping[str, Any]) -> None:
            await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

        if scope["type"] == "http" and scope["method"] == "HEAD":
            await self._app({**scope, "method": "GET"}, receive, without_body)
        else:
            await self._app(scope, receive, send)
