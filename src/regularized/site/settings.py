"""Settings of the site. All come from the environment, and every one has a default that works on one's own machine.

===============================  ====================================================================================
``REGULARIZED_SITE_DATABASE``    database URL; default SQLite in the user's data folder
``REGULARIZED_SITE_URL``         the address that people use, for links in feeds and e-mails
``REGULARIZED_SITE_SECRET``      secret that signs cookies; default a file in the data folder, made at the first start
``REGULARIZED_SITE_ENCODER``     ``off``, ``auto`` (default: the packaged MiniLM where it is installed), or a folder
``REGULARIZED_SITE_PROXIES``     how many proxies in front add to X-Forwarded-For; default 0: none is believed
``REGULARIZED_SMTP_HOST``        mail server; without it messages are written to the outbox folder
``REGULARIZED_SMTP_PORT``        default 587
``REGULARIZED_SMTP_USER``        with ``REGULARIZED_SMTP_PASSWORD``; default no login
``REGULARIZED_SMTP_SECURITY``    ``starttls`` (default), ``tls`` or ``none``
``REGULARIZED_MAIL_FROM``        sender; default ``regularized@`` the host of the site's address
``REGULARIZED_ACCESS_LOG``       file for a line of each request, ``-`` for standard error; default none
``REGULARIZED_METRICS_TOKEN``    what Prometheus shows to read ``/metrics``; without it there is no such page
``REGULARIZED_OUTBOX``           folder for messages without a mail server; default ``outbox`` in the data folder
===============================  ====================================================================================
"""

import os
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from regularized.evidence.store import home

__all__ = ["Settings", "SettingsError", "Smtp"]

_SECURITY = ("starttls", "tls", "none")


class SettingsError(ValueError):
    """A setting has a value that is not allowed; the message names the variable."""


@dataclass(frozen=True, slots=True)
class Smtp:
    """A mail server.

    Args:
        host: its name.
        port: its port.
        user: login; empty for none.
        password: password of the login.
        security: ``"starttls"``, ``"tls"`` or ``"none"``.
        timeout: seconds to wait for it, each time it is to answer.
        deadline: seconds for a message as a whole.
    """

    host: str
    port: int = 587
    user: str = ""
    password: str = field(default="", repr=False)
    security: str = "starttls"
    timeout: float = 20.0
    deadline: float = 300.0


@dataclass(frozen=True, slots=True)
class Settings:
    """What the site needs to know.

    Args:
        database: SQLAlchemy URL.
        folder: where secret and outbox lie.
        url: the site's public address, without a slash at its end.
        secret: signs cookies and links.
        outbox: folder for messages when there is no mail server.
        sender: address that mails come from.
        smtp: the mail server; None writes to the outbox.
        encoder: ``"off"``, ``"auto"`` or the folder of a sentence encoder.
        access_log: file of the access log, ``-`` for standard error; empty for none.
        metrics_token: who shows it may read ``/metrics``; empty for nobody.
        proxies: how many proxies in front are believed about the address of a visitor.
        package: the catalogue.
        clock: seconds since 1970.

    Examples:
        >>> secret = "x" * 32
        >>> Settings.from_environment({"REGULARIZED_SITE_SECRET": secret, "REGULARIZED_SITE_URL": "https://a.example/"}).url
        'https://a.example'
    """

    database: str
    folder: Path
    url: str
    secret: str = field(repr=False)
    outbox: Path
    sender: str
    smtp: Smtp | None = None
    encoder: str = "auto"
    access_log: str = ""
    metrics_token: str = field(default="", repr=False)
    proxies: int = 0
    package: str = "regularized.papers"
    clock: Callable[[], float] = time.time

    @property
    def secure(self) -> bool:
        """Whether people reach the site by https, so that cookies may be kept to it."""
        return self.url.startswith("https://")

    @property
    def now(self) -> int:
        """Seconds since 1970."""
        return int(self.clock())

    @classmethod
    def from_environment(
        cls, environment: Mapping[str, str] | None = None, *, default_url: str = "http://127.0.0.1:8000"
    ) -> "Settings":
        """Read the settings.

        Args:
            environment: the variables; default those of the process.
            default_url: public address when no variable gives one.

        Raises:
            SettingsError: a value is not allowed.
        """
        given = os.environ if environment is None else environment
        folder = home() / "site"
        url = given.get("REGULARIZED_SITE_URL", default_url).rstrip("/")
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise SettingsError(
                f"REGULARIZED_SITE_URL must be an address such as https://papers.example.org, got {url!r}"
            )
        secret = given.get("REGULARIZED_SITE_SECRET", "")
        if secret and len(secret) < 32:
            raise SettingsError(f"REGULARIZED_SITE_SECRET must have at least 32 characters, got {len(secret)}")
        return cls(
            database=given.get("REGULARIZED_SITE_DATABASE") or f"sqlite:///{folder / 'site.sqlite'}",
            folder=folder,
            url=url,
            secret=secret or _secret_file(folder),
            outbox=Path(given.get("REGULARIZED_OUTBOX") or folder / "outbox").expanduser(),
            sender=given.get("REGULARIZED_MAIL_FROM") or f"regularized@{parts.hostname}",
            smtp=_smtp(given),
            encoder=given.get("REGULARIZED_SITE_ENCODER", "auto"),
            access_log=given.get("REGULARIZED_ACCESS_LOG", ""),
            metrics_token=given.get("REGULARIZED_METRICS_TOKEN", ""),
            proxies=_whole(given, "REGULARIZED_SITE_PROXIES", 0),
        )


def _smtp(given: Mapping[str, str]) -> Smtp | None:
    host = given.get("REGULARIZED_SMTP_HOST", "")
    if not host:
        return None
    security = given.get("REGULARIZED_SMTP_SECURITY", "starttls")
    if security not in _SECURITY:
        raise SettingsError(f"REGULARIZED_SMTP_SECURITY must be one of {', '.join(_SECURITY)}, got {security!r}")
    return Smtp(
        host,
        _whole(given, "REGULARIZED_SMTP_PORT", 587),
        given.get("REGULARIZED_SMTP_USER", ""),
        given.get("REGULARIZED_SMTP_PASSWORD", ""),
        security,
    )


def _whole(given: Mapping[str, str], name: str, default: int) -> int:
    text = given.get(name) or str(default)
    if not text.isdecimal():
        raise SettingsError(f"{name} must be a whole number, got {text!r}")
    return int(text)


def _secret_file(folder: Path) -> str:
    """The secret that signs cookies: made once, readable by its owner alone."""
    path = folder / "secret"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_urlsafe(48))
    except FileExistsError:
        pass
    return path.read_text(encoding="ascii").strip()
