"""Who waits for whom, so that what is counted is counted right. SQLite has one writer anyway; PostgreSQL needs telling.

Always in one order, so that nobody waits for who waits for him: the person first, then the papers by their numbers, and
before anything is read that will be counted.
"""

from sqlalchemy import select
from sqlalchemy.orm import Session

from regularized.site.models import Paper, Person

__all__ = ["lock_papers", "lock_person"]


def lock_person(session: Session, person: int, *, alone: bool = False) -> None:
    """Keep a person from being deleted or banned until the transaction ends; several windows of theirs go on at once.

    Args:
        session: a session that writes.
        person: their number.
        alone: wait, too, until nothing of theirs is being written: for who deletes or bans them.
    """
    row = select(Person.id).where(Person.id == person)
    session.execute(row.with_for_update() if alone else row.with_for_update(read=True, key_share=True))


def lock_papers(session: Session, *papers: int) -> None:
    """Wait until nobody else votes for these papers or comments on them, until the transaction ends.

    Args:
        session: a session that writes.
        papers: their numbers.
    """
    session.execute(select(Paper.id).where(Paper.id.in_(papers)).order_by(Paper.id).with_for_update())
