"""What the handlers of a request ask for: the site, and a session that reads or writes."""

from collections.abc import Iterator
from typing import Annotated, TypeAlias

from fastapi import Depends, Request
from sqlalchemy.orm import Session

from regularized.site.state import Site

__all__ = ["Read", "SiteOf", "Write"]


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
