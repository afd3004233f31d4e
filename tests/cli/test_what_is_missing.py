"""What is not here (a checkout, a package, a place to write) is told before the first run, with exit code 4."""

import ast
import importlib
import inspect
import json
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from regularized.cli.app import app
from regularized.evidence import bench as bench_module
from regularized.evidence import contract, provenance
from regularized.evidence import runner as evidence_runner
from regularized.evidence.bench_rows import BenchRow
from regularized.evidence.experiment import Unavailable
from regularized.papers.catalogue import load_catalogue

IMPLEMENTED = [entry for entry in load_catalogue() if entry.implemented]
SLUG = IMPLEMENTED[0].slug
ON_PEFT = next(entry.slug for entry in IMPLEMENTED if "peft" in getattr(entry.experiment(), "PACKAGES", {}))


def call(*arguments: str):
    return CliRunner().invoke(app, arguments, prog_name="regularized")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("REGULARIZED_HOME", str(tmp_path / "home"))


@pytest.fixture
def measured(monkeypatch):
    """Nothing is measured; what would be is noted."""
    asked: list[str] = []
    monkeypatch.setattr(evidence_runner, "reproduce", lambda slug, *a, **k: asked.append(slug))
    monkeypatch.setattr(bench_module, "bench", lambda slug, *a, **k: asked.append(slug) or [])
    monkeypatch.setattr(contract, "run", lambda slug, *a, **k: asked.append(slug) or [])
    return asked


@pytest.mark.parametrize(
    "command", [["ledger", SLUG], ["bench", SLUG, "--save"], ["contract", SLUG, "--save"], ["rates", "--save"]]
)
def test_an_installed_package_is_not_written_into(monkeypatch, measured, command):
    """Fails when files in site-packages are overwritten, with numbers of which no commit knows the code."""
    monkeypatch.setattr(provenance, "_PACKAGE", provenance._PACKAGE.parents[2] / "site-packages" / "regularized")
    result = call(*command)
    assert (result.exit_code, result.stdout) == (4, "")
    assert "In a clone, after `pip install -e .`" in result.stderr
    assert not measured, "it was measured first, for nothing"


def test_bench_keeps_what_it_has_when_a_package_is_missing(monkeypatch):
    """Fails when the paper that lacks a package takes the rows of the others with it, or exits as if it had failed."""
    row = BenchRow("one", "small", 1.0, 1.2, 1.2, (1.1, 1.3), 1.0, None, 10)

    def measure(slug, module_name, *, on_row, **options):
        on_row(row)
        if slug == IMPLEMENTED[1].slug:
            raise Unavailable('needs peft: pip install "regularized[peft]"')
        return [row]

    monkeypatch.setattr("regularized.cli.selection.entries", lambda slug: IMPLEMENTED[:3])
    monkeypatch.setattr(bench_module, "bench", measure)
    result = call("bench", "--json")
    assert result.exit_code == 4
    assert len(json.loads(result.stdout)) == 3
    assert f'{IMPLEMENTED[1].slug} is left out: needs peft: pip install "regularized[peft]"' in result.stderr


def test_bench_looks_for_packages_before_the_first_paper_is_timed(monkeypatch, measured):
    """Fails when an hour of timing ends at a module that could have been seen not to load."""
    two = IMPLEMENTED[:2]
    load = importlib.import_module
    order: list[str] = []

    def lacking(name: str, *arguments: object):
        if name.endswith(".bench"):
            order.append(f"load {len(measured)}")
        if name == two[1].module_name("bench"):
            raise ImportError('needs peft: pip install "regularized[peft]"')
        return load(name, *arguments)

    monkeypatch.setattr(importlib, "import_module", lacking)
    monkeypatch.setattr("regularized.cli.selection.entries", lambda slug: two)
    assert call("bench", "--json").exit_code == 4
    assert order == ["load 0", "load 0"]
    assert measured == [two[0].slug]


def test_a_workload_that_lacks_a_package_says_so_from_its_process():
    """Fails when a package that a fresh process misses ends in its traceback instead of a line with the remedy."""
    sent: list[object] = []
    pipe = SimpleNamespace(send=sent.append, close=lambda: None)

    def lacking() -> None:
        raise ModuleNotFoundError("No module named 'peft'", name="peft")

    bench_module._answer(pipe, lacking)
    assert isinstance(sent[0], Unavailable)


@pytest.mark.parametrize("command", ["reproduce", "tune"])
def test_packages_are_looked_for_before_the_first_run(monkeypatch, command):
    """Fails when eight arms are trained before the ninth finds out that PEFT is not installed, and exits with 1."""
    monkeypatch.setattr(evidence_runner, "find_spec", lambda package: None)
    monkeypatch.setattr(evidence_runner, "_run_matrix", lambda *a, **k: pytest.fail("a run was made first"))
    result = call(command, ON_PEFT)
    assert (result.exit_code, result.stdout) == (4, "")
    assert 'needs peft: pip install "regularized[peft]"' in result.stderr


@pytest.mark.parametrize("entry", IMPLEMENTED, ids=lambda entry: entry.slug)
def test_an_experiment_on_peft_declares_it(entry):
    """Fails when a run imports PEFT and its experiment does not say so, so that nobody looks for it beforehand."""
    reached = provenance._reach(entry.module_name("experiment"))
    # A module that serves one scale looks for it itself, at the beginning of a run.
    looking = {name for name in reached if 'need_package("peft"' in inspect.getsource(importlib.import_module(name))}
    imports = (
        imported
        for name, parts in reached.items()
        if name not in looking
        for imported in _imported(provenance._source(name), parts)
    )
    optional = {"peft"} & {name.partition(".")[0] for name in imports}
    assert optional <= set(getattr(entry.experiment(), "PACKAGES", {}))


def _imported(source, parts):
    for position in source.positions(parts):
        for node in ast.walk(source.statements[position]):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                yield node.module
