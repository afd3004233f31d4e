"""What a running site holds, and what the handlers of a request ask for."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, TypeAlias

from fastapi import Depends, Request
from jinja2 import Environment
from sqlalchemy import Engine
from sqlalchemy.orm import Session, sessionmaker

from regularized.site import queries
from regularized.site.database import sessions
from regularized.site.mail import Mailer
from regularized.site.meaning import Meaning
from regularized.site.settings import Settings

__all__ = ["Read", "Site", "SiteOf", "Write"]


class Totals:
    """How many papers there are, and how many of them run: counted once a minute at most."""

    def __init__(self) -> None:
        self._counted: tuple[int, tuple[int, int]] | None = None

    def of(self, session: Session, now: int) -> tuple[int, int]:
        """Papers, and those that run."""
        counted = self._counted
        if counted is None or not counted[0] <= now < counted[0] + 60:
            counted = self._counted = (now, queries.how_many(session))
        return counted[1]


@dataclass(frozen=True, slots=True)
class Site:
    """A running site.

    Args:
        settings: its settings.
        engine: its database.
        templates: its pages.
        mailer: sends its messages.
        meaning: search by meaning; None where there is no encoder.
        totals: how many papers there are.
        posted: set when a message waits in the outbox, so that the sender does not sleep on.
    """

    settings: Settings
    engine: Engine
    templates: Environment
    mailer: Mailer
    meaning: Meaning | None
    posted: threading.Event = field(default_factory=threading.Event)
    totals: Totals = field(default_factory=Totals)

    @property
    def read(self) -> sessionmaker[Session]:
        """Makes sessions that only read."""
        return sessions(self.engine)

    @property
    def write(self) -> sessionmaker[Session]:
        """Makes sessions that write."""
        return sessions(self.engine, writes=True)


def _site(request: Request) -> Site:
    site: Site = request.app.state.site
    return site


SiteOf: TypeAlias = Annotated[Site, Depends(_site)]


def _reading(site: SiteOf) -> Iterator[Session]:
    with site.read() as session:
        yield session


def _writing(site: SiteOf) -> Iterator[Session]:
    # Committed when the handler is done; an error in it takes everything back.
    with site.write.begin() as session:
        yield session


Read: TypeAlias = Annotated[Session, Depends(_reading)]
# Before the answer goes out: who is told that a vote counts must find it counted.
Write: TypeAlias = Annotated[Session, Depends(_writing, scope="function")]
