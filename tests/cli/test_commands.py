"""The command line: what scripts rely on, what people read, and exit codes."""

import csv
import io
import json
import os
import pty
import re
import resource
import subprocess
import sys
from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

from regularized.cli.app import app
from regularized.cli.output import Output, emit_json
from regularized.evidence import runner as evidence_runner
from regularized.evidence.conformance import Row, conform
from regularized.evidence.contract import Outcome
from regularized.evidence.experiment import Unavailable
from regularized.evidence.results import Failure, ReproduceResult, Trial, TuningResult, outcomes
from regularized.evidence.store import Run, StoreError
from regularized.papers.catalogue import load_catalogue

ENTRIES = load_catalogue()
IMPLEMENTED = [entry for entry in ENTRIES if entry.implemented]
PAPER = IMPLEMENTED[0]


def call(*arguments: str):
    return CliRunner().invoke(app, arguments, prog_name="regularized")


def as_json(*arguments: str):
    result = call(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("REGULARIZED_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def known(home, tell_what_is_known):
    """Commands in processes of their own find in this home what is known of the papers."""
    tell_what_is_known()


@pytest.fixture
def measured(monkeypatch):
    """The runner replaced by canned runs: every arm measures 1, 2, ... for every metric; returns what it was asked."""
    asked: list[dict[str, object]] = []

    def reproduce(slug, module_name, claims, **options):
        asked.append(options)
        seeds = tuple(range(options.get("seeds") or 10))
        arms = tuple(PAPER.experiment().ARMS)
        metrics = {claim.metric: 1.0 for claim in claims}
        runs = tuple(
            Run(slug, options.get("scale", "laptop"), arm, seed, "key", {}, dict.fromkeys(metrics, 1.0 + seed))
            for arm in arms
            for seed in seeds
        )
        scale = options.get("scale", "laptop")
        judged = outcomes(claims, runs, seeds=seeds, scale=scale)
        return ReproduceResult(slug, module_name, scale, seeds, arms, judged, runs)

    monkeypatch.setattr(evidence_runner, "reproduce", reproduce)
    return asked


# -- papers, show, cite -------------------------------------------------------------------------


def test_papers_json_has_the_promised_keys():
    """Fails when a key that scripts rely on is renamed, or the output is anything but the bare list."""
    rows = as_json("papers")
    assert len(rows) == len(ENTRIES)
    keys = "slug title date authors_count organization comments families tags implemented claims verdicts sanity"
    assert all(list(row) == keys.split() for row in rows)
    assert all(list(claim) == ["id", "statement", "verdict"] for row in rows for claim in row["claims"])
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d", row["date"]) for row in rows)


def test_search_and_filters():
    """Fails when the search is not passed on, the order is lost, or a filter keeps the others."""
    found = as_json("papers", "--search", "annotators disagree", "--limit", "3")
    assert len(found) == 3
    assert found[0]["matched"] == "annotators, disagree: searches"
    assert {"families"} & found[0].keys()
    assert as_json("papers", "--search", "qqqqqqq") == []
    assert {row["slug"] for row in as_json("papers", "--implemented")} == {entry.slug for entry in IMPLEMENTED}
    family = PAPER.card.families[0]
    assert all(family in row["families"] for row in as_json("papers", "--family", family))
    wrong = call("papers", "--family", "nothing")
    assert wrong.exit_code == 2
    assert "families: noisy_labels" in wrong.stderr


def test_tab_separated_in_a_pipe():
    """Fails when a pipe gets boxes, colours or cut cells."""
    lines = list(csv.reader(io.StringIO(call("papers").stdout), delimiter="\t", quoting=csv.QUOTE_NONE))
    assert lines[0] == ["slug", "title", "date", "implemented", "evidence", "problem"]
    assert {len(line) for line in lines} == {6}
    assert [line[0] for line in lines[1:]] == [entry.slug for entry in ENTRIES]
    assert lines[1][5] == ENTRIES[0].card.problem


@pytest.mark.usefixtures("known")
def test_table_in_a_terminal():
    """Fails when a person in front of a terminal gets tab-separated values."""
    leader, follower = pty.openpty()
    command = [sys.executable, "-m", "regularized.cli", "papers", "--limit", "2"]
    with subprocess.Popen(command, stdout=follower, stderr=subprocess.PIPE, env={**os.environ, "COLUMNS": "100"}):
        os.close(follower)
        text = _read(leader)
    assert "\t" not in text
    assert "─" in text
    assert ENTRIES[0].slug in text


def _read(descriptor: int) -> str:
    chunks = []
    try:
        while chunk := os.read(descriptor, 4096):
            chunks.append(chunk)
    except OSError:  # Linux: the other end was closed
        pass
    os.close(descriptor)
    return b"".join(chunks).decode()


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.slug)
def test_show(entry):
    """Fails when a card of some form (no official code, no claims, not implemented) cannot be shown."""
    text = call("show", entry.slug)
    assert text.exit_code == 0, text.output
    assert entry.card.title in " ".join(text.stdout.split())
    assert ("No code that runs yet" in text.stdout) is not entry.implemented
    shown = as_json("show", entry.slug)
    assert shown["problem"] == entry.card.problem
    assert {"verdict", "effect", "interval", "smallest_effect", "reported"} <= set(shown["claims"][0])
    for blocker in [] if shown["official"] is None else shown["official"]["blockers"]:
        assert f"issue {blocker['issue']}: {blocker['breaks'].split()[0]}" in text.stdout
        assert blocker["url"].endswith(f"/issues/{blocker['issue']}")


def test_cite():
    """Fails when several papers give fewer entries."""
    slugs = [entry.slug for entry in ENTRIES[:2]]
    assert call("cite", *slugs).stdout.count("@misc{") == 2
    assert [row["slug"] for row in as_json("cite", *slugs)] == slugs


def test_cost():
    """Fails when what nobody knows is a number, or the sum is not that of arms and seeds."""
    (row,) = as_json("cost", PAPER.slug)
    assert row["runs"] == row["arms"] * row["seeds"] > 0
    assert row["hours"]["value"] is None
    assert call("cost", PAPER.slug).stdout.splitlines()[1].split("\t")[6] == "unknown"
    wrong = call("cost", PAPER.slug, "--scale", "vast")
    assert (wrong.exit_code, "no scale 'vast'" in wrong.output) == (2, True)


def test_versions():
    """Fails when scripts cannot tell which keys to expect."""
    assert re.fullmatch(r"regularized \d+\.\d+\.\d+\S*\n", call("--version").stdout)
    about = as_json("--version")
    assert about["schema_version"] == 1
    assert call("--version").stdout.split()[1] == about["version"]


# -- reproduce, tune, ledger --------------------------------------------------------------------


def test_reproduce_json(measured, tmp_path):
    """Fails when a key that scripts rely on is missing, or options do not reach the runner."""
    result = as_json(
        "reproduce",
        PAPER.slug,
        "--scale",
        "smoke",
        "--seeds",
        "3",
        "--first",
        "300",
        "--workers",
        "1",
        "--report",
        str(tmp_path / "here"),
    )
    assert {"slug", "scale", "seeds", "claims", "arms", "report", "seconds"} <= set(result)
    assert (result["slug"], result["scale"], result["seeds"]) == (PAPER.slug, "smoke", 3)
    keys = {"id", "statement", "metric", "baseline", "method", "effect", "interval", "verdict"}
    assert all(keys <= set(claim) and len(claim["interval"]) == 2 for claim in result["claims"])
    assert all(len(values) == 3 for arm in result["arms"].values() for values in arm.values())
    assert result["report"] == str(tmp_path / "here" / "report.html")
    assert (tmp_path / "here" / "report.html").is_file()
    asked = {"scale": "smoke", "seeds": 3, "first": 300, "workers": 1, "fresh": False, "time_limit": None, "arms": None}
    assert measured == [asked]


def test_reproduce_prints_verdicts_and_exits_with_zero(measured):
    """Fails when a claim that does not hold makes the command fail, or the verdict or the report is not told."""
    result = call("reproduce", PAPER.slug)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines()[0].split("\t")[-2:] == ["verdict", "reason"]
    assert "no effect shown" in result.stdout
    assert "report with plots: " in result.stderr


def test_a_report_that_cannot_be_written_is_told_before_the_runs(measured, tmp_path, home):
    """Fails when hours of runs end in a traceback, because nobody tried whether their report has a place."""
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", os.devnull):
        result = call("reproduce", PAPER.slug, "--report", str(place))
        assert (result.exit_code, result.stdout) == (1, "")
        assert "cannot write a report to" in result.stderr
    assert not measured, "runs were made first"
    home.mkdir()
    (home / "reports").touch()  # the usual place is not to be had: the result is shown without it
    result = call("reproduce", PAPER.slug)
    assert result.exit_code == 0
    assert "verdict" in result.stdout
    assert "cannot write a report to" in result.stderr


def test_a_failed_run_exits_with_one(monkeypatch):
    """Fails when a script cannot tell that runs are missing; what was measured is still printed."""
    failed = ReproduceResult(
        PAPER.slug, "m", "smoke", (0,), ("a",), (), (), failures=(Failure("a", 0, "ValueError: broken"),)
    )
    monkeypatch.setattr(evidence_runner, "reproduce", lambda *a, **k: failed)
    result = call("reproduce", PAPER.slug, "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["failures"][0]["error"] == "ValueError: broken"
    assert "1 of 1 runs failed; the first, arm 'a' with seed 0: ValueError: broken" in result.stderr


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (Unavailable("CIFAR-10 is not under /data"), 4, "error: CIFAR-10 is not under"),
        (ImportError('needs transformers: pip install "regularized[huggingface]"'), 4, "pip install"),
        (ValueError("there is no scale 'tiny'"), 2, "no scale 'tiny'"),
        (StoreError("the store is damaged"), 1, "the store is damaged"),
        (RuntimeError("the experiment does not run"), 1, "does not run"),
        (evidence_runner.Interrupted(3, 10), 130, "3 of 10 runs are kept"),
    ],
)
def test_exit_codes(monkeypatch, error, code, says):
    """Fails when an error that a person can mend ends in a traceback, on standard output, or with another code."""

    def fail(*_arguments: object, **_options: object) -> None:
        raise error

    monkeypatch.setattr(evidence_runner, "reproduce", fail)
    result = call("reproduce", PAPER.slug, "--json")
    assert (result.exit_code, result.stdout) == (code, "")
    assert says in result.stderr
    assert "Traceback" not in result.stderr


def test_a_defect_keeps_its_traceback(monkeypatch):
    """Fails when a defect of ours is dressed up as a user's error."""

    def fail(*_arguments: object, **_options: object) -> None:
        raise KeyError("a defect")

    monkeypatch.setattr(evidence_runner, "reproduce", fail)
    assert isinstance(call("reproduce", PAPER.slug).exception, KeyError)


@pytest.mark.parametrize(
    "command", ["show", "cost", "reproduce", "tune", "conform", "contract", "bench", "cite", "ledger"]
)
def test_unknown_paper(command):
    """Fails when a misspelt slug gets no suggestion, or another exit code than "not found"."""
    result = call(command, PAPER.slug[:-1])
    assert (result.exit_code, result.stdout) == (3, "")
    assert f"Did you mean {PAPER.slug}" in result.stderr


@pytest.mark.parametrize("command", ["cost", "reproduce", "tune", "conform", "contract", "bench", "ledger"])
def test_paper_without_code(command, monkeypatch):
    """Fails when a paper without code gives a traceback, or does not say what is missing."""
    waiting = SimpleNamespace(slug="waiting", implemented=False, missing=("no experiment.py",))
    monkeypatch.setattr("regularized.papers.catalogue.find", lambda slug: waiting)
    result = call(command, "waiting")
    assert result.exit_code == 4
    assert "has no code that runs yet (no " in result.stderr


def test_tune(monkeypatch):
    """Fails when trials are lost, or an arm that does not run with its best settings goes unmentioned."""
    trials = (Trial("a", {"lr": 0.1}, (1.0, 2.0)), Trial("a", {"lr": 0.2}, (3.0, 4.0), best=True))
    result = TuningResult("accuracy", "higher", (1000, 1001), trials, {"a": False})
    monkeypatch.setattr(evidence_runner, "tune", lambda *a, **k: result)
    shown = as_json("tune", PAPER.slug)
    assert [(trial["mean"], trial["best"]) for trial in shown["trials"]] == [(1.5, False), (3.5, True)]
    text = call("tune", PAPER.slug)
    assert "a\tlr=0.2\t3.5\tbest" in text.stdout
    assert "arm 'a' of the experiment does not use its best settings {'lr': 0.2}" in text.stderr


def test_ledger(monkeypatch, measured, tmp_path):
    """Fails when evidence of uncommitted code is made for nothing, tuning is left out, or the file is not told."""
    from regularized.evidence import ledger, provenance

    tuned: list[str] = []
    monkeypatch.setattr(
        evidence_runner, "tune", lambda slug, *a, **k: tuned.append(slug) or TuningResult("m", "higher", (), ())
    )
    monkeypatch.setattr(ledger, "export", lambda slug, module, claims: tmp_path / "ledger.json")
    monkeypatch.setattr(provenance, "checkout_state", lambda files: provenance.CheckoutState("abc", True))
    refused = call("ledger", PAPER.slug)
    assert refused.exit_code == 1
    assert "uncommitted changes: commit first" in refused.stderr
    assert not measured
    monkeypatch.setattr(provenance, "checkout_state", lambda files: provenance.CheckoutState("abc", False))
    assert as_json("ledger", PAPER.slug) == [{"slug": PAPER.slug, "ledger": str(tmp_path / "ledger.json")}]
    assert tuned == ([PAPER.slug] if hasattr(PAPER.experiment(), "TUNING") else [])


class _HandedOver(Exception):
    """The engine has the runs."""


@pytest.mark.parametrize(
    "arguments",
    [
        ("reproduce", "PAPER", "--scale", "smoke"),
        ("tune", "PAPER"),
        ("ledger", "PAPER"),
        ("compare", "data.npz", "--target", "y", "--candidates", "dropout", "--trials", "1", "--splits", "3"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_runs_are_made_where_the_engine_says(arguments, monkeypatch, tmp_path):
    """Fails when a command makes its runs here although another place was named, or does not tell it the GPUs of each.

    What an engine then does with them is a matter of tests/evidence/test_engines.py.
    """
    from regularized.evidence import engines, ledger, provenance
    from regularized.evidence.pool import Pool

    tuned = next(entry.slug for entry in IMPLEMENTED if hasattr(entry.experiment(), "TUNING"))
    arguments = [tuned if argument == "PAPER" else argument for argument in arguments]

    def pool(engine, module_name, jobs, **options):
        assert jobs
        raise _HandedOver(engine)

    def here(*arguments, **options):
        raise RuntimeError("the runs are made here")

    monkeypatch.chdir(tmp_path)
    np.savez("data.npz", x=np.arange(480.0).reshape(160, 3), y=np.arange(160) % 2)
    monkeypatch.setattr(engines, "RayEngine", lambda gpus: ("ray", gpus))
    monkeypatch.setattr(engines, "DaskEngine", lambda gpus: ("dask", gpus))
    monkeypatch.setattr(engines, "EnginePool", pool)
    monkeypatch.setattr(Pool, "__init__", here)
    # Without the ledger that ships, whose runs need not be made again.
    monkeypatch.setattr(ledger, "path", lambda module_name: tmp_path / "ledger.json")
    monkeypatch.setattr(provenance, "checkout_state", lambda files: provenance.CheckoutState("abc", False))
    for name, gpus in (("ray", 0.5), ("dask", 0.0)):
        result = call(*arguments, "--engine", name, *(("--gpus", str(gpus)) if gpus else ()))
        assert isinstance(result.exception, _HandedOver), result.exception
        assert result.exception.args == ((name, gpus),)
    refused = call(*arguments, "--gpus", "1")
    assert refused.exit_code == 2
    assert "--gpus is for --engine ray or dask" in refused.stderr


# -- conform, bench -----------------------------------------------------------------------------


def test_conform_shipped(monkeypatch):
    """Fails when an implemented paper is left out, or a key that scripts rely on is missing.

    Each paper's agreement is a test of tests/test_contract.py; here one computes.
    """

    def compare(slug, adapter, golden):
        assert golden.is_file()
        return conform(slug, adapter, golden) if slug == PAPER.slug else [Row(slug, "c", "o", 0.0, 0.0, 1e-6, True)]

    monkeypatch.setattr("regularized.evidence.conformance.conform", compare)
    rows = as_json("conform")
    assert {row["slug"] for row in rows} == {entry.slug for entry in IMPLEMENTED}
    keys = {"slug", "case", "output", "max_abs_error", "max_rel_error", "tolerance", "ok"}
    assert all(keys <= set(row) and row["ok"] for row in rows)


def _golden_files(folder, change) -> None:
    folder.mkdir()
    with np.load(PAPER.golden, allow_pickle=False) as archive:
        arrays = {key: archive[key] for key in archive.files}
    change(arrays)
    np.savez(folder / f"{PAPER.slug}.npz", **arrays)


def test_conform_other_folder(tmp_path):
    """Fails when a wrong output passes, a missing file is an error without a slug or none with one."""

    def spoil(arrays):
        key = next(key for key in arrays if "/out/" in key and arrays[key].dtype.kind == "f" and arrays[key].size)
        arrays[key] = arrays[key] + 1

    _golden_files(tmp_path / "golden", spoil)
    result = call("conform", "--golden", str(tmp_path / "golden"), "--json")
    assert result.exit_code == 1
    rows = json.loads(result.stdout)
    assert {row["slug"] for row in rows} == {PAPER.slug}
    assert sum(not row["ok"] for row in rows) == 1
    assert f"{len(rows) - 1} of {len(rows)} outputs agree" in result.stderr
    (tmp_path / "empty").mkdir()
    assert call("conform", "--golden", str(tmp_path / "empty")).exit_code == 3
    assert call("conform", PAPER.slug, "--golden", str(tmp_path / "empty")).exit_code == 3
    assert call("conform", "--golden", str(tmp_path / "nowhere")).exit_code == 3


def test_conform_case_that_nobody_understands(tmp_path):
    """Fails when a case without an adapter counts as agreement."""

    def strange(arrays):
        arrays["strange/in/nothing_like_this"] = np.zeros(3)
        arrays["strange/out/value"] = np.zeros(3)

    _golden_files(tmp_path / "golden", strange)
    result = call("conform", PAPER.slug, "--golden", str(tmp_path / "golden"), "--json")
    assert result.exit_code == 1
    wrong = [row for row in json.loads(result.stdout) if not row["ok"]]
    assert [row["case"] for row in wrong] == ["strange"]
    assert wrong[0]["max_rel_error"] is None


def test_contract_of_a_paper():
    """Fails when a check is missing in what scripts read, or one that does not apply counts as passed."""
    rows = as_json("contract", "grokking")
    assert {row["slug"] for row in rows} == {"grokking"}
    assert all(set(row) == {"slug", "subject", "check", "status", "reason"} for row in rows)
    assert {row["status"] for row in rows if row["check"] == "it_bites"} == {"passed"}
    assert {row["status"] for row in rows} <= {"passed", "not_applicable"}
    assert all(bool(row["reason"]) == (row["status"] == "not_applicable") for row in rows)


def test_contract_of_a_module(tmp_path, monkeypatch):
    """Fails when a fault of one's own technique exits with 0, or the module is looked for elsewhere."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "blind.py").write_text(
        "import torch\n"
        "from regularized.evidence.contract import DiagnosticSubject\n"
        "def subjects():\n"
        "    return [DiagnosticSubject('one', lambda: torch.nn.Linear(2, 2), lambda model: {'out': torch.ones(1)})]\n"
    )
    (tmp_path / "empty.py").write_text("")
    result = call("contract", "--module", "blind", "--json")
    assert result.exit_code == 1
    rows = {row["check"]: row for row in json.loads(result.stdout)}
    assert rows["it_bites"]["status"] == "failed"
    assert "same report" in rows["it_bites"]["reason"]
    assert rows["it_bites"]["slug"] == "blind"
    assert call("contract", "--module", "nowhere").exit_code == 3
    assert call("contract", "--module", "empty").exit_code == 2
    assert call("contract", "grokking", "--module", "blind").exit_code == 2


def test_conform_damaged_file(tmp_path):
    """Fails when one damaged file takes the other papers' rows with it."""
    (tmp_path / "golden").mkdir()
    for entry in IMPLEMENTED[:2]:
        (tmp_path / "golden" / f"{entry.slug}.npz").write_bytes(entry.golden.read_bytes())
    damaged = tmp_path / "golden" / f"{PAPER.slug}.npz"
    damaged.write_bytes(damaged.read_bytes()[:100])
    result = call("conform", "--golden", str(tmp_path / "golden"), "--json")
    assert result.exit_code == 1
    assert {row["slug"] for row in json.loads(result.stdout)} == {IMPLEMENTED[1].slug}
    assert "corrupt or truncated" in result.stderr


@pytest.mark.parametrize("command", ["conform", "contract", "bench"])
def test_code_that_does_not_load_costs_its_paper_alone(monkeypatch, command):
    """Fails when a command about all papers stops at the one whose code is broken, or passes over it in silence."""
    import importlib

    part = {"conform": "conformance"}.get(command, command)
    two = IMPLEMENTED[:2]
    monkeypatch.setattr("regularized.cli.selection.entries", lambda slug: two)
    load = importlib.import_module

    def break_one(name: str, *arguments: object):
        if name == two[0].module_name(part):
            raise SyntaxError("half a file")
        return load(name, *arguments)

    monkeypatch.setattr(importlib, "import_module", break_one)
    monkeypatch.setattr("regularized.evidence.bench.bench", lambda *a, **k: [])
    monkeypatch.setattr("regularized.evidence.contract.run", lambda name, *a, **k: [Outcome(name, "s", "c", "passed")])
    result = call(command, "--json")
    assert result.exit_code == 1
    assert f"{two[0].slug} is left out, its {part} does not load: SyntaxError: half a file" in result.stderr
    assert {row["slug"] for row in json.loads(result.stdout)} == ({two[1].slug} if command != "bench" else set())
    alone = call(command, two[0].slug)
    assert isinstance(alone.exception, SyntaxError), "of one paper it is a defect with its traceback"


def test_bench(monkeypatch):
    """Fails when a key that scripts rely on is missing, the card's floor is lost, or rows are saved unasked."""
    from regularized.evidence import bench, bench_rows
    from regularized.evidence.bench_rows import BenchRow

    asked: list[int] = []

    def measure(slug, module_name, *, floor, on_row, processes, **options):
        asked.append(processes)
        row = BenchRow(slug, "small", 1.0, 1.2, 1.2, (1.1, 1.3), floor, None, 10, processes=processes)
        on_row(row)
        return [row]

    monkeypatch.setattr(bench, "bench", measure)
    row = as_json("bench", PAPER.slug)[0]
    keys = {"slug", "size", "plain_ms", "method_ms", "ratio", "ratio_interval", "floor", "peak_memory_ratio"}
    assert keys <= set(row)
    assert row["floor"] == PAPER.card.implementation.floor
    saved: list[str] = []
    monkeypatch.setattr(bench_rows, "save", lambda rows, module: saved.append(module))
    before = BenchRow(PAPER.slug, "small", 1.0, 2.0, 2.0, (1.95, 2.05), None, None, 10, processes=5)
    was = {"measured": "2026-01-02", "environment": {"cpu": "x"}, "rows": [before]}
    monkeypatch.setattr(bench_rows, "load", lambda path: was)
    shown = call("bench", PAPER.slug)
    assert "1.2\t1.1\t1.3" in shown.stdout
    assert f"{PAPER.slug}: small: 1.200 today, 1.950 to 2.050 in 5 processes on 2026-01-02 (x)" in shown.stderr
    assert not saved
    assert call("bench", PAPER.slug, "--save").exit_code == 0
    assert saved == [PAPER.module_name("bench")]
    assert asked == [1, 1, 5], "what is saved comes from several fresh processes"


# -- the process --------------------------------------------------------------------------------


def run(*arguments: str, python: Sequence[str] = ("-m", "regularized.cli")) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *python, *arguments], capture_output=True, text=True)


def seconds(*arguments: str, python: Sequence[str] = ("-m", "regularized.cli")) -> float:
    """Processor time of a command, not wall time: what else the machine is doing must not decide."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert run(*arguments, python=python).returncode == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_help_is_fast_and_tells_the_exit_codes():
    """Fails when a command imports at the top what it needs when it runs."""
    empty = "import typer\napp = typer.Typer()\n@app.command()\ndef command(): ...\napp(['--help'])"
    ours, least = (min(times) for times in zip(*((seconds("--help"), seconds(empty, python=["-c"])) for _ in range(3))))
    assert ours < 2 * least
    told = run("--help").stdout
    for line in ("0: done", "1: a run failed", "2: the command was called", "3: there is no such", "4: not available"):
        assert line in told


LISTING = [["papers", "--json"], ["papers", "--search", "labels"], ["show", PAPER.slug], ["show", PAPER.slug, "--json"]]


def heavy_modules(*commands: Sequence[str]) -> list[set[str]]:
    """What takes long to import and is loaded after each command of one process."""
    code = (
        "import sys\nfrom regularized.cli.app import app\n"
        "heavy = {'torch', 'sklearn', 'matplotlib', 'accelerate', 'scipy'}\n"
        f"for arguments in {[list(command) for command in commands]!r}:\n"
        "    try: app(arguments, prog_name='regularized')\n"
        "    except SystemExit as done: assert not done.code\n"
        "    print('loaded', *(heavy & set(sys.modules)), file=sys.stderr)"
    )
    result = run(code, python=["-c"])
    assert result.returncode == 0, result.stderr
    loaded = [set(line.split()[1:]) for line in result.stderr.splitlines() if line.startswith("loaded")]
    assert len(loaded) == len(commands)
    return loaded


def test_listing_loads_no_torch_and_is_computed_once(home):
    """Fails when listing or showing papers, or reading help, loads torch, even where nothing is known yet.

    Or when every listing parses all code and judges all claims anew, which is most of its time.
    """
    assert heavy_modules(["--version"], ["--help"], ["show", PAPER.slug, "--help"]) == [set()] * 3
    assert set().union(*heavy_modules(*LISTING)) <= {"scipy"}  # which judges claims
    (kept,) = (home / "cache").iterdir()
    known = kept.read_bytes()
    assert heavy_modules(*LISTING) == [set()] * len(LISTING)
    assert kept.read_bytes() == known
    assert {f"{entry.slug} missing" for entry in ENTRIES} <= set(json.loads(json.loads(known)["known"]))


def test_papers_are_listed_from_a_read_only_disk(home, read_only):
    """Fails when a cache that cannot be written stops a listing, or is told about in every one."""
    home.mkdir()
    result = read_only(home, [sys.executable, "-m", "regularized.cli", "show", PAPER.slug])
    assert (result.returncode, result.stderr) == (0, "")
    assert not list(home.iterdir())


def test_usage_errors():
    """Fails when a wrong option or command does not exit with 2."""
    assert call("papers", "--nonsense").exit_code == 2
    assert call("nonsense").exit_code == 2
    assert call("reproduce").exit_code == 2
    assert call("reproduce", PAPER.slug, "--seeds", "0").exit_code == 2
    assert "after the command" in call("--json", "papers").stderr


@pytest.mark.usefixtures("known")
@pytest.mark.parametrize(
    "arguments", ["papers", "papers --json", "--help", "--version", f"cite {PAPER.slug}", f"show {PAPER.slug}"]
)
def test_output_that_cannot_be_written(arguments):
    """Fails when a full disk ends in a traceback, passes for success, or is told twice."""
    command = f"{sys.executable} -m regularized.cli {arguments} > /dev/full"
    result = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr == "error: cannot write to standard output: No space left on device\n"


@pytest.mark.usefixtures("known")
def test_streams_that_are_closed(tmp_path):
    """Fails when a closed stream ends in a traceback, or lends its number to a file that is then written over."""
    command = f"{sys.executable} -m regularized.cli cite {PAPER.slug}"
    closed = subprocess.run(f"{command} >&-", shell=True, capture_output=True, text=True)
    assert closed.returncode == 1
    assert closed.stderr == "error: standard output is closed; send it to /dev/null where it is not wanted\n"
    for streams in ("2>&-", "<&- 2>&-"):
        silent = subprocess.run(f"{command} {streams}", shell=True, capture_output=True, text=True)
        assert (silent.returncode, silent.stdout) == (0, call("cite", PAPER.slug).stdout)


@pytest.mark.usefixtures("known")
def test_text_that_the_terminal_does_not_know(tmp_path):
    """Fails when a character beyond the encoding of the output, or half a surrogate pair, costs the whole result."""
    command = [sys.executable, "-m", "regularized.cli", "papers"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    table = subprocess.run(command, capture_output=True, env=environment, check=True)
    assert len(table.stdout.splitlines()) == len(ENTRIES) + 1
    listed = subprocess.run([*command, "--json"], capture_output=True, env=environment, check=True)
    assert [row["title"] for row in json.loads(listed.stdout)] == [entry.card.title for entry in ENTRIES]


def test_signs_that_the_terminal_does_not_have():
    """Fails when a Greek letter becomes an escape that nobody reads, or a sign of mathematics a question mark."""
    buffer = io.BytesIO()
    out = Output(io.TextIOWrapper(buffer, encoding="ascii"))
    print("λ‖W‖² ≥ 0, Δβ − Müller ─│ 🤷", file=out, flush=True)
    assert buffer.getvalue() == b"lambda||W||^2 >= 0, Deltabeta - Muller -| \\U0001f937\n"


def test_json_of_half_a_surrogate_pair(capsys):
    """Fails when one odd file name in an error message costs the whole result."""
    emit_json({"error": "no file \udc80"})
    assert json.loads(capsys.readouterr().out) == {"error": "no file \udc80"}


@pytest.mark.usefixtures("known")
def test_closed_pipe():
    """Fails when `regularized papers | head -1` ends in a traceback."""
    command = f"{sys.executable} -m regularized.cli papers --json | head -c 10"
    result = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert "Traceback" not in result.stderr
    assert "Exception ignored" not in result.stderr


def test_real_smoke_run(home, warm_workers):
    """Fails when command, runner, store and report do not fit together; the second call makes no run again."""
    first = as_json("reproduce", PAPER.slug, "--scale", "smoke", "--seeds", "2")
    assert all(claim["verdict"] in ("open", "not run") for claim in first["claims"])
    assert str(home) in first["report"]
    again = as_json("reproduce", PAPER.slug, "--scale", "smoke", "--seeds", "2")
    assert again["arms"] == first["arms"]
    assert again["reused"] == sum(1 for _ in again["arms"]) * 2
