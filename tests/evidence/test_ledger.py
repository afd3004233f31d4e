import importlib
import json
import math
from dataclasses import replace

import pytest

from regularized.evidence import ledger
from regularized.evidence.claims import Verdict
from regularized.evidence.experiment import Seeds
from regularized.evidence.ledger import LedgerError
from regularized.evidence.provenance import code_key, versions
from regularized.evidence.store import Store

NAME = "fake_experiment"


@pytest.fixture
def runs(fake, make_runs):
    """Committed laptop runs of the fake experiment's present code."""
    return lambda seeds=10, **changes: make_runs(seeds, code_key=code_key(NAME), versions=versions(), **changes)


@pytest.fixture
def trials(runs, make_settings):
    one = runs(1)[0]
    return [
        replace(
            one,
            arm=arm,
            seed=seed,
            overrides={"rate": rate},
            settings=make_settings(arm, rate=rate),
            metrics={"validation": -((rate - best) ** 2)},
        )
        for arm, best, grid in (("plain", 0.1, (0.1, 0.3)), ("better", 0.2, (0.1, 0.2)))
        for rate in grid
        for seed in (1000, 1001)
    ]


@pytest.fixture
def exported(home, tmp_path):
    """Stores runs and exports them."""

    def export(rows, claims=()):
        with Store() as store:
            for run in rows:
                store.add(run)
        return ledger.export("paper", NAME, claims, destination=tmp_path / "ledger.json")

    return export


def test_what_was_exported_gives_the_same_verdict(runs, trials, exported, claim):
    """Fails when the shipped evidence says other than the runs did."""
    loaded = ledger.load(exported(runs() + trials))
    assert loaded.seeds == tuple(range(10))
    assert loaded.settings["better"] == {"name": "better", "rate": 0.2, "best_rate": 0.2, "gain": 5.0, "points": 8}
    assert loaded.about["plain"]["data"] == "fake numbers"
    assert loaded.about["plain"]["toy"], "a thousand numbers where the paper has a million"
    assert loaded.arms == ("plain", "better", "control")
    (outcome,) = loaded.outcomes([claim])
    assert outcome.verdict is Verdict.HOLDS
    assert outcome.effect == pytest.approx(5.0)
    assert [run.metrics for run in loaded.runs] == [run.metrics for run in runs()]
    assert not loaded.is_stale(code_key(NAME))
    assert loaded.is_stale("other")
    result = loaded.to_result([claim], module_name=NAME)
    assert result.tuning.best == {"plain": {"rate": 0.1}, "better": {"rate": 0.2}}
    assert result.tuning.agrees == {"plain": True, "better": True}
    assert result.values("plain", "accuracy")[0] == 70.0


def test_the_file_is_stable_and_reads_as_a_diff(runs, trials, exported):
    """Fails when the order of finishing, or the time of the export, changes the file: every diff would be noise."""
    first = exported(runs() + trials).read_text()
    second = exported(list(reversed(runs() + trials))).read_text()
    assert first == second


def test_curves_are_thinned_but_keep_both_ends(runs, trials, exported):
    """Fails when 44 ledgers blow up the wheel, or the end of training is cut off."""
    (curve, *_) = [run.curves["accuracy"] for run in ledger.load(exported(runs() + trials)).runs]
    assert len(curve) <= 51
    assert (curve[0][0], curve[-1][0]) == (0.0, 119.0)


def test_a_diverged_metric_stays_diverged(runs, trials, exported, claim):
    """Fails when NaN makes the file invalid JSON or comes back as nothing."""
    rows = [
        replace(run, metrics={"accuracy": math.nan}) if (run.arm, run.seed) == ("better", 1) else run for run in runs()
    ]
    file = exported(rows + trials)
    json.loads(file.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    (outcome,) = ledger.load(file).outcomes([claim])
    assert outcome.verdict is Verdict.OPEN
    assert "nan" in outcome.problem


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda run: run.seed != 9, r"seeds by arm: \{'plain': \[9\], 'better': \[9\], 'control': \[9\]\}"),
        (lambda run: (run.arm, run.seed) != ("better", 2), r"\{'better': \[2\]\}"),
    ],
)
def test_the_declared_seeds_without_a_gap_or_nothing(runs, trials, exported, spoil, says):
    """Fails when seeds can be chosen by leaving some out."""
    with pytest.raises(LedgerError, match=says):
        exported([run for run in runs() if spoil(run)] + trials)


@pytest.mark.parametrize(
    "change", [{"dirty": True}, {"code_key": "older"}, {"versions": {"torch": "1"}}, {"settings": {"points": 3}}]
)
def test_only_committed_present_runs_with_these_settings_count(fake, exported, trials, change, make_runs):
    """Fails when uncommitted, outdated or smoke runs are shipped as evidence."""
    rows = make_runs(**({"code_key": code_key(NAME), "versions": versions()} | change))
    with pytest.raises(LedgerError, match="lacks runs") as caught:
        exported(rows + trials)
    assert ("commit first" in str(caught.value)) == ("dirty" in change)


def test_tuning_must_be_complete(runs, trials, exported):
    """Fails when an arm could be tuned on fewer trials than another."""
    with pytest.raises(LedgerError, match=r"lacks 1 of 8 tuning runs.*'better' with \{'rate': 0\.2\}, seed 1001"):
        exported(runs() + trials[:-1])


def test_a_refused_export_leaves_the_old_file(runs, trials, exported, tmp_path):
    """Fails when evidence is lost by an export that cannot be made."""
    file = tmp_path / "ledger.json"
    file.write_text("old")
    with pytest.raises(LedgerError):
        exported(runs(3) + trials)
    assert file.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir() if "part" in p.name] == []


def test_no_file_is_no_evidence_and_a_damaged_one_is_an_error(tmp_path, runs, trials, exported):
    """Fails when a broken ledger looks like a paper without evidence, or breaks with a bare KeyError."""
    assert ledger.load(tmp_path / "none.json") is None
    text = exported(runs() + trials).read_text()
    bad = tmp_path / "bad.json"
    for content in (
        text[: len(text) // 2],
        "[]",
        text.replace('"seed":', '"sead":'),
        text.replace('"arms": [', '"arm": ['),
    ):
        bad.write_text(content)
        with pytest.raises(LedgerError, match=r"bad\.json is damaged"):
            ledger.load(bad)
    bad.write_text(text.replace('"format": 2', '"format": 9'))
    with pytest.raises(LedgerError, match="format 9"):
        ledger.load(bad)


def test_it_lies_beside_the_experiment(fake):
    """Fails when a ledger is looked for where it is not shipped."""
    assert ledger.path(NAME).name == "ledger.json"
    assert ledger.path(NAME).with_name("fake_experiment.py").exists()


# -- nothing is changed after a look ---------------------------------------------------------------


def seen(file, **changes):
    """The ledger as somebody saw it, before what is exported next."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def declare(monkeypatch, **changes):
    module = importlib.import_module(NAME)
    for name, value in changes.items():
        monkeypatch.setattr(module, name, value, raising=False)


def test_seeds_cannot_be_added_after_a_look(runs, trials, exported, claim, monkeypatch, tmp_path):
    """Fails when ten seeds become twelve because ten did not decide."""
    file = exported(runs(12) + trials, [claim])
    declare(monkeypatch, SEEDS=Seeds(12))
    with pytest.raises(LedgerError, match=r"the number of seeds \(10, now 12\) changed after results .* first=100"):
        exported([], [claim])
    assert len(ledger.load(file).seeds) == 10
    # The rule itself asks for ten where an older ledger has five: no choice, so no look.
    declare(monkeypatch, SEEDS=Seeds())
    seen(file, seeds=[0, 1, 2, 3, 4])
    assert len(ledger.load(exported([], [claim])).seeds) == 10


def test_fewer_than_ten_are_no_evidence(runs, trials, exported, monkeypatch):
    """Fails when a ledger of five seeds can be written."""
    declare(monkeypatch, SEEDS=Seeds(5))
    with pytest.raises(LedgerError, match="declares 5 seeds; a verdict needs at least 10"):
        exported(runs() + trials)


def test_a_threshold_changed_after_a_look_needs_fresh_seeds(runs, trials, exported, claim, monkeypatch):
    """Fails when the smallest effect can follow the result."""
    exported(runs() + trials, [claim])
    lower = replace(claim, smallest_effect=1.0)
    with pytest.raises(LedgerError, match=r"claim 'end' changed after results of seeds \[0, 1, .* fresh block"):
        exported([], [lower])
    declare(monkeypatch, SEEDS=Seeds(first=100, why="the threshold was moved"))
    again = [replace(run, seed=run.seed + 100) for run in runs()]
    loaded = ledger.load(exported(again, [lower]))
    assert loaded.seeds == tuple(range(100, 110))
    assert loaded.why_seeds == "the threshold was moved"
    # A new claim fixes its threshold before its own first look.
    exported([], [lower, replace(claim, id="another")])


def test_settings_or_code_changed_after_a_look_need_fresh_seeds(runs, trials, exported, claim, make_settings):
    """Fails when an arm can be improved until its claim holds on the same seeds."""
    file = exported(runs() + trials, [claim])
    before = json.loads(file.read_text())
    seen(file, settings=before["settings"] | {"better": make_settings("better", rate=0.7)})
    with pytest.raises(LedgerError, match="settings of arm 'better' changed"):
        exported([], [claim])
    # An arm that no claim speaks of may change.
    seen(file, settings=before["settings"] | {"control": make_settings("control", rate=0.7)})
    exported([], [claim])
    seen(file, code_key="older")
    with pytest.raises(LedgerError, match="the code changed"):
        exported([], [claim])
