"""Sends messages: by SMTP, or into an outbox folder where no mail server is set.

Messages are built by the standard library's :mod:`email`, which refuses a header with a line break; addresses are
checked before that, by :func:`valid_address`.
"""

import logging
import os
import re
import smtplib
import ssl
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from email.message import EmailMessage
from email.policy import EmailPolicy
from email.utils import format_datetime, make_msgid
from urllib.parse import urlsplit

from regularized.site.settings import Settings

__all__ = ["MailError", "Mailer", "valid_address"]

log: logging.Logger = logging.getLogger(__name__)

_ADDRESS = re.compile(
    r"[A-Za-z0-9.!#$%&'*+/=?^_`{|}~-]{1,64}@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)+[A-Za-z]{2,63}"
)
_TRIES = 3
_LONGEST_LINE = 998  # RFC 5322


class MailError(RuntimeError):
    """The mail server did not take a message; the message says which server and why."""


def valid_address(text: str) -> str | None:
    """An e-mail address as it is kept, or None: one address in plain letters, nothing else.

    Examples:
        >>> valid_address(" Ada@Example.org ")
        'ada@example.org'
        >>> valid_address("a@example.org\\nBcc: b@example.org") is None, valid_address("ada") is None
        (True, True)
    """
    address = text.strip(" ").lower()
    return address if len(address) <= 254 and _ADDRESS.fullmatch(address) else None


class _Policy(EmailPolicy):
    """How a message is written: headers of lists (RFC 2369) on one line each.

    The library folds after 78 letters, and a word that does not fit it writes as an encoded word: an address in
    ``List-Unsubscribe`` becomes ``=?utf-8?q?=3Chttps...``, which no mail program reads. Only there, since encoded words
    of a subject and quoted lines of a text must stay short.
    """

    def fold_binary(self, name: str, value: str) -> bytes:
        """A header as it is sent."""
        if name.lower().startswith("list-"):
            return EmailPolicy(max_line_length=_LONGEST_LINE, linesep=self.linesep).fold_binary(name, value)
        return super().fold_binary(name, value)


class Mailer:
    """Sends messages.

    Args:
        settings: mail server, sender and outbox.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def send(
        self, recipient: str, subject: str, text: str, html: str, *, headers: Mapping[str, str] | None = None
    ) -> None:
        """Send a message.

        Args:
            recipient: a valid address.
            subject: one line.
            text: the message in plain text.
            html: the message as HTML.
            headers: further headers.

        Raises:
            MailError: the mail server did not take it.
            ValueError: a header has a line break.
        """
        settings = self._settings
        message = EmailMessage(_Policy())
        message["From"] = settings.sender
        message["To"] = recipient
        message["Subject"] = subject
        message["Date"] = format_datetime(datetime.fromtimestamp(settings.now, UTC))
        message["Message-ID"] = make_msgid(domain=urlsplit(settings.url).hostname)
        message["Auto-Submitted"] = "auto-generated"
        for name, value in (headers or {}).items():
            message[name] = value
        message.set_content(text)
        message.add_alternative(html, subtype="html")
        if settings.smtp is None:
            self._write(message)
        else:
            self._deliver(message)

    def _write(self, message: EmailMessage) -> None:
        folder = self._settings.outbox
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        # Links in messages let people in: for the owner's eyes alone.
        name = f"{time.time_ns():020}-{os.urandom(4).hex()}.eml"
        part = folder / f".{name}.part"
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(bytes(message))
        part.rename(folder / name)
        log.info("no mail server is set (REGULARIZED_SMTP_HOST): the message is in %s", folder / name)

    def _deliver(self, message: EmailMessage) -> None:
        smtp = self._settings.smtp
        assert smtp is not None
        for attempt in range(_TRIES):
            try:
                kind = smtplib.SMTP_SSL if smtp.security == "tls" else smtplib.SMTP
                with kind(smtp.host, smtp.port, timeout=smtp.timeout) as server:
                    if smtp.security == "starttls":
                        server.starttls(context=ssl.create_default_context())
                    if smtp.user:
                        server.login(smtp.user, smtp.password)
                    server.send_message(message)
                return
            except smtplib.SMTPResponseException as error:
                # 4xx says "later", 5xx says "never".
                if error.smtp_code >= 500 or attempt == _TRIES - 1:
                    raise MailError(f"{smtp.host}:{smtp.port} refused: {error.smtp_code} {_line(error)}") from error
            except smtplib.SMTPRecipientsRefused as error:
                raise MailError(f"{smtp.host}:{smtp.port} refused the recipient") from error
            except (OSError, smtplib.SMTPException) as error:
                if attempt == _TRIES - 1:
                    raise MailError(f"{smtp.host}:{smtp.port} cannot be used: {error}") from error
            time.sleep(0.2 * 2**attempt)


def _line(error: smtplib.SMTPResponseException) -> str:
    said = error.smtp_error
    return said.decode(errors="replace") if isinstance(said, bytes) else str(said)
