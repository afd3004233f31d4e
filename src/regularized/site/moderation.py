"""What moderators do, with a reason and a line in the log: hide a comment, ban a person, remove or correct a paper.

Nothing here is lost for good but what is removed by name: a hidden comment can be shown again, a ban be lifted; what a
removed or corrected paper said before stands in the log.
"""

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session

from regularized.site import trending
from regularized.site.database import insert_new, one_at_a_time
from regularized.site.listing import LONGEST_TITLE
from regularized.site.locks import lock_papers, lock_with_papers
from regularized.site.models import (
    Comment,
    LoginSession,
    ModerationEvent,
    Paper,
    Person,
    RemovedPaper,
    Report,
    Submission,
)
from regularized.site.sync import index_paper, title_key

__all__ = ["CORRECTABLE", "MODERATOR", "Moderation", "NotPossible"]

MODERATOR = "moderator"

CORRECTABLE = ("title", "date", "arxiv", "organization", "venue", "abstract", "code_url")
"""What may be corrected of a paper that has no card; a card is corrected in its file."""


class NotPossible(ValueError):
    """It cannot be done; the message says why and what can be."""


@dataclass(frozen=True, slots=True)
class Moderation:
    """Does it, in somebody's name.

    Args:
        session: a session that writes; the caller commits.
        by: address of the moderator, or ``command line``.
        now: seconds since 1970.
    """

    session: Session
    by: str
    now: int

    def _log(self, action: str, subject: str, reason: str, **details: Any) -> None:
        if not reason.strip():
            raise NotPossible("give a reason: it stands in the log, and whom it concerns reads it")
        self.session.add(
            ModerationEvent(
                at=self.now,
                moderator=self.by,
                action=action,
                subject=subject[:500],
                reason=reason.strip()[:1000],
                details=details,
            )
        )

    # -- comments -------------------------------------------------------------------------------

    def hide(self, comment: Comment, reason: str) -> None:
        """Show the reason instead of a comment; what was reported of it is settled."""
        self._hold(comment)
        self._log("hide comment", f"comment {comment.id}", reason, body=comment.body, person=comment.person_id)
        self._decide(comment, reason.strip())

    def show(self, comment: Comment, reason: str) -> None:
        """Show a comment (again); what was reported of it is settled."""
        self._hold(comment)
        self._log("show comment", f"comment {comment.id}", reason)
        self._decide(comment, None)

    def _hold(self, comment: Comment) -> None:
        """Keep a comment from being deleted until the transaction ends, unless it was while we waited our turn."""
        lock_papers(self.session, comment.paper_id)
        if self.session.scalar(select(Comment.id).where(Comment.id == comment.id)) is None:
            raise NotPossible("its author has deleted this comment at the same moment")

    def _decide(self, comment: Comment, hidden: str | None) -> None:
        comment.hidden_because = hidden
        self.session.execute(delete(Report).where(Report.comment_id == comment.id))
        self.session.flush()
        trending.update(self.session, self.session.get_one(Paper, comment.paper_id))

    # -- people ---------------------------------------------------------------------------------

    def appoint(self, email: str, *, on: bool, reason: str) -> None:
        """Make somebody a moderator, or one no longer; who has not signed in yet is one from the first time on."""
        insert_new(self.session, Person, [{"email": email, "name": "", "role": "", "created_at": self.now}])
        self._log("appoint" if on else "dismiss", email, reason)
        self.session.execute(update(Person).where(Person.email == email).values(role=MODERATOR if on else ""))

    def ban(self, person: Person, reason: str, *, hide_comments: bool = False) -> None:
        """End a person's sessions and let them sign in no more; their votes do not count."""
        if person.role == MODERATOR:
            raise NotPossible("a moderator cannot be banned; take the role away first")
        self._log("ban", f"person {person.id}", reason, email=person.email, name=person.name)
        papers = lock_with_papers(self.session, person.id)
        person.banned_because = reason.strip()
        self.session.execute(delete(LoginSession).where(LoginSession.person_id == person.id))
        if hide_comments:
            shown = Comment.hidden_because.is_(None) & (Comment.person_id == person.id)
            for comment in self.session.scalars(select(Comment).where(shown)).all():
                self.hide(comment, reason)
        self._count_again(papers)

    def unban(self, person: Person, reason: str) -> None:
        """Let a person take part again; their votes count again."""
        self._log("unban", f"person {person.id}", reason)
        papers = lock_with_papers(self.session, person.id)
        person.banned_because = None
        self._count_again(papers)

    def _count_again(self, papers: Sequence[int]) -> None:
        self.session.flush()
        for number in papers:
            trending.update(self.session, self.session.get_one(Paper, number))

    # -- papers ---------------------------------------------------------------------------------

    def decide_submission(self, arxiv: str, reason: str, *, taken: bool) -> None:
        """Settle what a reader has proposed; the caller lists what is taken."""
        proposed = self.session.get(Submission, arxiv)
        if proposed is None:
            raise NotPossible("nobody has proposed this paper, or it is decided already")
        action = "take submission" if taken else "decline submission"
        self._log(action, f"arXiv {arxiv}", reason, person=proposed.person_id, why=proposed.reason)
        self.session.delete(proposed)

    def remove(self, paper: Paper, reason: str) -> None:
        """Delete a paper that has no card, with votes and comments; imports leave it out from now on."""
        self._only_imported(paper)
        self._log("remove paper", paper.slug, reason, **_facts(paper))
        insert_new(self.session, RemovedPaper, [{"title_key": paper.title_key, "arxiv": paper.arxiv, "at": self.now}])
        self.session.execute(delete(Paper).where(Paper.id == paper.id))

    def correct(self, paper: Paper, changes: Mapping[str, str], reason: str) -> None:
        """Change facts of a paper that has no card.

        Args:
            paper: the paper.
            changes: new values, by names of :data:`CORRECTABLE`.
            reason: why.

        Raises:
            NotPossible: the paper has a card, or a value is none.
        """
        self._only_imported(paper)
        if unknown := set(changes) - set(CORRECTABLE):
            raise NotPossible(f"{sorted(unknown)[0]!r} cannot be corrected; these can: {', '.join(CORRECTABLE)}")
        before = _facts(paper)
        values = {name: _checked(name, value) for name, value in changes.items()}
        changed = {name: value for name, value in values.items() if getattr(paper, name) != value}
        if not changed:
            raise NotPossible("nothing would change")
        self._log("correct paper", paper.slug, reason, **{name: before[name] for name in changed})
        one_at_a_time(self.session, "catalogue")
        if "arxiv" in changed and changed["arxiv"] is not None:
            other = self.session.scalar(select(Paper.slug).where(Paper.arxiv == changed["arxiv"]))
            if other is not None:
                raise NotPossible(f"arXiv {changed['arxiv']} is {other}")
        for name, value in changed.items():
            setattr(paper, name, value)
        if "title" in changed:
            # The wrong title is not somebody else's new paper at the next import.
            insert_new(self.session, RemovedPaper, [{"title_key": paper.title_key, "arxiv": None, "at": self.now}])
            paper.title_key = title_key(paper.title)
        paper.changed_at = self.now
        self.session.flush()
        index_paper(self.session, paper)

    def _only_imported(self, paper: Paper) -> None:
        if paper.has_card:
            raise NotPossible(f"{paper.slug} comes from a card, and would come back from it: change the card instead")


def _facts(paper: Paper) -> dict[str, str | None]:
    values = {name: getattr(paper, name) for name in CORRECTABLE}
    return {name: value.isoformat() if isinstance(value, datetime.date) else value for name, value in values.items()}


def _checked(name: str, value: str) -> Any:
    text = " ".join(value.split())
    if name == "date":
        try:
            return datetime.date.fromisoformat(text)
        except ValueError:
            raise NotPossible(f"date must be a date such as 2026-03-02, got {text!r}") from None
    if name == "title" and not title_key(text):
        raise NotPossible("a title needs a letter or a digit")
    if name == "title" and len(text) > LONGEST_TITLE:
        raise NotPossible(f"a title has at most {LONGEST_TITLE} letters, got {len(text)}")
    if name == "arxiv":
        return text or None
    if name == "code_url" and text and not text.startswith(("https://", "http://")):
        raise NotPossible(f"code_url must begin with https://, got {text!r}")
    return text
