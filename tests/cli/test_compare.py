"""``regularized compare``: plan, result, and what a person gets wrong."""

import json
import re
import signal

import numpy as np
import pytest
from typer.testing import CliRunner

from regularized.cli.app import app
from regularized.evidence import progress


def call(*arguments: str):
    return CliRunner().invoke(app, ("compare", *arguments), prog_name="regularized")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("REGULARIZED_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def table(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(160, 3))
    np.savez(tmp_path / "data.npz", x=x, y=(x.sum(1) > 0).astype(int))
    return str(tmp_path / "data.npz")


def test_a_plan_makes_no_run(table, home):
    """Fails when --plan trains, or hides how long it will take."""
    result = call(table, "--target", "y", "--plan")
    assert result.exit_code == 0, result.stderr
    assert "trainings:" in result.stderr
    assert "left out:" in result.stderr
    assert not list(home.glob("**/*.sqlite*"))


def test_a_comparison_in_json_with_its_report(table, tmp_path, warm_workers):
    """Fails when --json is not the whole result, or the report needs another file."""
    few = ("--candidates", "dropout", "--trials", "1", "--splits", "3", "--epochs", "1", "--workers", "1")
    result = call(table, "--target", "y", *few, "--report", str(tmp_path / "report"), "--json")
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    assert [arm["name"] for arm in told["arms"]] == ["plain", "dropout"]
    assert told["recommendation"]["sentence"]
    assert "problem_of(" in told["snippet"]
    page = (tmp_path / "report" / "report.html").read_text()
    assert told["recommendation"]["sentence"] in page
    assert "http" not in page.replace("http://www.w3.org/", "")
    assert json.loads((tmp_path / "report" / "comparison.json").read_text())["arms"] == told["arms"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 2, "say which array"),
        (("--target", "z"), 2, "say which array"),
        (("--target", "y", "--problem", "weather"), 2, "no family of problems"),
        (("--target", "y", "--budget", "soon"), 2, "such as 90s, 30m or 2h"),
        (("--target", "y", "--metric", "rmse"), 2, "does not fit classification"),
        (("--target", "y", "--candidates", "magic"), 2, "no recipe is named"),
    ],
)
def test_mistakes(table, arguments, code, message):
    """Fails when a mistake costs a traceback, or runs."""
    result = call(table, *arguments)
    assert result.exit_code == code
    assert message in result.stderr


def test_no_such_file():
    """Fails when a missing file is not told from a wrong call."""
    result = call("nowhere.csv", "--target", "y")
    assert result.exit_code == 3
    assert "there is no nowhere.csv" in result.stderr


def test_an_interrupted_comparison_goes_on_where_it_was(table, monkeypatch, warm_workers):
    """Fails when Ctrl-C loses trainings that were made, ends in a traceback, or the same call makes them again.

    What the signal does to processes: tests/evidence/test_runner.py.
    """
    few = ("--candidates", "dropout", "--trials", "1", "--splits", "3", "--epochs", "2", "--workers", "1", "--json")
    command = (table, "--target", "y", *few)
    show = progress._Lines.show

    def interrupting(display, job, answer):
        show(display, job, answer)
        if display._done == 2:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as terminal:
        terminal.setattr(progress._Lines, "show", interrupting)
        # What is started in the background of a shell ignores interrupts.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            first = call(*command)
        finally:
            signal.signal(signal.SIGINT, before)
    assert (first.exit_code, first.stdout) == (130, ""), first.stderr
    assert isinstance(first.exception, SystemExit)
    kept = int(re.search(r"interrupted: (\d) of 6 runs are kept", first.stderr)[1])
    assert kept >= 2
    again = call(*command)
    assert again.exit_code == 0, again.stderr
    told = json.loads(again.stdout)
    assert told["reused"] == kept
    untouched = json.loads(call(*command, "--fresh").stdout)
    assert untouched["reused"] == 0
    values = [arm["values"] for arm in told["arms"]]
    assert [arm["values"] for arm in untouched["arms"]] == values, "interrupting changed a result"
