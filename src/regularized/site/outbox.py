"""Messages that wait to be sent: written with what they tell of, in one transaction, and sent by somebody else.

A request never waits for a mail server. A message is claimed for a while, sent, and deleted; a server that says "later"
is asked again after growing pauses, and one process that dies over a message leaves it to the next, with the same
Message-ID. What is refused for good is kept for the operator, without its text.
"""

import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy import delete, func, select, update
from sqlalchemy.orm import Session

from regularized.site.mail import MailError, Message, Post, Unreachable
from regularized.site.models import Outgoing
from regularized.site.state import Site

__all__ = ["CLAIM", "PATIENCE", "Delivered", "Sender", "deliver_due", "is_late", "put", "put_page"]

log: logging.Logger = logging.getLogger(__name__)

CLAIM = 15 * 60
"""Seconds for which a message belongs to who sends it; one that died over it leaves it to others after that."""

_LONGEST_WAIT = 6 * 3600
PATIENCE = 4 * 24 * 3600
"""Seconds after which a message that no server took is given up."""

_KEPT = 30 * 24 * 3600
_LOOK = 15.0
"""Seconds after which the sender looks for what other processes have written."""


def put(
    session: Session,
    site: Site,
    recipient: str,
    subject: str,
    text: str,
    html: str,
    *,
    headers: Mapping[str, str] | None = None,
    expires_at: int | None = None,
) -> None:
    """Write a message; it is sent once the caller has committed, and not at all otherwise.

    Args:
        session: a session that writes.
        site: the site.
        recipient: a valid address.
        subject: one line.
        text: the message in plain text.
        html: the message as HTML.
        headers: further headers.
        expires_at: when it would be of no use any more; default after :data:`PATIENCE`.

    Raises:
        ValueError: a header has a line break.
    """
    now = site.settings.now
    message = site.mailer.compose(recipient, subject, text, html, headers=headers)
    latest = now + PATIENCE if expires_at is None else expires_at
    session.add(
        Outgoing(recipient=recipient, content=message.content, created_at=now, due_at=now, expires_at=latest, error="")
    )
    session.flush()


def put_page(
    session: Session,
    site: Site,
    recipient: str,
    subject: str,
    template: str,
    *,
    expires_at: int | None = None,
    **values: object,
) -> None:
    """Write a message from the templates ``mail/TEMPLATE.txt`` and ``.html``; see :func:`put`."""
    shown = {"site_url": site.settings.url, **values}
    text, html = (site.templates.get_template(f"mail/{template}.{kind}").render(shown) for kind in ("txt", "html"))
    put(session, site, recipient, subject, text, html, expires_at=expires_at)


def _pause(tries: int) -> int:
    """Seconds until the next try: a minute after the first, twice as long after each further one.

    Examples:
        >>> [_pause(tries) // 60 for tries in (1, 2, 3, 9, 20)]
        [1, 2, 4, 256, 360]
    """
    return int(min(60 * 2 ** min(tries - 1, 20), _LONGEST_WAIT))


@dataclass(slots=True)
class Delivered:
    """What a call did.

    Args:
        sent: messages that were taken.
        later: those that are tried again.
        refused: those that are given up: refused for good, or too late.
        unreachable: whether the mail server took nothing at all, so that the rest was not tried.
    """

    sent: int = 0
    later: int = 0
    refused: int = 0
    unreachable: bool = False


def deliver_due(site: Site) -> Delivered:
    """Send what is due, each message in turn; several processes may do so at once.

    Args:
        site: an open site.
    """
    result = Delivered()
    with site.mailer.open() as post:
        while not result.unreachable and (claimed := _claim(site)) is not None:
            _deliver(site, post, claimed, result)
    return result


@dataclass(frozen=True, slots=True)
class _Claimed:
    id: int
    message: Message
    tries: int
    expires_at: int


def _claim(site: Site) -> _Claimed | None:
    """The next message, which nobody else takes for a while."""
    now = site.settings.now
    due = select(Outgoing.id).where(Outgoing.due_at <= now).order_by(Outgoing.due_at, Outgoing.id).limit(1)
    with site.write.begin() as session:
        row = session.execute(
            update(Outgoing)
            .where(Outgoing.id == due.with_for_update(skip_locked=True).scalar_subquery(), Outgoing.due_at <= now)
            .values(due_at=now + CLAIM, tries=Outgoing.tries + 1)
            .returning(Outgoing.id, Outgoing.recipient, Outgoing.content, Outgoing.tries, Outgoing.expires_at)
            .execution_options(synchronize_session=False)
        ).one_or_none()
    return None if row is None else _Claimed(row.id, Message(row.recipient, row.content), row.tries, row.expires_at)


def _deliver(site: Site, post: Post, claimed: _Claimed, result: Delivered) -> None:
    now = site.settings.now
    if claimed.expires_at <= now:
        _settle(site, claimed, None, "it is too late for it")
        result.refused += 1
        return
    try:
        post.send(claimed.message)
    except MailError as error:
        again = (
            None if error.lasting or now + _pause(claimed.tries) >= claimed.expires_at else now + _pause(claimed.tries)
        )
        _settle(site, claimed, again, str(error))
        result.unreachable = isinstance(error, Unreachable)
        if again is None:
            result.refused += 1
        else:
            result.later += 1
        return
    with site.write.begin() as session:
        session.execute(delete(Outgoing).where(Outgoing.id == claimed.id))
    result.sent += 1


def _settle(site: Site, claimed: _Claimed, again: int | None, why: str) -> None:
    """Set the next try, or give the message up and forget what it said."""
    level = logging.ERROR if again is None else logging.WARNING
    log.log(level, "message %s was not sent (try %s): %s", claimed.id, claimed.tries, why)
    values = {"due_at": again, "error": why[:500]} | ({"content": b""} if again is None else {})
    with site.write.begin() as session:
        session.execute(update(Outgoing).where(Outgoing.id == claimed.id).values(**values))
        session.execute(
            delete(Outgoing).where(Outgoing.due_at.is_(None), Outgoing.created_at < site.settings.now - _KEPT)
        )


def is_late(session: Session) -> bool:
    """Whether messages wait because the mail server did not take one."""
    waiting = select(func.count()).select_from(Outgoing).where(Outgoing.due_at.is_not(None), Outgoing.error != "")
    return bool(session.scalar(waiting))


class Sender:
    """Sends what is due in a thread of its own, at once after :attr:`Site.posted` is set and every few seconds.

    Args:
        site: an open site.
    """

    def __init__(self, site: Site) -> None:
        self._site = site
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mail", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End after the message at hand."""
        self._closing.set()
        self._site.posted.set()
        self._thread.join(timeout=5.0)

    def _run(self) -> None:
        wait = _LOOK
        while not self._closing.is_set():
            try:
                unreachable = deliver_due(self._site).unreachable
            except Exception:  # the thread must outlive a database that is away for a moment
                log.exception("the outbox cannot be read")
                unreachable = True
            # A server that is away is not asked by every new message.
            wait = min(2 * wait, 300.0) if unreachable else _LOOK
            if unreachable:
                self._closing.wait(wait)
            else:
                self._site.posted.wait(wait)
            self._site.posted.clear()
