"""What keeps forged input harmless: tokens that nobody can guess, signatures, and paths that stay on this site."""

import hashlib
import hmac
import secrets
from typing import Any
from urllib.parse import urlsplit

from itsdangerous import BadSignature, TimestampSigner, URLSafeSerializer

from regularized.site.settings import Settings

__all__ = [
    "form_token",
    "hashed",
    "is_form_token",
    "local_path",
    "new_token",
    "open_cookie",
    "open_link",
    "seal_cookie",
    "seal_link",
]


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
