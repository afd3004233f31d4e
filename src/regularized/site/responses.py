"""Answers that a client may keep: with an ETag, and 304 for who has them already."""

import hashlib

from fastapi import Request, Response

__all__ = ["cached"]


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
    tag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
    own = {"etag": tag, "cache-control": f"public, max-age={age}", "access-control-allow-origin": "*"}
    # For everybody, on other sites, too: it is public, and no cookie has a say in it.
    own |= {"cross-origin-resource-policy": "cross-origin"} | (headers or {})
    given = {part.strip().removeprefix("W/") for part in request.headers.get("if-none-match", "").split(",")}
    if tag in given or "*" in given:
        return Response(status_code=304, headers=own)
    return Response(body, media_type=media_type, headers=own)
