"""The digest: new papers, verdicts that changed and what is talked about, by e-mail, to who has confirmed it.

``regularized digest send`` is for cron: it writes what is due into the outbox, once, and sends from there; one address
that cannot be reached does not keep the others from theirs.
"""

import datetime
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import func, or_, select, update
from sqlalchemy.orm import Session

from regularized.evidence.claims import SHORT, Verdict
from regularized.site import outbox, queries
from regularized.site.models import Comment, Paper, PaperFamily, Subscription, VerdictChange, Vote
from regularized.site.security import seal_link
from regularized.site.state import Site

__all__ = ["Written", "write_digests"]

_INTERVAL = {"daily": 24 * 3600, "weekly": 7 * 24 * 3600}
# Cron starts a little earlier or later every day; who is nearly due is due.
_SLACK = 3600
_NEW, _CHANGES, _TRENDING = 15, 30, 5


@dataclass(slots=True)
class Written:
    """What a call did.

    Args:
        written: digests that wait in the outbox now.
        empty: subscriptions that are due and have nothing new.
    """

    written: int = 0
    empty: int = 0


def write_digests(site: Site) -> Written:
    """Write all digests that are due into the outbox.

    Args:
        site: an open site.
    """
    result = Written()
    now = site.settings.now
    with site.read() as session:
        due = session.scalars(
            select(Subscription.id)
            .where(
                Subscription.confirmed_at.is_not(None),
                or_(
                    *(
                        (Subscription.frequency == frequency)
                        & (func.coalesce(Subscription.sent_at, 0) <= now - interval + _SLACK)
                        for frequency, interval in _INTERVAL.items()
                    )
                ),
            )
            .order_by(Subscription.id)
        ).all()
    for number in due:
        _write_one(site, number, now, result)
    return result


def _write_one(site: Site, number: int, now: int, result: Written) -> None:
    with site.write.begin() as session:
        subscription = session.get(Subscription, number)
        if subscription is None:
            return
        since = subscription.sent_at or subscription.created_at
        # In one transaction with the message: two calls at once do not write twice, and none is lost.
        taken = session.execute(
            update(Subscription)
            .where(Subscription.id == number, func.coalesce(Subscription.sent_at, 0) == (subscription.sent_at or 0))
            .values(sent_at=now)
            .execution_options(synchronize_session=False)
        )
        if getattr(taken, "rowcount", 0) != 1:
            return
        message = _message(site, session, subscription, since, now)
        if message is None:
            result.empty += 1
            return
        subject, text, html = message
        link = unsubscribe_link(site, subscription)
        headers = {"List-Unsubscribe": f"<{link}>", "List-Unsubscribe-Post": "List-Unsubscribe=One-Click"}
        outbox.put(session, site, subscription.email, subject, text, html, headers=headers)
    result.written += 1
    site.posted.set()


def _message(
    site: Site, session: Session, subscription: Subscription, since: int, now: int
) -> tuple[str, str, str] | None:
    """Subject, text and HTML; None when there is nothing to say."""
    families = subscription.families
    wanted = [Paper.id.in_(select(PaperFamily.paper_id).where(PaperFamily.family.in_(families)))] if families else []
    fresh = select(Paper).where(Paper.added_at > since, *wanted)
    new = session.scalars(queries.in_order(fresh, "best").limit(_NEW)).all()
    more = (session.scalar(select(func.count()).select_from(fresh.subquery())) or 0) - len(new)
    changes = _changes(session, families, since)
    lately = or_(
        Paper.id.in_(select(Vote.paper_id).where(Vote.at > since)),
        Paper.id.in_(select(Comment.paper_id).where(Comment.at > since)),
    )
    talked = select(Paper).where(lately, *wanted)
    trending = session.scalars(queries.in_order(talked, "trending").limit(_TRENDING)).all()
    if not new and not changes and not trending:
        return None
    day = datetime.datetime.fromtimestamp(now, datetime.UTC).date()
    title = f"regularized, {day.day} {day:%B %Y}"
    counts = [
        f"{len(items) + extra} {words}"
        for items, extra, words in ((changes, 0, "changed verdicts"), (new, more, "new papers"))
        if items
    ]
    values = {
        "title": title,
        "new": new,
        "more": more,
        "changes": changes,
        "trending": trending,
        "frequency": subscription.frequency,
        "unsubscribe": unsubscribe_link(site, subscription),
        "site_url": site.settings.url,
        "words": _words,
    }
    text, html = (site.templates.get_template(f"mail/digest.{kind}").render(values) for kind in ("txt", "html"))
    return f"{title}: {', '.join(counts) or 'what is talked about'}", text, html


def _changes(session: Session, families: Sequence[str], since: int) -> list[VerdictChange]:
    found = queries.verdict_changes(session, since=since + 1, limit=10 * _CHANGES)
    return [change for change in found if not families or set(families) & set(change.paper.families)][:_CHANGES]


def _words(paper: Paper) -> str:
    """Evidence of a paper in words."""
    measured = {Verdict(name): count for name, count in paper.verdicts.items() if name != Verdict.NOT_RUN}
    told = ", ".join(f"{count} {SHORT[verdict]}" for verdict, count in measured.items() if count)
    return f"claims: {told}" if told else "runs, not measured yet" if paper.runs else "no runnable code yet"


def unsubscribe_link(site: Site, subscription: Subscription) -> str:
    """Address that ends a subscription, for the headers and the foot of its messages."""
    sealed = seal_link(site.settings, [subscription.id, subscription.key], purpose="unsubscribe")
    return f"{site.settings.url}/digest/unsubscribe?key={sealed}"
