"""Composes messages and hands them on: to a mail server, or into an outbox folder where none is set.

Nothing here waits or tries again; :mod:`regularized.site.outbox` does.

Messages are built by the standard library's :mod:`email`, which refuses a header with a line break; addresses are
checked before that, by :func:`valid_address`.
"""

import logging
import os
import re
import smtplib
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.message import EmailMessage
from email.policy import EmailPolicy
from email.utils import format_datetime, make_msgid
from pathlib import Path
from urllib.parse import urlsplit

from regularized.site.settings import Settings, Smtp

__all__ = ["MailError", "Mailer", "Message", "Post", "Unreachable", "valid_address"]

log: logging.Logger = logging.getLogger(__name__)

_ADDRESS = re.compile(
    r"[A-Za-z0-9.!#$%&'*+/=?^_`{|}~-]{1,64}@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)+[A-Za-z]{2,63}"
)
_LONGEST_LINE = 998  # RFC 5322


class MailError(RuntimeError):
    """The mail server did not take a message; the text says which server and why.

    Args:
        message: what happened.
        lasting: whether it would refuse the message again (5xx), and trying on is of no use.
    """

    def __init__(self, message: str, *, lasting: bool = False) -> None:
        super().__init__(message)
        self.lasting: bool = lasting


class Unreachable(MailError):
    """The mail server takes nothing from us at the moment: no answer, a broken line, or a login that it refuses."""


@dataclass(frozen=True, slots=True)
class Message:
    """A message as it will be sent, however often that is tried: always with the same Message-ID.

    Args:
        recipient: a valid address.
        content: headers and body.
    """

    recipient: str
    content: bytes


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
    """Composes messages and opens the way out.

    Args:
        settings: mail server, sender and outbox.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def compose(
        self, recipient: str, subject: str, text: str, html: str, *, headers: Mapping[str, str] | None = None
    ) -> Message:
        """A message.

        Args:
            recipient: a valid address.
            subject: one line.
            text: the message in plain text.
            html: the message as HTML.
            headers: further headers.

        Raises:
            ValueError: a header has a line break.
        """
        settings = self._settings
        message = EmailMessage(_Policy(linesep="\r\n"))
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
        return Message(recipient, message.as_bytes())

    @contextmanager
    def open(self) -> "Iterator[Post]":
        """The way out, for any number of messages: a line to the mail server is opened with the first of them."""
        post: Post = _Folder(self._settings.outbox) if self._settings.smtp is None else _Server(self._settings)
        try:
            yield post
        finally:
            post.close()


class Post:
    """Takes messages."""

    def send(self, message: Message) -> None:
        """Hand a message on.

        Raises:
            MailError: it was not taken.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Nothing more will come."""


class _Folder(Post):
    """Writes messages to files, for sites without a mail server."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def send(self, message: Message) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            # Links in messages let people in: for the owner's eyes alone.
            name = f"{time.time_ns():020}-{os.urandom(4).hex()}.eml"
            part = self._folder / f".{name}.part"
            with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(message.content)
            part.rename(self._folder / name)
        except OSError as error:
            raise Unreachable(f"{self._folder} cannot be written: {error}") from error
        log.info("no mail server is set (REGULARIZED_SMTP_HOST): the message is in %s", self._folder / name)


class _Server(Post):
    """Speaks SMTP, over one line for as long as it holds."""

    def __init__(self, settings: Settings) -> None:
        assert settings.smtp is not None
        self._smtp = settings.smtp
        self._sender = settings.sender
        self._line: smtplib.SMTP | None = None
        self._cut = _Cut()

    def send(self, message: Message) -> None:
        name = f"{self._smtp.host}:{self._smtp.port}"
        if self._cut.is_cut:  # at the last moment of the message before
            self.close()
        try:
            with self._deadline():
                if self._line is None:
                    self._line = self._connected()
                self._line.sendmail(self._sender, [message.recipient], message.content)
        except smtplib.SMTPRecipientsRefused as error:
            code, said = next(iter(error.recipients.values()))
            # 4xx says "later", greylisting for example; 5xx says "never".
            raise MailError(f"{name} refused the recipient: {code} {_text(said)}", lasting=code >= 500) from error
        except smtplib.SMTPDataError as error:
            why = f"{name} refused: {error.smtp_code} {_text(error.smtp_error)}"
            raise MailError(why, lasting=error.smtp_code >= 500) from error
        except (OSError, smtplib.SMTPException) as error:
            self.close()
            raise Unreachable(f"{name} cannot be used: {error}") from error

    def _connected(self) -> smtplib.SMTP:
        smtp = self._smtp
        line = _Line(smtp, self._cut)
        try:
            if smtp.security == "starttls":
                line.starttls(context=ssl.create_default_context())
            if smtp.user:
                line.login(smtp.user, smtp.password)
        except (OSError, smtplib.SMTPException):
            line.close()
            raise
        return line

    @contextmanager
    def _deadline(self) -> Iterator[None]:
        """Cut the line where a message, or the good-bye, takes longer than it may."""
        timer = threading.Timer(self._smtp.deadline, self._cut.cut)
        timer.daemon = True
        timer.start()
        try:
            yield
        except (OSError, smtplib.SMTPException) as error:
            if self._cut.is_cut:
                raise TimeoutError(f"it was not done after {self._smtp.deadline:g} seconds") from error
            raise
        finally:
            timer.cancel()

    def close(self) -> None:
        line, self._line = self._line, None
        if line is not None:
            try:
                with self._deadline():
                    line.quit()
            except (OSError, smtplib.SMTPException):
                line.close()
        self._cut.close()
        self._cut = _Cut()


class _Cut:
    """Ends a connection from another thread.

    The time-out of a socket counts each read and starts anew with every byte that comes: a server that answers a letter
    at a time would hold a message for hours, and longer than its claim.
    """

    def __init__(self) -> None:
        self.is_cut: bool = False
        self._socket: socket.socket | None = None
        self._lock = threading.Lock()

    def watch(self, connection: socket.socket) -> None:
        """Take note of a connection, by a handle of its own: TLS takes that of the caller over."""
        with self._lock:
            self._socket = connection.dup()
            if self.is_cut:
                self._end()

    def cut(self) -> None:
        """End it: who reads from it or writes to it fails at once."""
        with self._lock:
            self.is_cut = True
            self._end()

    def _end(self) -> None:
        if self._socket is not None:
            with suppress(OSError):  # it has ended by itself
                self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Let it go."""
        with self._lock:
            if self._socket is not None:
                self._socket.close()
                self._socket = None


class _Line(smtplib.SMTP):
    """A connection to a mail server that can be cut from its first moment on."""

    def __init__(self, smtp: Smtp, cut: _Cut) -> None:
        self._cut = cut
        self._by_tls = smtp.security == "tls"
        super().__init__(smtp.host, smtp.port, timeout=smtp.timeout)

    def _get_socket(self, host: str, port: int, timeout: float) -> socket.socket:
        connection = socket.create_connection((host, port), timeout)
        self._cut.watch(connection)
        if self._by_tls:
            return ssl.create_default_context().wrap_socket(connection, server_hostname=host)
        return connection


def _text(said: bytes | str) -> str:
    return said.decode(errors="replace") if isinstance(said, bytes) else said
