"""What a running site holds. Commands that send or moderate use it, too: it needs no web framework."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, TypeVar

from jinja2 import Environment
from sqlalchemy import Engine
from sqlalchemy.orm import Session, sessionmaker

from regularized.site import queries
from regularized.site.database import sessions
from regularized.site.mail import Mailer
from regularized.site.settings import Settings

if TYPE_CHECKING:
    from regularized.site.meaning import Meaning

__all__ = ["Counted", "Site"]

T = TypeVar("T")


class Counted(Generic[T]):
    """What is counted over all papers, once a minute at most: pages show it again and again, and it hardly changes.

    Args:
        count: asks the tables.
    """

    def __init__(self, count: Callable[[Session], T]) -> None:
        self._count = count
        self._found: tuple[int, T] | None = None

    def of(self, session: Session, now: int) -> T:
        """What was counted in the last minute.

        Args:
            session: the database.
            now: seconds since 1970.
        """
        found = self._found
        if found is None or not found[0] <= now < found[0] + 60:
            found = self._found = (now, self._count(session))
        return found[1]


@dataclass(slots=True, eq=False)
class Site:
    """A running site.

    Args:
        settings: its settings.
        engine: its database.
        templates: its pages.
        mailer: sends its messages.
        meaning: search by meaning; None where there is no encoder, or not yet.
        totals: how many papers there are, and how many of them run.
        families: problem families that have papers, with their number.
        tags: the most frequent tags.
        is_loading: whether the encoder is still to come.
        posted: set when a message waits in the outbox, so that the sender does not sleep on.
    """

    settings: Settings
    engine: Engine
    templates: Environment
    mailer: Mailer
    meaning: "Meaning | None"
    is_loading: bool = False
    posted: threading.Event = field(default_factory=threading.Event)
    totals: Counted[tuple[int, int]] = field(default_factory=lambda: Counted(queries.how_many))
    families: Counted[dict[str, int]] = field(default_factory=lambda: Counted(queries.families))
    tags: Counted[list[str]] = field(default_factory=lambda: Counted(queries.tags))

    @property
    def read(self) -> sessionmaker[Session]:
        """Makes sessions that only read."""
        return sessions(self.engine)

    @property
    def write(self) -> sessionmaker[Session]:
        """Makes sessions that write."""
        return sessions(self.engine, writes=True)
