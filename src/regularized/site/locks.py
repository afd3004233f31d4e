"""Who waits for whom, so that what is counted is counted right. SQLite has one writer anyway; PostgreSQL needs telling.

Always in one order, so that nobody waits for who waits for him: the person first, then the papers by their numbers, and
before anything is read that will be counted.
"""

from sqlalchemy import select
from sqlalchemy.orm import Session

from regularized.site.models import Comment, Paper, Person, Vote

__all__ = ["lock_papers", "lock_person", "lock_with_papers"]


def lock_person(session: Session, person: int) -> None:
    """Keep a person from being deleted or banned until the transaction ends; several windows of theirs go on at once.

    Args:
        session: a session that writes.
        person: their number.
    """
    session.execute(select(Person.id).where(Person.id == person).with_for_update(read=True, key_share=True))


def lock_with_papers(session: Session, person: int) -> list[int]:
    """Wait until nothing of a person is being written, and keep them and their papers until the transaction ends.

    For who deletes or bans them.

    Args:
        session: a session that writes.
        person: their number.

    Returns:
        Numbers of the papers that they have voted for or comment on.
    """
    session.execute(select(Person.id).where(Person.id == person).with_for_update())
    voted = select(Vote.paper_id).where(Vote.person_id == person)
    papers = sorted(session.scalars(voted.union(select(Comment.paper_id).where(Comment.person_id == person))))
    lock_papers(session, *papers)
    return papers


def lock_papers(session: Session, *papers: int) -> None:
    """Wait until nobody else votes for these papers or comments on them, until the transaction ends.

    Args:
        session: a session that writes.
        papers: their numbers.
    """
    session.execute(select(Paper.id).where(Paper.id.in_(papers)).order_by(Paper.id).with_for_update())
