"""``regularized show SLUG --page``: a technique's page of the documentation, with what was measured, offline."""

import re
from typing import TYPE_CHECKING

from regularized.cli.output import in_terminal
from regularized.papers.catalogue import Entry

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["filled_in", "print_page"]

_MARKER = re.compile(r"\{\{ *(?P<kind>\w+)(?::(?P<argument>\w+))? *\}\}")
# Code first: what looks like a link in it, `model["head"](x)`, is none.
_LINK = re.compile(
    r"^```.*?^```$|(?<!\[)`[^`\n]+`|\[(?P<text>[^\]]+)\](?:\((?P<target>[^)]*)\)|\[(?P<name>[\w.]+)\])",
    re.MULTILINE | re.DOTALL,
)


def filled_in(entry: Entry) -> str:
    """The page as Markdown that needs no other file: measured tables for markers, and links that lead somewhere.

    Args:
        entry: a paper with a page.
    """
    text = _MARKER.sub(lambda marker: _measured(entry, marker["kind"]), entry.page)
    return _LINK.sub(_without_files, text)


def print_page(entry: Entry, console: "Console") -> None:
    """Print the page: rendered in a terminal, as Markdown in a pipe.

    Args:
        entry: a paper with a page.
        console: where to.
    """
    text = filled_in(entry)
    if not in_terminal():
        print(text, end="", flush=True)
        return
    from rich.markdown import Markdown

    console.print(Markdown(text))


def _without_files(link: re.Match[str]) -> str:
    """A link to a page that is not here as its text; to a name of the code as that name."""
    if link["text"] is None:
        return link[0]
    if link["name"]:
        return link["text"]
    return link[0] if link["target"].startswith(("http://", "https://")) else link["text"]


def _measured(entry: Entry, kind: str) -> str:
    if kind == "evidence":
        return _claims(entry)
    if kind == "bench":
        return _costs(entry)
    return "*(a table of the documentation on the web)*"


def _claims(entry: Entry) -> str:
    from regularized.evidence.claims import effect_text, interval_text, reason_text

    rows = []
    for outcome in entry.outcomes:
        claim, reason = outcome.claim, reason_text(outcome)
        measured = f"{effect_text(claim, outcome.effect)} {interval_text(claim, outcome)}"
        verdict = outcome.verdict.value + (f": {reason}" if reason else "")
        rows.append(f"- **{verdict}** {claim.statement} `{claim.method}` over `{claim.baseline}`: {measured}")
    return "\n".join(rows) or "*No claim is stated.*"


def _costs(entry: Entry) -> str:
    from regularized.evidence.bench_rows import load

    saved = load(entry.folder / "bench.json")
    if saved is None:
        return f"*Not measured yet: `regularized bench {entry.slug}` measures it.*"
    return "\n".join(
        f"- {row.size}: {row.ratio:.2f} x a plain step ({row.ratio_interval[0]:.2f} to {row.ratio_interval[1]:.2f})"
        + ("" if row.peak_memory_ratio is None else f", {row.peak_memory_ratio:.2f} x its peak memory")
        for row in saved["rows"]
    )
