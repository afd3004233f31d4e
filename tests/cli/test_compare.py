"""``regularized compare``: plan, result, and what a person gets wrong."""

import json
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

from regularized.cli.app import app


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


@pytest.mark.slow
def test_a_comparison_in_json_with_its_report(table, tmp_path):
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


@pytest.mark.slow
def test_an_interrupted_comparison_goes_on_where_it_was(tmp_path, home):
    """Fails when Ctrl-C loses trainings that were made, ends in a traceback, or the same call makes them again."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(600, 8))
    np.savez(tmp_path / "data.npz", x=x, y=(x.sum(1) > 0).astype(int))
    few = ["--candidates", "dropout", "--trials", "2", "--splits", "3", "--epochs", "3", "--workers", "1"]
    data = [str(tmp_path / "data.npz"), "--target", "y"]
    command = [sys.executable, "-m", "regularized", "compare", *data, *few, "--json"]
    piped = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # What is started in the background of a shell ignores interrupts, and so do its children.
    heeding = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.default_int_handler)}
    first = subprocess.Popen(command, **piped, **heeding, start_new_session=True)
    for line in first.stderr:
        if re.match(r"\[3/", line):  # three trainings are kept
            break
    os.killpg(first.pid, signal.SIGINT)  # as a terminal does: to the command and to its workers
    out, err = first.communicate(timeout=120)
    assert (first.returncode, out) == (130, ""), err
    assert "Traceback" not in err
    kept = int(re.search(r"interrupted: (\d+) of \d+ runs are kept", err)[1])
    assert kept >= 3
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    told = json.loads(again.stdout)
    assert told["reused"] == kept
    untouched = subprocess.run([*command, "--fresh"], capture_output=True, text=True)
    values = [arm["values"] for arm in told["arms"]]
    assert [arm["values"] for arm in json.loads(untouched.stdout)["arms"]] == values, "interrupting changed a result"
