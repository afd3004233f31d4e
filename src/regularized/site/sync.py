"""Brings cards and ledgers into the tables: at every start, and changing nothing when nothing has changed.

Votes, comments and imported papers stay as they are. A paper whose card is gone keeps its row and is no longer said to
run; a verdict that has become another one is written down.
"""

import hashlib
import json
import logging
import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from sqlalchemy import delete, insert, select
from sqlalchemy.orm import Session

from regularized.evidence.claims import (
    Outcome,
    Verdict,
    attempt_text,
    count_verdicts,
    counts_text,
    effect_text,
    interval_text,
)
from regularized.papers.catalogue import Entry
from regularized.papers.proof import margin, standing
from regularized.papers.search import WEIGHTS, fields, with_joined
from regularized.site.database import insert_new, one_at_a_time
from regularized.site.models import (
    Alias,
    ClaimRow,
    Paper,
    PaperFamily,
    PaperTag,
    SearchText,
    SearchWord,
    VerdictChange,
)

__all__ = ["Changes", "find_known", "index_paper", "sync_catalogue", "title_key"]

log: logging.Logger = logging.getLogger(__name__)

_LAYOUT = 6
"""Raised when what is written for an unchanged card changes, so that all rows are written again."""


@dataclass(frozen=True)
class _Said:
    """What is written for a paper, and how it is known without finding it out: that reads the ledger.

    Args:
        entry: the paper.
    """

    entry: Entry

    @cached_property
    def record(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The paper's row, and those of its claims."""
        return _record(self.entry)

    @cached_property
    def fingerprint(self) -> str:
        """Changes with the record; remembered until a file does."""
        entry = self.entry
        # The memory does not watch the technique's page; what is known of the code comes later.
        known = f"{entry.slug} on the site {_hash(entry.page)} {entry.knows_code_key}"
        return entry.memory.recall(known, lambda: _hash([_LAYOUT, *self.record]))


@dataclass(slots=True)
class Changes:
    """What a synchronisation did.

    Args:
        added: papers that were new.
        updated: papers whose card, code or evidence had changed.
        verdicts: verdicts that became others.
        gone: papers whose card is there no more.
    """

    added: int = 0
    updated: int = 0
    verdicts: int = 0
    gone: int = 0


def title_key(title: str) -> str:
    """Letters and digits of a title: what two spellings of one title have in common.

    Examples:
        >>> title_key("CREAM: Self-Rewarding  Language Models")
        'creamselfrewardinglanguagemodels'
        >>> title_key("Über-fit") == title_key("uberfit")
        True
        >>> title_key(" \U0001f525 \U0001f525")
        '\U0001f525\U0001f525'
    """
    plain = unicodedata.normalize("NFKD", title).casefold()
    # A title of emoji alone is known by them; punctuation says nothing.
    signs = (letter for letter in plain if unicodedata.category(letter).startswith("S"))
    return ("".join(letter for letter in plain if letter.isalnum()) or "".join(signs))[:300]


def find_known(session: Session, *, arxiv: str | None = None, title: str = "", slug: str = "") -> Paper | None:
    """The paper that is the same as one from elsewhere: by slug, arXiv identifier or title, in this order."""
    for condition in (
        Paper.slug == slug if slug else None,
        Paper.arxiv == arxiv if arxiv else None,
        Paper.title_key == title_key(title) if title_key(title) else None,
    ):
        if condition is not None:
            found = session.scalars(select(Paper).where(condition).order_by(Paper.id).limit(1)).first()
            if found is not None:
                return found
    return None


def sync_catalogue(session: Session, entries: Iterable[Entry], *, now: int) -> Changes:
    """Write what cards and ledgers say.

    Whether evidence is older than the code of its experiment is said where that is known (see :attr:`Entry.code_key`):
    finding it out takes longer than all else, and a site that starts does it afterwards.

    Args:
        session: a session that writes; the caller commits.
        entries: the catalogue.
        now: seconds since 1970.
    """
    one_at_a_time(session, "catalogue")
    changes = Changes()
    entries = list(entries)
    known: dict[str, str] = dict(session.execute(select(Paper.slug, Paper.fingerprint).where(Paper.has_card)).all())
    for entry in entries:
        said = _Said(entry)
        if known.get(entry.slug) == said.fingerprint:
            continue
        paper = find_known(session, arxiv=entry.card.arxiv or None, title=entry.card.title, slug=entry.slug)
        if paper is None:
            paper = Paper(slug=entry.slug, added_at=now, changed_at=now, claims=[])
            session.add(paper)
            changes.added += 1
        else:
            changes.updated += 1
            if paper.slug != entry.slug:
                session.merge(Alias(slug=paper.slug, paper_id=paper.id))
                paper.slug = entry.slug
        changes.verdicts += _write(session, paper, entry, *said.record, now)
        paper.fingerprint, paper.changed_at = said.fingerprint, now
    if entries:
        entries[0].memory.save()
    gone = known.keys() - {entry.slug for entry in entries}
    for paper in session.scalars(select(Paper).where(Paper.slug.in_(gone))):
        changes.gone += 1
        paper.has_card = paper.runs = False
        paper.standing, paper.fingerprint, paper.changed_at = 0.0, "", now
        paper.card = {**paper.card, "missing": ["its card is not in the installed catalogue any more"]}
    session.flush()
    log.info("catalogue: %s", changes)
    return changes


def _write(
    session: Session, paper: Paper, entry: Entry, record: Mapping[str, Any], claims: list[dict[str, Any]], now: int
) -> int:
    # The day of a list that the paper stood on is not the card's to say.
    listed = paper.listed_on if paper.listed_on != paper.date else None
    for name, value in record.items():
        setattr(paper, name, value)
    paper.listed_on = listed or paper.listed_on
    paper.title_key = title_key(paper.title)
    old = {claim.name: claim for claim in paper.claims}
    changed = []
    rows = []
    for position, values in enumerate(claims):
        row = old.get(values["name"]) or ClaimRow(name=values["name"])
        # The first verdict of a paper that is new here is no change; that of one that waited for its runs is.
        if row.verdict is not None and row.verdict != values["verdict"]:
            changed.append((values["name"], values["statement"], row.verdict, values["verdict"]))
        for name, value in values.items():
            setattr(row, name, value)
        row.position = position
        rows.append(row)
    paper.claims = rows
    session.flush()
    for name, statement, before, after in changed:
        session.add(VerdictChange(paper_id=paper.id, claim=name, statement=statement, old=before, new=after, at=now))
    index_paper(session, paper, fields(entry.card))
    return len(changed)


def index_paper(session: Session, paper: Paper, texts: Mapping[str, str] | None = None) -> None:
    """Write a paper's families, tags and searched text.

    Args:
        session: a session that writes.
        paper: the paper, flushed.
        texts: what is searched, a text for each weight; default title and summary.
    """
    for table, column, values in ((PaperFamily, "family", paper.families), (PaperTag, "tag", paper.tags)):
        session.execute(delete(table).where(table.paper_id == paper.id))
        if values:
            session.execute(insert(table), [{"paper_id": paper.id, column: value} for value in values])
    if texts is None:
        names = "\n".join([paper.arxiv or "", *paper.authors, paper.organization, paper.venue])
        texts = {"title": paper.title, "summary": paper.summary or paper.abstract, "names": names}
        texts = {name: with_joined(text) for name, text in texts.items()}
    session.merge(SearchText(paper_id=paper.id, **{name: texts.get(name, "") for name in WEIGHTS}))
    words = {word for text in texts.values() for word in re.findall(r"\w{4,60}", text.lower())}
    insert_new(session, SearchWord, [{"word": word} for word in sorted(words)])


def _record(entry: Entry) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    card = entry.card
    verdicts = count_verdicts(entry.outcomes)
    record = {
        "title": card.title,
        "arxiv": card.arxiv or None,
        "date": card.date,
        "listed_on": card.date,
        "source": "catalogue",
        "problem": card.problem,
        "summary": card.summary,
        "authors": list(card.authors),
        "authors_count": card.authors_count,
        "organization": card.organization,
        "venue": card.venue,
        "listed_comments": card.comments,
        "families": list(card.families),
        "tags": list(card.tags),
        "code_url": card.official.url if card.official else "",
        "card": _page(entry),
        "has_card": True,
        "runs": entry.implemented,
        "held": verdicts[Verdict.HOLDS],
        "verdicts": {verdict.value: count for verdict, count in verdicts.items()},
        "standing": standing(entry),
        "margin": margin(entry.outcomes),
    }
    return record, [_claim(outcome) for outcome in entry.outcomes]


def _claim(outcome: Outcome) -> dict[str, Any]:
    from regularized.evidence.statistics import failure_bound

    claim = outcome.claim
    low, high = outcome.interval or (None, None)
    keys = (
        "metric",
        "unit",
        "direction",
        "relative",
        "pilot",
        "scale",
        "baseline",
        "method",
        "smallest_effect",
        "note",
    )
    worst = outcome.worst_seed
    return {
        "name": claim.id,
        "statement": claim.statement,
        "verdict": outcome.verdict.value,
        "kind": claim.kind,
        "effect": outcome.effect,
        "low": low,
        "high": high,
        "details": {
            **{name: getattr(claim, name) for name in keys},
            "effect_text": effect_text(claim, outcome.effect),
            "interval_text": interval_text(claim, outcome),
            "counts": counts_text(claim),
            "differs": list(claim.differs),
            "p_value": outcome.p_value,
            "worst_seed": None if worst is None else {"seed": worst[0], "effect": worst[1]},
            "worst_text": "" if worst is None else effect_text(claim, worst[1]),
            "reaching": outcome.reaching,
            "may_fail": (
                failure_bound(len(outcome.effects) - outcome.reaching, len(outcome.effects))
                if outcome.verdict is Verdict.HOLDS
                else None
            ),
            "data": outcome.about.get("data", ""),
            "model": outcome.about.get("model", ""),
            "sampling": outcome.about.get("sampling", ""),
            "toy": outcome.toy,
            "seeds": len(outcome.seeds),
            "problem": outcome.problem,
            "attempts": [one.to_dict() for one in outcome.attempts],
            "attempts_text": [attempt_text(claim, one) for one in outcome.attempts],
            "reported": [asdict(reported) for reported in claim.reported],
        },
    }


def _page(entry: Entry) -> dict[str, Any]:
    """What only the page of a paper shows."""
    card = entry.card
    return {
        "changes": card.changes,
        "needs": list(card.needs),
        "when_to_use": card.when_to_use,
        "when_not_to_use": card.when_not_to_use,
        "unconfirmed": list(card.unconfirmed),
        "official": None if card.official is None else card.official.to_dict(),
        "implementation": None if card.implementation is None else asdict(card.implementation),
        "exceptions": [asdict(exception) for exception in card.exceptions],
        "missing": list(entry.missing),
        "usage": entry.usage,
        "bibtex": card.bibtex(),
        "abstract": [sentence.to_dict() for sentence in entry.abstract],
        "evidence": _evidence(entry),
        "cost": _cost(entry),
    }


def _evidence(entry: Entry) -> dict[str, Any] | None:
    measured = entry.measured
    if measured is None:
        return None
    stale = not entry.implemented or (entry.knows_code_key and measured.code_key != entry.code_key)
    ledger = hashlib.sha256(entry.ledger.read_bytes()).hexdigest()
    return {"scale": measured.scale, "seeds": measured.seeds, "stale": stale, "ledger": ledger, **measured.environment}


def _cost(entry: Entry) -> dict[str, Any] | None:
    """Saved benchmark rows."""
    from regularized.evidence.bench_rows import load as load_rows

    try:
        saved = load_rows(entry.folder / "bench.json")
    except ValueError as error:
        log.warning("%s; it is not shown", error)
        return None
    if saved is None:
        return None
    names = ("size", "ratio", "ratio_interval", "floor", "peak_memory_ratio", "size_ratio", "note")
    rows = [{name: row.to_dict()[name] for name in names} for row in saved["rows"]]
    return {"measured": saved["measured"], "cpu": saved["environment"].get("cpu", ""), "rows": rows}


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
