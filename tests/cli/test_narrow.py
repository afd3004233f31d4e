"""A terminal of 60 to 80 columns, and a pipe: nothing is broken into words, and nothing is said to the wide alone."""

import os
import pty
import re
import subprocess
import sys
import termios

import pytest

from regularized.cli.output import emit_table
from regularized.papers.catalogue import load_catalogue

ENTRIES = load_catalogue()
MIXED = next(e.slug for e in ENTRIES if {"holds", "open"} <= {outcome.verdict.value for outcome in e.outcomes})
LONGEST = max((entry for entry in ENTRIES if entry.implemented), key=lambda entry: len(entry.slug)).slug


def shown(width: int, *arguments: str) -> str:
    """What a command prints in a terminal of this width."""
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (50, width))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    command = [sys.executable, "-m", "regularized", *arguments]
    with subprocess.Popen(command, stdout=follower, stderr=subprocess.PIPE, env={**environment, "TERM": "xterm"}):
        os.close(follower)
        chunks = []
        while True:
            try:
                chunk = os.read(leader, 4096)
            except OSError:  # Linux: the other end was closed
                break
            if not chunk:
                break
            chunks.append(chunk)
    os.close(leader)
    return re.sub(r"\x1b\[[0-9;]*m", "", b"".join(chunks).decode()).replace("\r\n", "\n")


@pytest.mark.parametrize("width", [60, 80])
def test_papers(width):
    """Fails when a slug, which is to be typed, is broken, or a column is so narrow that it holds a word a line."""
    text = shown(width, "papers", "--implemented")
    lines = [line.rstrip() for line in text.splitlines()]
    assert LONGEST in lines
    assert max(map(len, lines)) <= width
    words = [len(line.split()) for line in lines if line.startswith("  problem:")]
    assert sum(words) / len(words) > 5


def test_papers_in_a_wide_terminal():
    """Fails when a terminal that has room for the table gets blocks."""
    assert "─" in shown(120, "papers", "--limit", "2")


@pytest.mark.parametrize("width", [60, 80])
def test_claims_of_a_paper(width):
    """Fails when a claim stands in what is left beside the longest verdict."""
    lines = shown(width, "show", MIXED).splitlines()
    start = lines.index("Claims")
    verdicts = [i for i, line in enumerate(lines[start:], start) if line.rstrip() in ("holds", "open")]
    assert verdicts
    assert all(lines[i + 1].startswith("  ") and len(lines[i + 1].split()) > 5 for i in verdicts)


def test_the_reason_stands_beside_open(capsys):
    """Fails when a claim is open and nobody says why, in the page of a paper or in a pipe."""
    from regularized.cli.running import print_claims
    from regularized.evidence.claims import Claim, Outcome, Verdict
    from regularized.evidence.results import ReproduceResult

    claim = Claim("c", "s", "m", "higher", "a", "b", smallest_effect=2.0, unit="points")
    outcomes = (
        Outcome(claim, Verdict.OPEN, effect=2.1, interval=(1.0, 3.0)),
        Outcome(claim, Verdict.OPEN, effect=2.1, problem="3 of the 10 declared seeds"),
        Outcome(claim, Verdict.HOLDS, effect=9.0),
    )
    print_claims(ReproduceResult("slug", "m", "laptop", (0,), ("a", "b"), outcomes, ()))
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert rows[0][-2:] == ["verdict", "reason"]
    assert [row[-1] for row in rows[1:]] == [
        "surely neither at least +2 points nor less: more seeds would tell",
        "3 of the 10 declared seeds",
        "",
    ]


def test_claims_of_a_run():
    """Fails when six columns share sixty characters, or a claim's reason is left out of them."""
    import io

    from rich.console import Console

    from regularized.evidence import report
    from regularized.evidence.claims import Claim, Outcome, Verdict
    from regularized.evidence.results import ReproduceResult

    claim = Claim(
        "bright", "The method is a point better.", "m", "higher", "a", "b", smallest_effect=1.0, unit="points"
    )
    judged = (Outcome(claim, Verdict.OPEN, effect=1.1, interval=(0.0, 2.2)),)
    out = io.StringIO()
    result = ReproduceResult("slug", "m", "laptop", (0,), ("a", "b"), judged, ())
    report.print_table(result, Console(file=out, width=60, color_system=None))
    text = out.getvalue()
    assert "open bright\nThe method is a point better.\nb over a: +1.1 points [0, 2.2], counts from +1 points" in text
    assert "bright: surely neither at least +1 points" in text


def test_blocks_are_only_for_a_terminal(capsys):
    """Fails when a pipe gets blocks because nobody knows its width."""
    emit_table(["slug", "problem"], [["a" * 50, "b" * 200]])
    assert capsys.readouterr().out.splitlines()[1] == "a" * 50 + "\t" + "b" * 200


@pytest.mark.parametrize("command", [["-m", "regularized"], ["-m", "regularized.cli"]])
def test_short_help(command):
    """Fails when -h is an unknown option, of the whole or of a command, or the package cannot be run as a module."""
    for arguments in (["-h"], ["show", "-h"]):
        done = subprocess.run([sys.executable, *command, *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "Usage: regularized" in done.stdout
