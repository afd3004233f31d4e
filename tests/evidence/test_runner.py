import importlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from regularized.evidence import runner, worker_process
from regularized.evidence.claims import Verdict
from regularized.evidence.experiment import Unavailable
from regularized.evidence.provenance import CheckoutState
from regularized.evidence.runner import reproduce, tune
from regularized.evidence.store import Store
from regularized.evidence.worker_process import WorkerProcess

HERE = Path(__file__).parent

pytestmark = pytest.mark.usefixtures("warm_workers")


@pytest.fixture
def run(fake, claim):
    """Calls reproduce on the fake experiment, in one process and quietly."""

    def call(*claims, **arguments):
        return reproduce("paper", fake, claims or [claim], **({"workers": 1, "progress": False} | arguments))

    return call


def test_runs_all_arms_and_seeds_and_a_second_call_reuses_them(run, cold_workers, monkeypatch, capfd):
    """Fails when a verdict is computed from wrong pairs, or finished runs are made twice, or output soils stdout."""
    first = run(seeds=5, workers=2, progress=True)
    assert first.outcomes[0].verdict is Verdict.OPEN, "five of ten declared seeds are a look"
    assert "5 of the 10 declared seeds" in first.outcomes[0].problem
    assert 4.0 < first.outcomes[0].effect < 6.0
    assert {(r.arm, r.seed) for r in first.runs} == {(a, s) for a in ("plain", "better", "control") for s in range(5)}
    assert first.reused == 0
    assert all(r.environment["threads"] == 1 and r.peak_memory > 2**20 and r.data for r in first.runs)
    shown = capfd.readouterr()
    assert shown.out == "", "standard output belongs to --json"
    assert "[15/15]" in shown.err
    monkeypatch.setattr(worker_process, "PROGRAM", HERE / "warm_worker.py")
    again = run()
    assert again.outcomes[0].verdict is Verdict.HOLDS
    assert again.reused == 15
    assert len(again.runs) == 30
    assert again.runs[:15] == first.runs
    # Another process, another order: the same numbers.
    fresh = run(seeds=5, fresh=True)
    assert fresh.reused == 0
    assert [r.metrics for r in fresh.runs] == [r.metrics for r in first.runs]


def test_some_arms(run, claim):
    """Fails when other arms are run, the order is the asker's, or fewer arms make a claim easier to hold."""
    other = replace(claim, id="other", baseline="control")
    some = run(claim, other, arms=["better", "plain"])
    assert some.arms == ("plain", "better")
    assert {r.arm for r in some.runs} == {"plain", "better"}
    assert [outcome.claim.id for outcome in some.outcomes] == [claim.id]
    alone, both = run(claim, arms=["plain", "better"]).outcomes[0], some.outcomes[0]
    assert both.p_value == pytest.approx(2 * alone.p_value), "the claim that is not shown counts in the correction"
    with pytest.raises(ValueError, match=r"has no arm 'betterr'; close names: \['better'\]"):
        run(arms=["betterr"])


def changing(tmp_path, monkeypatch):
    """Writes a copy of the fake experiment with replacements, and runs it; how many runs were reused."""
    text = (HERE / "fake_experiment.py").read_text()
    monkeypatch.syspath_prepend(str(tmp_path))

    def call(**replacements):
        changed = text
        for old, new in replacements.items():
            assert old in changed
            changed = changed.replace(old, new)
        (tmp_path / "changing_experiment.py").write_text(changed)
        sys.modules.pop("changing_experiment", None)
        importlib.invalidate_caches()
        result = reproduce("paper", "changing_experiment", [], scale="smoke", seeds=1, workers=1, progress=False)
        return result.reused, len(result.runs)

    return call


def test_changed_code_is_run_again(home, tmp_path, monkeypatch):
    """Fails when results of old code stand under new code."""
    call = changing(tmp_path, monkeypatch)
    assert call() == (0, 3)
    assert call() == (3, 3)
    assert call(**{"70.0": "71.0"}) == (0, 3)


def test_changing_or_adding_an_arm_runs_that_arm_alone(home, tmp_path, monkeypatch):
    """Fails when settings of one arm are part of another's key: half of all evidence time went there."""
    call = changing(tmp_path, monkeypatch)
    assert call() == (0, 3)
    assert call(**{'"rate": 0.2': '"rate": 0.3'}) == (2, 3)
    assert call(**{'    "control": {': '    "fourth": {"name": "fourth"},\n    "control": {'}) == (3, 4)
    # A scale's setting that no arm changes is every arm's.
    assert call(**{'"smoke": {"points": 3}': '"smoke": {"points": 4}'}) == (0, 3)


def test_arms_with_the_same_settings_share_their_runs(home, tmp_path, monkeypatch):
    """Fails when two names for one thing cost two runs."""
    call = changing(tmp_path, monkeypatch)
    assert call(**{'"control": {"name": "control"}': '"control": {}'}) == (0, 3)
    with Store() as store:
        assert [run.arm for run in store.find("paper")] == ["plain", "better"]


def test_two_processes_make_each_run_once(run, home, tmp_path):
    """Fails when two simultaneous comparisons make everything twice, or wait for each other for ever."""
    call = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from regularized.evidence import worker_process\n"
        "from regularized.evidence.runner import reproduce\n"
        "worker_process.PROGRAM = sys.argv[1] + '/warm_worker.py'\n"
        "made = reproduce('paper', 'fake_experiment', [], scale='smoke', seeds=2, workers=1, progress=False)\n"
        "print(len(made.runs))\n"
    )
    command = [sys.executable, "-c", call, str(HERE)]
    both = [subprocess.Popen(command, env=os.environ | {"FAKE_SLEEP": "0.5"}, stdout=-1, text=True) for _ in range(2)]
    assert [process.communicate(timeout=200)[0].strip() for process in both] == ["6", "6"]
    with Store() as store:
        assert len(store.find("paper")) == 6


def test_a_run_that_reads_a_table_of_settings_is_refused(home, tmp_path, monkeypatch):
    """Fails when a result depends on settings that its key does not hold."""
    call = changing(tmp_path, monkeypatch)
    with pytest.raises(ValueError, match=r"run\(\) of changing_experiment reads SCALES"):
        call(**{'points = settings["points"]': 'points = SCALES["smoke"]["points"]'})


def test_the_whole_settings_are_stored(run):
    """Fails when a default that an arm runs with is recorded nowhere."""
    result = run(scale="smoke", seeds=1)
    assert {r.arm: r.settings for r in result.runs} == {
        "plain": {"name": "plain", "rate": 0.1, "best_rate": 0.1, "gain": 0.0, "points": 3},
        "better": {"name": "better", "rate": 0.2, "best_rate": 0.2, "gain": 5.0, "points": 3},
        "control": {"name": "control", "rate": 0.1, "best_rate": 0.1, "gain": 0.0, "points": 3},
    }


def test_a_failing_and_a_dying_run_leave_the_rest_alone(run, monkeypatch):
    """Fails when one bad run stops the matrix, hides its traceback, or the surviving seeds get a verdict."""
    monkeypatch.setenv("FAKE_FAIL", "better/1")
    monkeypatch.setenv("FAKE_DIE", "control/3")
    result = run()
    by_run = {(failure.arm, failure.seed): failure for failure in result.failures}
    assert set(by_run) == {("better", 1), ("control", 3)}
    assert by_run["better", 1].error == "RuntimeError: the loss went to <heaven>"
    assert "fake_experiment.py" in by_run["better", 1].traceback
    assert "killed (signal 9)" in by_run["control", 3].error
    assert len(result.runs) == 28
    outcome = result.outcomes[0]
    assert len(outcome.effects) == 9
    assert outcome.verdict is Verdict.OPEN, "nine good seeds of ten: the tenth is a result, too"
    assert "seeds [1]" in outcome.problem
    monkeypatch.delenv("FAKE_FAIL")
    mended = run()
    assert mended.reused == 28
    assert mended.outcomes[0].verdict is Verdict.HOLDS


def test_a_run_that_waits_for_input_gets_none(run, monkeypatch):
    """Fails when a run that reads standard input waits for ever, or swallows the jobs of the others."""
    monkeypatch.setenv("FAKE_READ", "better/0")
    result = run(scale="smoke", seeds=1)
    (failure,) = result.failures
    assert failure.arm == "better"
    assert "EOF" in failure.error
    assert {r.arm for r in result.runs} == {"plain", "control"}


def test_a_run_that_takes_too_long_has_failed(run, monkeypatch):
    """Fails when the limit of time does not reach the processes, or ends more than the run."""
    monkeypatch.setenv("FAKE_HANG", "better/0")
    ask = WorkerProcess.ask

    def patient(process, message, *, seconds=None):
        """Whether the other runs are done in a second is the machine's business."""
        return ask(process, message, seconds=seconds if message.get("arm") == "better" else None)

    monkeypatch.setattr(WorkerProcess, "ask", patient)
    result = run(scale="smoke", seeds=1, time_limit=1.0)
    assert [(failure.arm, failure.error) for failure in result.failures] == [
        ("better", "the run took longer than 1 s and was ended")
    ]
    assert {r.arm for r in result.runs} == {"plain", "control"}


def test_a_diverged_seed_leaves_its_claim_open(run, monkeypatch):
    """Fails when a NaN is dropped from the mean, or the whole comparison is lost to it."""
    monkeypatch.setenv("FAKE_NAN", "better/2")
    result = run()
    assert result.outcomes[0].verdict is Verdict.OPEN
    assert "seed 2: nan" in result.outcomes[0].problem
    assert not result.failures


def test_arms_that_saw_other_data_are_told_for_the_claims_that_compare_them(run, claim, monkeypatch):
    """Fails when a difference of data passes for the effect of the method, or arms that nobody compares raise alarm."""
    monkeypatch.setenv("FAKE_OTHER_DATA", "control")
    versus_control = replace(claim, id="control", baseline="control")
    notes = run(claim, versus_control, scale="smoke", seeds=2).notes
    (told,) = [note for note in notes if "same data" in note]
    assert "Claim control: control and better did not see the same data with seeds [0, 1]" in told


def test_a_missing_data_set_is_said_at_once(run):
    """Fails when "unavailable" turns into a list of failed runs."""
    with pytest.raises(Unavailable, match="ImageNet is not here"):
        run(scale="paper")


def test_a_smaller_scale_gives_no_verdict(run, claim):
    """Fails when seconds of smoke decide a claim about minutes of training."""
    result = run(scale="smoke")
    assert result.outcomes[0].verdict is Verdict.OPEN
    assert "laptop scale, not at smoke" in result.outcomes[0].problem
    assert run(replace(claim, scale="smoke"), scale="smoke").outcomes[0].verdict is Verdict.HOLDS


def test_committed_code_does_not_take_over_runs_of_uncommitted_code(run, monkeypatch):
    """Fails when rows of a dirty tree become evidence by committing afterwards."""
    monkeypatch.setattr(runner, "checkout_state", lambda files: CheckoutState("c", True))
    dirty = run(scale="smoke", seeds=1)
    assert all(r.dirty for r in dirty.runs)
    assert any("uncommitted" in note for note in dirty.notes)
    monkeypatch.setattr(runner, "checkout_state", lambda files: CheckoutState("c", False))
    assert run(scale="smoke", seeds=1).reused == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"scale": "huge"}, r"no scale 'huge'; it has \['smoke', 'laptop', 'paper'\]"),
        ({"seeds": 0}, "declares 10 seeds and was asked for 0"),
        ({"seeds": 11}, "asked for 11: .* more would be seeds added after a look"),
        ({"first": 7}, "a block of seeds starts at 0, as declared"),
        ({"workers": 0}, "workers must be at least 1"),
    ],
)
def test_bad_arguments_are_refused_before_anything_runs(run, arguments, says):
    """Fails when a wrong call costs a run first."""
    with pytest.raises(ValueError, match=says):
        run(**arguments)


def test_a_claim_about_an_unknown_arm_is_refused(run, claim):
    """Fails when a renamed arm makes a claim silently "not run"."""
    with pytest.raises(ValueError, match=r"'end' compares arm 'best'.*\['plain', 'better', 'control'\]"):
        run(replace(claim, method="best"))


def test_code_that_cannot_be_loaded_is_an_error_with_its_traceback(home, tmp_path, monkeypatch):
    """Fails when workers that cannot start leave the caller waiting."""
    (tmp_path / "broken_experiment.py").write_text(
        "import os\nif os.environ.get('OMP_NUM_THREADS') == '1' and os.environ.get('PYTHONHASHSEED') == '0':\n"
        "    raise OSError('no weights')\nDEFAULTS = {}\nSCALES = {'smoke': {}}\nARMS = {'plain': {}}\n"
        "def about(settings): ...\ndef run(settings, seed): ...\n"
    )
    monkeypatch.setenv("PYTHONHASHSEED", "1")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(RuntimeError, match=r"broken_experiment does not run: OSError: no weights"):
        reproduce("paper", "broken_experiment", [], scale="smoke", seeds=2, progress=False)


def test_tuning_gives_every_arm_the_same_and_is_shown_with_the_comparison(run, fake):
    """Fails when the best trial is picked by the wrong sign, or a comparison does not know how it was tuned."""
    table = tune("paper", fake, workers=1, progress=False)
    assert table.best == {"plain": {"rate": 0.1}, "better": {"rate": 0.2}}
    assert table.agrees == {"plain": True, "better": True}
    assert [len([t for t in table.trials if t.arm == arm]) for arm in ("plain", "better")] == [2, 2]
    assert tune("paper", fake, workers=1, progress=False).reused == 8
    shown = run(scale="smoke", seeds=1).tuning
    assert shown is not None
    assert shown.trials == table.trials


def test_no_tuning_is_said(home, tmp_path, monkeypatch):
    """Fails when an experiment without a grid gives an empty table."""
    (tmp_path / "untuned_experiment.py").write_text(
        "DEFAULTS = {}\nSCALES = {}\nARMS = {}\ndef about(settings): ...\ndef run(settings, seed): ...\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match="has no TUNING"):
        tune("paper", "untuned_experiment", progress=False)


CALL = """
import signal
import sys
# A shell that starts this suite in the background hands SIGINT down as ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path.insert(0, sys.argv[1])
from regularized.evidence.runner import Interrupted, reproduce
try:
    reproduce("paper", "fake_experiment", [], scale="smoke", seeds=5, workers=2)
except Interrupted as stop:
    print(stop.finished, stop.total, stop)
    sys.exit(130)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows sends no SIGINT to one process")
def test_ctrl_c_keeps_finished_runs_and_ends_the_workers(run, home):
    """Fails when an interrupt loses finished runs, leaves processes behind, or the next call starts from nothing."""
    # No `if __name__ == "__main__"` in the script: with multiprocessing each worker would run it again.
    process = subprocess.Popen(
        [sys.executable, "-c", CALL, str(HERE)],
        env=os.environ | {"FAKE_HOLD": "1"},  # the three runs of the first seed end, the others never
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stderr is not None
    lines = [process.stderr.readline() for _ in range(3)]  # three runs have finished
    assert "[3/15]" in lines[-1]
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    workers = children.read_text().split() if children.exists() else []
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the whole group
    out, _ = process.communicate(timeout=240)
    assert process.returncode == 130
    assert out.startswith("3 15 ")
    assert "runs are kept" in out
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{worker}").exists() for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)
    with Store() as store:
        assert len(store.find("paper")) == 3
    assert run(scale="smoke", seeds=5).reused == 3
