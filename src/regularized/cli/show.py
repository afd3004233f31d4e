"""``regularized show``: a paper for a person to read, or as JSON."""

import logging
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from regularized.evidence.claims import Outcome, Verdict
from regularized.papers.abstract import coverage
from regularized.papers.card import FAMILIES
from regularized.papers.catalogue import Entry

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["print_paper", "to_json"]

log: logging.Logger = logging.getLogger(__name__)

_STYLES = {
    Verdict.HOLDS: "green",
    Verdict.SMALLER: "cyan",
    Verdict.NO_EFFECT: "red",
    Verdict.OPPOSITE: "red",
    Verdict.OPEN: "yellow",
    Verdict.CONTESTED: "magenta",
    Verdict.NOT_RUN: "dim",
}


def to_json(entry: Entry) -> dict[str, Any]:
    """Everything that is known of a paper, as plain data: the keys of ``papers --json`` and more."""
    card = entry.card
    return {
        **entry.to_dict(),
        "arxiv": card.arxiv,
        "venue": card.venue,
        "authors": list(card.authors),
        "problem": card.problem,
        "summary": card.summary,
        "changes": card.changes,
        "needs": list(card.needs),
        "when_to_use": card.when_to_use,
        "when_not_to_use": card.when_not_to_use,
        "unconfirmed": list(card.unconfirmed),
        "official": None if card.official is None else card.official.to_dict(),
        "implementation": None if card.implementation is None else asdict(card.implementation),
        "missing": list(entry.missing),
        "exceptions": [asdict(exception) for exception in card.exceptions],
        "usage": entry.usage,
        "claims": [_claim(outcome) for outcome in entry.outcomes],
        "abstract": [sentence.to_dict() for sentence in entry.abstract],
        "abstract_claims": [pair for sentence in entry.abstract for pair in sentence.pairs()],
        "evidence": _evidence(entry),
        "cost": _cost(entry),
        "bibtex": card.bibtex(),
    }


def _claim(outcome: Outcome) -> dict[str, Any]:
    claim = outcome.claim
    return {
        **{
            name: getattr(claim, name)
            for name in ("id", "statement", "metric", "unit", "direction", "kind", "relative", "pilot", "scale")
        },
        **{name: getattr(claim, name) for name in ("baseline", "method", "smallest_effect", "note")},
        "verdict": outcome.verdict.value,
        "effect": outcome.effect,
        "interval": list(outcome.interval or (None, None)),
        "differs": list(claim.differs),
        "p_value": outcome.p_value,
        "effects": list(outcome.effects),
        "worst_seed": None if outcome.worst_seed is None else dict(zip(("seed", "effect"), outcome.worst_seed)),
        "seeds": list(outcome.seeds),
        "data": outcome.about.get("data"),
        "model": outcome.about.get("model"),
        "sampling": outcome.about.get("sampling"),
        "toy": outcome.toy,
        "problem": outcome.problem,
        "attempts": [one.to_dict() for one in outcome.attempts],
        "reported": [asdict(reported) for reported in claim.reported],
    }


def _evidence(entry: Entry) -> dict[str, Any] | None:
    """Where the shipped runs come from; None without any."""
    ledger = entry.load_ledger()
    if ledger is None:
        return None
    stale = ledger.is_stale(entry.code_key) if entry.implemented else True
    environment = dict(ledger.environment)
    return {
        "scale": ledger.scale,
        "seeds": list(ledger.seeds),
        "why_seeds": ledger.why_seeds,
        "settings": dict(ledger.settings),
        "about": dict(ledger.about),
        "confirmations": list(ledger.confirmations),
        "stale": stale,
        "environment": environment,
    }


def _cost(entry: Entry) -> dict[str, Any] | None:
    """What a step costs, as measured on the developers' machine; None where that was not saved."""
    from regularized.evidence.bench_rows import load

    try:
        saved = load(entry.folder / "bench.json")
    except ValueError as error:
        log.warning("%s", error)
        return None
    return None if saved is None else {**saved, "rows": [row.to_dict() for row in saved["rows"]]}


def print_paper(entry: Entry, console: "Console") -> None:
    """Print problem, summary, use and evidence.

    Args:
        entry: the paper.
        console: where to.
    """
    from rich.markup import escape

    card = entry.card
    about = [card.date.isoformat(), card.venue, f"arXiv {card.arxiv}" if card.arxiv else "", card.organization]
    authors = ", ".join(card.authors) or (f"{card.authors_count} authors" if card.authors_count else "")
    console.print(f"[bold]{escape(card.title)}[/]")
    console.print(escape("  ".join(part for part in (entry.slug, authors, *about) if part)))
    console.print(f"\n[italic]{escape(card.problem)}[/]\n")
    console.print(escape(card.summary))
    facts = {
        "family": ", ".join(FAMILIES[family] for family in card.families),
        "changes": card.changes,
        "needs": ", ".join(card.needs) or "nothing beyond the batch",
        "use it": card.when_to_use,
        "not for": card.when_not_to_use,
        "official code": _official(entry),
    }
    console.print()
    _print_facts(facts, console)
    if entry.implemented:
        if entry.usage:
            console.print("\n[bold]Use it[/]\n")
            console.print(entry.usage, markup=False, soft_wrap=True)
    else:
        console.print(f"\n[yellow]No code that runs yet[/]: {escape('; '.join(entry.missing))}.")
    _print_claims(entry, console)
    _print_abstract(entry, console)
    _print_cost(entry, console)
    for exception in card.exceptions:
        console.print(
            f"\n[yellow]Does not pass {exception.check}[/]: {escape(exception.reason)} Until: {exception.until}"
        )
    if card.official is not None and card.official.blockers:
        console.print("\n[bold]Known blockers of the authors' code[/]")
        for blocker in card.official.blockers:
            console.print(escape(f"- issue {blocker.issue}: {blocker.breaks}"))
    if card.unconfirmed:
        console.print("\n[bold]Unconfirmed[/]")
        for line in card.unconfirmed:
            console.print(escape(f"- {line}"))


def _official(entry: Entry) -> str:
    official = entry.card.official
    if official is None:
        return "none known"
    at = f" at {official.commit}" if official.commit else ""
    note = f". {official.note}" if official.note else ""
    return f"{official.url}{at}, {official.licence or 'no licence stated'}{note}"


def _print_facts(facts: dict[str, str], console: "Console") -> None:
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True, style="bold")
    grid.add_column(overflow="fold")
    for name, value in facts.items():
        grid.add_row(Text(name), Text(value))
    console.print(grid)


def _print_abstract(entry: Entry, console: "Console") -> None:
    from rich.text import Text

    if entry.abstract:
        console.print(f"\n[bold]{coverage(entry.abstract).capitalize()}[/]")
    for sentence in entry.abstract:
        told = ", ".join(sentence.tested_by) or f"not tested: {sentence.untested}"
        console.print(Text(f"- {sentence.says}").append(f" {told}", style="dim"))


def _print_claims(entry: Entry, console: "Console") -> None:
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    from regularized.evidence.claims import attempt_text, counts_text, effect_text, interval_text, reason_text
    from regularized.evidence.numbers import NARROW, number

    if not entry.card.claims:
        return
    console.print("\n[bold]Claims[/]")
    narrow = console.width < NARROW
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for outcome in entry.outcomes:
        claim = outcome.claim
        details = []
        if outcome.effect is not None:
            details.append(
                f"{claim.method} over {claim.baseline}: {effect_text(claim, outcome.effect)}, 95 % interval "
                f"{interval_text(claim, outcome)} over {len(outcome.seeds)} seeds; "
                f"{counts_text(claim)}"
            )
        details += [
            f"the paper: {number(r.baseline)} to {number(r.method)}, {r.setting} ({r.source})" for r in claim.reported
        ]
        details += [text for text in (reason_text(outcome), claim.note) if text]
        if len(outcome.attempts) > 1:
            details += map(partial(attempt_text, claim), outcome.attempts)
        verdict = Text(outcome.verdict.value, style=_STYLES[outcome.verdict])
        told = Text(claim.statement).append("".join(f"\n{text}" for text in details), style="dim")
        if narrow:  # beside the longest verdict there would be no room
            console.print(verdict)
            console.print(Padding(told, (0, 0, 1, 2)))
        else:
            grid.add_row(verdict, told)
    if not narrow:
        console.print(grid)
    evidence = _evidence(entry)
    if evidence is not None:
        stale = " [yellow]The code has changed since.[/]" if evidence["stale"] else ""
        console.print(f"Measured at {evidence['scale']} scale, {len(evidence['seeds'])} seeds.{stale}")
    if entry.implemented:
        console.print(f"Run it yourself: regularized reproduce {entry.slug}")


def _print_cost(entry: Entry, console: "Console") -> None:
    from rich.markup import escape

    implementation = entry.card.implementation
    if implementation is None:
        return
    console.print(
        f"\n[bold]Cost of a step[/]: at least {implementation.floor:g} x plain training "
        f"({escape(implementation.floor_reason)})"
    )
    cost = _cost(entry)
    if cost is not None:
        for row in cost["rows"]:
            low, high = row["ratio_interval"]
            console.print(f"- {row['size']}: {row['ratio']:.3f} x [{low:.3f}, {high:.3f}]", markup=False)
