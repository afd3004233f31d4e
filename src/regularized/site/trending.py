r"""What is talked about now: votes and comments, of which each counts half as much after every week.

The score of a paper at the time :math:`t` is

.. math:: S(t) = \sum_i w_i \, 2^{-(t - t_i)/H}, \qquad H = 7\text{ days},

over its votes (:math:`w = 1`) and over the people who discuss it (:math:`w = 2` at the time of a person's latest
comment, so that nobody lifts a paper by talking alone). As time passes, all scores fall by the same factor: their order
changes only when somebody votes or comments. So each paper keeps its *heat*, :math:`\log_2 S(0)`, which is written at
those moments and needs no recomputation: the list is a walk along an index.
"""

import math
from collections.abc import Iterable

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from regularized.site.models import Comment, Paper, Person, Vote

__all__ = ["COMMENT_WEIGHT", "HALF_LIFE", "heat", "score", "update"]

HALF_LIFE = 7 * 24 * 3600
"""Seconds after which a vote or a comment counts half."""

COMMENT_WEIGHT = 2.0
"""A person's discussion of a paper, in votes."""


def heat(events: Iterable[tuple[float, int]]) -> float | None:
    """Logarithm of the score at time 0; None without events.

    Args:
        events: weight and time of each.

    Examples:
        >>> heat([]) is None
        True
        >>> heat([(1.0, HALF_LIFE)])
        1.0
        >>> heat([(1.0, HALF_LIFE), (2.0, 0)])
        2.0
    """
    exponents = [math.log2(weight) + at / HALF_LIFE for weight, at in events]
    if not exponents:
        return None
    # The sum itself would overflow: 2 ** (50 years / 7 days).
    most = max(exponents)
    return most + math.log2(math.fsum(2.0 ** (e - most) for e in exponents))


def score(heat: float | None, now: int) -> float:
    """The score at a time.

    Examples:
        >>> score(heat([(1.0, 1000)]), 1000), score(heat([(1.0, 1000)]), 1000 + HALF_LIFE)
        (1.0, 0.5)
    """
    return 0.0 if heat is None else 2.0 ** (heat - now / HALF_LIFE)


def update(session: Session, paper: Paper) -> None:
    """Count the votes and comments of a paper that is locked, and write its heat.

    What a moderator has hidden, and people who are banned, do not count.
    """
    taking_part = Person.banned_because.is_(None)
    votes = session.scalars(
        select(Vote.at).join(Person, Person.id == Vote.person_id).where(Vote.paper_id == paper.id, taking_part)
    ).all()
    per_person = session.execute(
        select(func.max(Comment.at), func.count())
        .join(Person, Person.id == Comment.person_id)
        .where(Comment.paper_id == paper.id, Comment.hidden_because.is_(None), taking_part)
        .group_by(Comment.person_id)
    ).all()
    paper.votes = len(votes)
    paper.comments = sum(count for _, count in per_person)
    paper.heat = heat([*((1.0, at) for at in votes), *((COMMENT_WEIGHT, at) for at, _ in per_person)])
