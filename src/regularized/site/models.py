"""The tables. Times are whole seconds since 1970 in UTC, which SQLite and PostgreSQL store and compare alike.

A paper's row repeats what lists show (counts of verdicts, votes, families), so that a list is one query. What the card
and ledger say is in the same row for the paper's page; :mod:`regularized.site.sync` writes it, nobody else.
"""

import datetime
from typing import Annotated, Any, ClassVar

from sqlalchemy import JSON, BigInteger, ForeignKey, Index, LargeBinary, MetaData, String, Text, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

__all__ = [
    "Alias",
    "Base",
    "ClaimRow",
    "Comment",
    "Embedding",
    "Follow",
    "LastImport",
    "LoginSession",
    "ModerationEvent",
    "Outgoing",
    "Paper",
    "PaperFamily",
    "PaperTag",
    "Person",
    "RateCount",
    "RemovedPaper",
    "Report",
    "SearchText",
    "SearchWord",
    "SignInToken",
    "Submission",
    "Subscription",
    "VerdictChange",
    "Vote",
]

Seconds = Annotated[int, mapped_column(BigInteger)]
"""A point in time."""


class Base(DeclarativeBase):
    """Base of all tables: constraints have names, so that later migrations can change them."""

    metadata: ClassVar[MetaData] = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


class Paper(Base):
    """A paper: of the catalogue, with a card; or imported, with a title and little else."""

    __tablename__ = "paper"

    id: Mapped[int] = mapped_column(primary_key=True)
    slug: Mapped[str] = mapped_column(String(120), unique=True)
    title: Mapped[str] = mapped_column(Text)
    title_key: Mapped[str] = mapped_column(String(300), index=True)
    """The title's letters and digits: two spellings of one title are the same paper."""
    arxiv: Mapped[str | None] = mapped_column(String(20), unique=True)
    date: Mapped[datetime.date]
    listed_on: Mapped[datetime.date]
    """The day on whose list it stands."""
    source: Mapped[str] = mapped_column(String(20))
    """``catalogue``, ``listing`` (a saved page), ``arxiv`` or ``daily``."""
    added_at: Mapped[Seconds]
    changed_at: Mapped[Seconds]
    fingerprint: Mapped[str] = mapped_column(String(64), default="")

    problem: Mapped[str] = mapped_column(Text, default="")
    summary: Mapped[str] = mapped_column(Text, default="")
    abstract: Mapped[str] = mapped_column(Text, default="")
    authors: Mapped[list[str]] = mapped_column(JSON, default=list)
    authors_count: Mapped[int] = mapped_column(default=0)
    organization: Mapped[str] = mapped_column(Text, default="")
    venue: Mapped[str] = mapped_column(Text, default="")
    listed_comments: Mapped[int] = mapped_column(default=0)
    listed_votes: Mapped[int] = mapped_column(default=0)
    families: Mapped[list[str]] = mapped_column(JSON, default=list)
    tags: Mapped[list[str]] = mapped_column(JSON, default=list)
    code_url: Mapped[str] = mapped_column(Text, default="")
    card: Mapped[dict[str, Any]] = mapped_column(JSON, default=dict)
    """What only the paper's page shows: use, needs, official code, cost, BibTeX, ...; empty without a card."""

    has_card: Mapped[bool] = mapped_column(default=False)
    runs: Mapped[bool] = mapped_column(default=False)
    held: Mapped[int] = mapped_column(default=0)
    verdicts: Mapped[dict[str, int]] = mapped_column(JSON, default=dict)
    """How many claims have each verdict, without those that are true by construction."""

    standing: Mapped[float] = mapped_column(default=0.0)
    """See :func:`regularized.papers.proof.standing`."""
    margin: Mapped[float] = mapped_column(default=0.0)
    """By how much its claims hold, in units of the smallest effect that counts."""

    votes: Mapped[int] = mapped_column(default=0)
    comments: Mapped[int] = mapped_column(default=0)
    heat: Mapped[float | None]
    """See :mod:`regularized.site.trending`."""

    claims: Mapped[list["ClaimRow"]] = relationship(
        order_by="ClaimRow.position", cascade="all, delete-orphan", back_populates="paper"
    )

    __table_args__: Any = (
        # Read backwards for the lists: best first, newest first.
        Index("ix_paper_best", "standing", "margin", "date", "id"),
        Index("ix_paper_listed_on", "listed_on", "standing", "margin", "date", "id"),
        Index("ix_paper_date", "date", "id"),
        Index("ix_paper_added_at", "added_at", "id"),
        Index("ix_paper_heat", "heat", "id"),
        Index("ix_paper_runs", "runs"),
        Index("ix_paper_has_card", "has_card"),
    )


class Alias(Base):
    """A slug that a paper had before: old addresses still lead to it."""

    __tablename__ = "alias"

    slug: Mapped[str] = mapped_column(String(120), primary_key=True)
    paper_id: Mapped[int] = mapped_column(ForeignKey("paper.id", ondelete="CASCADE"))


class PaperFamily(Base):
    """A problem family of a paper."""

    __tablename__ = "paper_family"

    family: Mapped[str] = mapped_column(String(40), primary_key=True)
    paper_id: Mapped[int] = mapped_column(ForeignKey("paper.id", ondelete="CASCADE"), primary_key=True, index=True)


class PaperTag(Base):
    """A tag of a paper."""

    __tablename__ = "paper_tag"

    tag: Mapped[str] = mapped_column(String(80), primary_key=True)
    paper_id: Mapped[int] = mapped_column(ForeignKey("paper.id", ondelete="CASCADE"), primary_key=True, index=True)


class ClaimRow(Base):
    """A claim with its verdict from the shipped runs."""

    __tablename__ = "claim"

    id: Mapped[int] = mapped_column(primary_key=True)
    paper_id: Mapped[int] = mapped_column(ForeignKey("paper.id", ondelete="CASCADE"))
    name: Mapped[str] = mapped_column(String(80))
    position: Mapped[int]
    statement: Mapped[str] = mapped_column(Text)
    verdict: Mapped[str] = mapped_column(String(40), index=True)
    kind: Mapped[str] = mapped_column(String(20), default="claim")
    effect: Mapped[float | None]
    low: Mapped[float | None]
    high: Mapped[float | None]
    details: Mapped[dict[str, Any]] = mapped_column(JSON, default=dict)
    """Metric, arms, texts for the page, and the paper's own numbers."""

    paper: Mapped[Paper] = relationship(back_populates="claims")

    __table_args__: Any = (UniqueConstraint("paper_id", "name"),)


class VerdictChange(Base):
    """A verdict that became another one: never edited, never deleted."""

    __tablename__ = "verdict_change"

    id: Mapped[int] = mapped_column(primary_key=True)
    paper_id: Mapped[int] = mapped_column(ForeignKey("paper.id", ondelete="CASCADE"), index=True)
    claim: Mapped[str] = mapped_column(String(80))
    statement: Mapped[str] = mapped_column(Text)
    old: Mapped[str] = mapped_column(String(40))
    new: Mapped[str] = mapped_column(String(40))
    at: Mapped[Seconds] = mapped_column(index=True)

    paper: Mapped[Paper] = relationship()


class SearchText(Base):
    """What is searched of a paper, a column for each weight. Full-text indices hang on this table, see migrations."""

    __tablename__ = "search_text"

    paper_id: Mapped[int] = mapped_column(ForeignKey("paper.id", ondelete="CASCADE"), primary_key=True)
    searches: Mapped[str] = mapped_column(Text, default="")
    problem: Mapped[str] = mapped_column(Text, default="")
    title: Mapped[str] = mapped_column(Text, default="")
    tags: Mapped[str] = mapped_column(Text, default="")
    families: Mapped[str] = mapped_column(Text, default="")
    claims: Mapped[str] = mapped_column(Text, default="")
    use: Mapped[str] = mapped_column(Text, default="")
    summary: Mapped[str] = mapped_column(Text, default="")
    names: Mapped[str] = mapped_column(Text, default="")


class SearchWord(Base):
    """A word that occurs somewhere, for the nearest spelling of one that does not."""

    __tablename__ = "search_word"

    word: Mapped[str] = mapped_column(String(60), primary_key=True)


class Embedding(Base):
    """The meaning of a paper as a unit vector of 32-bit floats."""

    __tablename__ = "embedding"

    paper_id: Mapped[int] = mapped_column(ForeignKey("paper.id", ondelete="CASCADE"), primary_key=True)
    model: Mapped[str] = mapped_column(String(120), primary_key=True)
    text_key: Mapped[str] = mapped_column(String(64))
    """Hash of the text that was encoded: a changed paper is encoded again."""
    vector: Mapped[bytes] = mapped_column(LargeBinary)


class Person(Base):
    """Somebody who has signed in."""

    __tablename__ = "person"

    id: Mapped[int] = mapped_column(primary_key=True)
    email: Mapped[str] = mapped_column(String(254), unique=True)
    name: Mapped[str] = mapped_column(String(60), default="")
    name_key: Mapped[str | None] = mapped_column(String(120), unique=True, index=True)
    """The skeleton of the name (see :mod:`regularized.site.names`); None without a name."""
    role: Mapped[str] = mapped_column(String(20), default="")
    """``moderator``, or empty."""
    banned_because: Mapped[str | None] = mapped_column(Text)
    """Why the person may not take part any more; None for everybody else."""
    created_at: Mapped[Seconds]


class SignInToken(Base):
    """A sign-in link that was mailed; only its hash is kept, and it works once."""

    __tablename__ = "sign_in_token"

    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    email: Mapped[str] = mapped_column(String(254))
    goes_to: Mapped[str] = mapped_column(Text, default="/")
    expires_at: Mapped[Seconds] = mapped_column(index=True)


class LoginSession(Base):
    """A browser that is signed in; only the hash of its cookie is kept."""

    __tablename__ = "login_session"

    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    person_id: Mapped[int] = mapped_column(ForeignKey("person.id", ondelete="CASCADE"), index=True)
    expires_at: Mapped[Seconds] = mapped_column(index=True)


class Vote(Base):
    """One person's vote for one paper."""

    __tablename__ = "vote"

    person_id: Mapped[int] = mapped_column(ForeignKey("person.id", ondelete="CASCADE"), primary_key=True)
    paper_id: Mapped[int] = mapped_column(ForeignKey("paper.id", ondelete="CASCADE"), primary_key=True, index=True)
    at: Mapped[Seconds]


class Comment(Base):
    """A comment: what was typed, and the sanitised HTML of it."""

    __tablename__ = "comment"

    id: Mapped[int] = mapped_column(primary_key=True)
    paper_id: Mapped[int] = mapped_column(ForeignKey("paper.id", ondelete="CASCADE"), index=True)
    person_id: Mapped[int] = mapped_column(ForeignKey("person.id", ondelete="CASCADE"), index=True)
    body: Mapped[str] = mapped_column(Text)
    html: Mapped[str] = mapped_column(Text)
    at: Mapped[Seconds]
    hidden_because: Mapped[str | None] = mapped_column(Text)
    """Why a moderator has hidden it; None for one that is shown."""
    thread_id: Mapped[int | None] = mapped_column(ForeignKey("comment.id", ondelete="SET NULL"), index=True)
    """The comment under which it stands as an answer; None for one that stands by itself."""

    person: Mapped[Person] = relationship()


class Report(Base):
    """A reader's word to the moderators about a comment; gone once they have decided."""

    __tablename__ = "report"

    comment_id: Mapped[int] = mapped_column(ForeignKey("comment.id", ondelete="CASCADE"), primary_key=True)
    person_id: Mapped[int] = mapped_column(ForeignKey("person.id", ondelete="CASCADE"), primary_key=True, index=True)
    reason: Mapped[str] = mapped_column(Text)
    at: Mapped[Seconds]

    comment: Mapped[Comment] = relationship()


class ModerationEvent(Base):
    """What a moderator did: never edited, never deleted, also when who did it or was meant is gone."""

    __tablename__ = "moderation_event"

    id: Mapped[int] = mapped_column(primary_key=True)
    at: Mapped[Seconds] = mapped_column(index=True)
    moderator: Mapped[str] = mapped_column(String(254))
    """Address; or ``command line``."""
    action: Mapped[str] = mapped_column(String(40))
    subject: Mapped[str] = mapped_column(Text)
    reason: Mapped[str] = mapped_column(Text)
    details: Mapped[dict[str, Any]] = mapped_column(JSON, default=dict)
    """What was there before."""


class RemovedPaper(Base):
    """A paper that a moderator has removed: the next import leaves it out."""

    __tablename__ = "removed_paper"

    title_key: Mapped[str] = mapped_column(String(300), primary_key=True)
    arxiv: Mapped[str | None] = mapped_column(String(20), index=True)
    at: Mapped[Seconds]


class Submission(Base):
    """A paper on arXiv that a reader proposes; gone once a moderator has decided."""

    __tablename__ = "submission"

    arxiv: Mapped[str] = mapped_column(String(20), primary_key=True)
    person_id: Mapped[int] = mapped_column(ForeignKey("person.id", ondelete="CASCADE"), index=True)
    reason: Mapped[str] = mapped_column(Text)
    at: Mapped[Seconds]

    person: Mapped[Person] = relationship()


class LastImport(Base):
    """What the last import from a source brought, so that readers see whether the stream is alive."""

    __tablename__ = "last_import"

    source: Mapped[str] = mapped_column(String(20), primary_key=True)
    """As of :class:`Paper`."""
    at: Mapped[Seconds]
    what: Mapped[str] = mapped_column(Text)
    """The day or week, the file, the identifier."""
    added: Mapped[int]
    seen: Mapped[int]
    error: Mapped[str] = mapped_column(Text)
    """Why it failed; empty where it worked."""
    worked_at: Mapped[Seconds | None]
    """When one last worked."""


class Follow(Base):
    """A problem family that a person follows."""

    __tablename__ = "follow"

    person_id: Mapped[int] = mapped_column(ForeignKey("person.id", ondelete="CASCADE"), primary_key=True)
    family: Mapped[str] = mapped_column(String(40), primary_key=True)


class Subscription(Base):
    """A digest by e-mail; it needs no account, and nothing is sent before it is confirmed."""

    __tablename__ = "subscription"

    id: Mapped[int] = mapped_column(primary_key=True)
    email: Mapped[str] = mapped_column(String(254), unique=True)
    frequency: Mapped[str] = mapped_column(String(10))
    families: Mapped[list[str]] = mapped_column(JSON, default=list)
    """Only these problem families; empty for all."""
    key: Mapped[str] = mapped_column(String(64))
    """Random; the links in the mails are signed with it, and a new one makes all older links void."""
    created_at: Mapped[Seconds]
    confirmed_at: Mapped[Seconds | None]
    sent_at: Mapped[Seconds | None]


class RateCount(Base):
    """How often something was tried in a window of time."""

    __tablename__ = "rate_count"

    key: Mapped[str] = mapped_column(String(200), primary_key=True)
    window: Mapped[Seconds] = mapped_column(primary_key=True, index=True)
    count: Mapped[int]


class Outgoing(Base):
    """A message that waits to be sent; deleted once it is."""

    __tablename__ = "outgoing"

    id: Mapped[int] = mapped_column(primary_key=True)
    recipient: Mapped[str] = mapped_column(String(254))
    content: Mapped[bytes] = mapped_column(LargeBinary)
    """Headers and body; empty once it is given up."""
    created_at: Mapped[Seconds]
    due_at: Mapped[Seconds | None] = mapped_column(index=True)
    """When it is tried next; None when it is given up."""
    expires_at: Mapped[Seconds]
    tries: Mapped[int] = mapped_column(default=0)
    error: Mapped[str] = mapped_column(Text, default="")
