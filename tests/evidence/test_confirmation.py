"""A refactor proves that it is one; the fake experiment's ledger is written, its code changed, and confirmed."""

import importlib
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from regularized.evidence import confirmation, ledger, provenance, runner
from regularized.evidence.claims import Verdict
from regularized.evidence.confirmation import confirm, difference
from regularized.evidence.experiment import resolve
from regularized.evidence.ledger import LedgerError
from regularized.evidence.provenance import CheckoutState
from regularized.evidence.recording import record
from regularized.evidence.store import Store

NAME = "confirmed_experiment"

pytestmark = pytest.mark.usefixtures("warm_workers")
HERE = Path(__file__).parent


@pytest.fixture
def write(home, tmp_path, monkeypatch):
    """Writes the experiment with replacements."""
    text = (HERE / "fake_experiment.py").read_text()
    monkeypatch.syspath_prepend(str(tmp_path))
    for module in (provenance, runner):
        monkeypatch.setattr(module, "checkout_state", lambda files: CheckoutState("c", False))
    # The workers see that this experiment lies in no checkout; here it counts as committed.
    add = Store.add
    monkeypatch.setattr(Store, "add", lambda store, run: add(store, replace(run, dirty=False)))

    def call(**replacements):
        changed = text
        for old, new in replacements.items():
            assert old in changed
            changed = changed.replace(old, new)
        (tmp_path / f"{NAME}.py").write_text(changed)
        sys.modules.pop(NAME, None)
        importlib.invalidate_caches()

    return call


@pytest.fixture
def ship(write, claim, make_runs):
    """Ships a ledger of some code, made here by calling it: workers would take seconds for each test."""

    def call(**replacements):
        write(**replacements)
        return _ledger_of_the_code(claim, make_runs)

    return call


@pytest.fixture
def shipped(ship):
    """A ledger of the first code."""
    return ship()


def _ledger_of_the_code(claim, make_runs):
    experiment = importlib.import_module(NAME)
    wanted = [(arm, seed, "laptop", {}) for arm in experiment.ARMS for seed in range(10)]
    wanted += [
        (arm, seed, "laptop", tried)
        for arm, grid in experiment.TUNING.grids.items()
        for tried in grid
        for seed in experiment.TUNING.seeds
    ]
    with Store() as store:
        for arm, seed, scale, tried in wanted:
            settings = resolve(experiment, arm, scale, tried)
            measured = experiment.run(settings, seed)
            store.add(
                replace(
                    make_runs(1)[0],
                    arm=arm,
                    seed=seed,
                    overrides=tried,
                    settings=settings,
                    code_key=provenance.code_key(NAME),
                    versions=provenance.versions(),
                    metrics=measured.metrics,
                    curves=measured.curves,
                    data=measured.data,
                    environment=provenance.environment(NAME),
                )
            )
    return ledger.export("paper", NAME, [claim])


REFACTORED = {"20.0 / (x + 1)": "20.0 / (1 + x)"}


def test_equal_to_the_last_bit_takes_the_other_runs_over(shipped, write, claim):
    """Fails when a refactor costs a re-measurement, or leaves no trace in the ledger."""
    before = ledger.load(shipped)
    write(**REFACTORED)
    after = ledger.load(record("paper", NAME, [claim], confirmed=True, workers=1))
    assert after.code_key != before.code_key
    assert [run.metrics for run in after.runs] == [run.metrics for run in before.runs]
    (record_of,) = after.confirmations
    assert record_of["seed"] == 0
    assert record_of["from"] == before.code_key
    assert record_of["to"] == after.code_key
    assert record_of["arms"] == ["plain", "better", "control"]
    remade = [run for run in after.runs if not run.environment.get(ledger.CONFIRMED)]
    assert {(run.arm, run.seed) for run in remade} == {("plain", 0), ("better", 0), ("control", 0)}
    assert after.outcomes([claim])[0].verdict is Verdict.HOLDS
    # The next confirmation repeats another seed.
    write(**REFACTORED, **{"2.0 / (x + 1)": "2.0 / (1 + x)"})
    assert confirm("paper", NAME, workers=1, progress=False).seed == 1


FRESH = {
    "import About, Measurements, Tuning": "import About, Measurements, Seeds, Tuning",
    "TUNING = ": 'SEEDS = Seeds(10, first=100, why="Ten left it open.")\nTUNING = ',
}


def test_a_fresh_block_costs_its_own_runs_on_any_machine(shipped, write, claim, tmp_path, monkeypatch):
    """Fails when a store that lacks the ledger's trials makes them again, or trials of other code are kept."""
    before = ledger.load(shipped)
    monkeypatch.setenv("REGULARIZED_HOME", str(tmp_path / "another"))
    write(**FRESH)
    after = ledger.load(record("paper", NAME, [claim], workers=1))
    assert after.code_key == before.code_key
    assert [run.created for run in after.tuning] == [run.created for run in before.tuning]
    assert {run.seed for run in after.runs} == set(range(100, 110))
    # A store with the same trial from a machine that rounds otherwise: of trials of two machines none is the best.
    monkeypatch.setenv("REGULARIZED_HOME", str(tmp_path / "rounding"))
    trial = before.tuning[0]
    with Store() as store:
        store.add(replace(trial, metrics={name: value + 1e-12 for name, value in trial.metrics.items()}))
    again = ledger.load(record("paper", NAME, [claim], workers=1))
    assert [run.metrics for run in again.tuning] == [run.metrics for run in before.tuning]
    monkeypatch.setenv("REGULARIZED_HOME", str(tmp_path / "a third"))
    write(**FRESH, **{"end = 70.0": "end = 1.0 + 70.0", "first=100": "first=200"})
    assert not {run.created for run in ledger.load(record("paper", NAME, [claim], workers=1)).tuning} & {
        run.created for run in before.tuning
    }


def test_any_difference_takes_nothing_over(shipped, write, claim):
    """Fails when runs of other code pass because they are close."""
    write(**{"end = 70.0": "end = 1e-13 + 70.0"})
    with pytest.raises(LedgerError, match=r"came out otherwise than in the ledger \(plain: accuracy was"):
        record("paper", NAME, [claim], confirmed=True, workers=1)
    with Store() as store:
        assert len(store.find("paper", code_key=provenance.code_key(NAME))) == 3
    # And the same seeds cannot be used again for the changed code.
    with pytest.raises(LedgerError, match="the code changed after results of seeds"):
        record("paper", NAME, [claim], workers=1)


ROUNDING = {"end = 70.0": "end = float(__import__('os').environ.get('ROUNDS', 0)) + 70.0"}


@pytest.fixture
def other_machine(ship, tmp_path, monkeypatch):
    """A ledger of a machine that rounds otherwise, and a checkout of its code."""
    ship(**ROUNDING)
    package = tmp_path / "former" / "src" / "regularized"
    package.parent.mkdir(parents=True)
    package.symlink_to(Path(confirmation.__file__).parents[1])
    shutil.copy(tmp_path / f"{NAME}.py", package.parent)
    monkeypatch.setenv("ROUNDS", "1e-13")
    return tmp_path / "former"


def test_where_the_machine_rounds_otherwise_the_two_codes_are_compared(other_machine, write, claim):
    """Fails when another processor costs a refactor all its runs."""
    write(**ROUNDING, **REFACTORED)
    with pytest.raises(LedgerError, match="came out otherwise than in the ledger"):
        record("paper", NAME, [claim], confirmed=True, workers=1)
    after = ledger.load(record("paper", NAME, [claim], confirmed=True, workers=1, beside=other_machine))
    assert after.confirmations[0]["beside"] == ["better", "control", "plain"]
    assert {run.code_key for run in after.runs} == {provenance.code_key(NAME)}


def test_other_results_are_no_rounding(other_machine, write):
    """Fails when the machine excuses a change of what is computed, or the checkout is of any code."""
    write(**ROUNDING, **{"20.0 / (x + 1)": "20.1 / (x + 1)"})
    found = confirm("paper", NAME, workers=1, progress=False, beside=other_machine)
    assert all(what.startswith("beside the former code, the curve accuracy") for what in found.differing.values())
    assert set(found.differing) == {"plain", "better", "control"}
    former = other_machine / "src" / f"{NAME}.py"
    former.write_text(former.read_text().replace("70.0", "71.0"))
    with pytest.raises(LedgerError, match="does not hold the code of the ledger"):
        confirm("paper", NAME, workers=1, progress=False, beside=other_machine)


def test_every_kind_of_difference_is_seen(make_runs):
    """Fails when curves, data, a new metric or the sign of zero are not compared; NaN equals NaN."""
    run = make_runs(1)[0]
    diverged = replace(run, metrics={"accuracy": math.nan, "validation": 0.0})
    assert difference(run, run, frozenset()) == ""
    assert difference(diverged, diverged, frozenset()) == ""
    for other, says in (
        (replace(run, data="another"), "other data"),
        (replace(run, metrics={**run.metrics, "more": 1.0}), "more was None"),
        (replace(diverged, metrics={"accuracy": math.nan, "validation": -0.0}), "validation was"),
        (replace(run, curves={"accuracy": [(x, y + 1.0) for x, y in run.curves["accuracy"]]}), "the curve accuracy"),
        (replace(run, curves={}), "the curve accuracy"),
    ):
        before = diverged if says.startswith("validation") else run
        assert says in difference(before, other, frozenset())
    slower = replace(run, metrics={**run.metrics, "seconds": 2.0})
    assert difference(replace(run, metrics={**run.metrics, "seconds": 1.0}), slower, {"seconds"}) == ""


def test_a_changed_arm_is_made_and_the_rest_taken_over(shipped, write, claim):
    """Fails when an arm with other settings inherits runs, or costs the others theirs."""
    new = {'"control": {"name": "control"}': '"control": {"name": "control", "gain": 1.0}'}
    write(**REFACTORED, **new)
    found = confirm("paper", NAME, workers=1, progress=False)
    assert found.arms == ("plain", "better")
    assert found.left_out == ("control",)
    after = ledger.load(record("paper", NAME, [claim], workers=1))
    controls = [run for run in after.runs if run.arm == "control"]
    assert not any(run.environment.get(ledger.CONFIRMED) for run in controls)
    assert after.settings["control"]["gain"] == 1.0


def test_a_new_setting_is_code(shipped, write, claim):
    """Fails when a default that is added costs every run, or the taken over runs lack it."""
    write(**REFACTORED, **{"DEFAULTS = {": 'DEFAULTS = {"device": "cpu", '})
    after = ledger.load(record("paper", NAME, [claim], confirmed=True, workers=1))
    assert len(after.confirmations) == 1
    assert after.settings["better"]["device"] == "cpu"


def test_other_versions_machines_or_no_ledger_are_refused(shipped, write, monkeypatch, tmp_path):
    """Fails when bits are compared that may differ for another reason, or nothing is compared with nothing."""
    with pytest.raises(LedgerError, match="nothing to confirm"):
        confirm("paper", NAME)
    write(**REFACTORED)
    text = shipped.read_text()
    shipped.write_text(text.replace('"cpu": "', '"cpu": "Other '))
    with pytest.raises(LedgerError, match=r"another kind of machine \(cpu Other"):
        confirm("paper", NAME)
    shipped.write_text(text.replace('"torch": "', '"torch": "9'))
    with pytest.raises(LedgerError, match="other versions round differently"):
        confirm("paper", NAME)
    shipped.unlink()
    with pytest.raises(LedgerError, match="has no ledger that could be confirmed"):
        confirm("paper", NAME)


def test_undeclared_differences_are_refused_before_anything_runs(write, claim):
    """Fails when a control that differs in one undeclared setting is measured."""
    write()
    with pytest.raises(LedgerError, match=r"arms of claim 'end' differ in \['gain'\], which its differs does not name"):
        record("paper", NAME, [replace(claim, differs=("name", "rate", "best_rate"))], workers=1)
    with Store() as store:
        assert store.find("paper") == []
