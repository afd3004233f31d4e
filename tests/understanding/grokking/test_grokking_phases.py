"""Phases of a state and of a log: limits, hysteresis, patience. Each test names the fault that makes it fail."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

from regularized.understanding.grokking.phases import Phase, detect_phases, phase_of
from regularized.understanding.grokking.plot import plot_grokking

# Settings of the official notebook (p = 97) and what they are called there.
NOTEBOOK = [
    ((0.978, 0.983, 0.94), Phase.COEXISTENCE),
    ((0.786, 1.000, 0.39), Phase.PARTIAL_INVERSION),
    ((0.6537, 1.000, 0.007), Phase.FULL_INVERSION),
    ((1.000, 1.000, math.nan), Phase.GENERALIZATION),
    ((1.000, 0.300, 1.0), Phase.MEMORIZATION),
    ((0.400, 0.010, 0.4), Phase.CONFUSION),
    ((1.000, 0.700, 1.0), Phase.TRANSITION),
]


@pytest.mark.parametrize(("accuracies", "phase"), NOTEBOOK)
def test_phases_of_the_notebook(accuracies, phase):
    assert phase_of(*accuracies, chance=1 / 97) is phase


def test_forgetting_is_confusion_after_generalisation():
    """Fails when the past is not asked for."""
    now = {"train": 0.009, "test": 0.011, "memorized": 0.01}
    assert phase_of(**now, chance=1 / 97) is Phase.CONFUSION
    assert phase_of(**now, chance=1 / 97, generalized_before=True) is Phase.FORGETTING


def test_labels_right_by_chance_count_as_dropped():
    """At p = 5 a network that dropped all replaced labels still reproduces a fifth of them."""
    assert phase_of(0.7, 1.0, 0.2, chance=1 / 5) is Phase.FULL_INVERSION
    assert phase_of(0.7, 1.0, 0.2, chance=1 / 97) is Phase.PARTIAL_INVERSION


@given(st.floats(0, 1), st.floats(0, 1), st.one_of(st.just(math.nan), st.floats(0, 1)))
@settings(max_examples=200)
def test_a_log_of_one_record_is_its_state(train, test, memorized):
    """Both ways to a phase agree, for any accuracies."""
    log = [{"step": 3.0, "train": train, "test": test, "memorized": memorized}]
    found = detect_phases(log, chance=0.1, patience=1)
    assert found.phases == ((phase_of(train, test, memorized, chance=0.1), 3.0),)


def course(*stages, every=10):
    """A log of constant stages: (records, train, test, memorized)."""
    records = [values for count, *values in stages for _ in range(count)]
    names = ("train", "test", "memorized")
    return [{"step": k * every, **dict(zip(names, values, strict=True))} for k, values in enumerate(records)]


WHOLE = course((5, 0.1, 0.0, 0.1), (8, 1.0, 0.1, 1.0), (6, 1.0, 0.99, 1.0), (4, 0.8, 1.0, 0.4), (9, 0.7, 1.0, 0.02))


def test_a_whole_training():
    """Every phase with its first step, and the milestones; fails for a change dated when it is confirmed."""
    found = detect_phases(WHOLE, chance=1 / 53)
    assert [(phase.value, step) for phase, step in found.phases] == [
        ("confusion", 0),
        ("memorization", 50),
        ("coexistence", 130),
        ("partial inversion", 190),
        ("full inversion", 230),
    ]
    assert (found.fitted_at, found.generalized_at, found.dropped_at) == (50, 130, 230)
    assert found.delay == 80
    assert found.final is Phase.FULL_INVERSION
    assert found.spans()[-1] == (Phase.FULL_INVERSION, 230, 310)


def test_forgetting_in_a_log():
    found = detect_phases([*WHOLE, *({**r, "step": 400 + k} for k, r in enumerate(course((5, 0.02, 0.02, 0.02))))])
    assert found.final is Phase.FORGETTING
    assert found.dropped_at == 230


LOW, HIGH = {"train": 0.5, "test": 0.3, "memorized": 0.3}, {"train": 1.0, "test": 1.0, "memorized": 1.0}


@pytest.mark.parametrize("nonsense", [LOW, HIGH], ids=["low", "high"])
@pytest.mark.parametrize("length", [1, 2])
@pytest.mark.parametrize("at", [0, 8, 14, 20, 28, 30])
def test_spikes_make_no_phase(at, length, nonsense):
    """A record or two of nonsense anywhere change nothing; fails without patience, and at either end of a log."""
    log = [dict(record) for record in WHOLE]
    for k in range(at, at + length):
        log[k] |= nonsense
    spiked, calm = (detect_phases(records, chance=1 / 53) for records in (log, WHOLE))
    assert [phase for phase, _ in spiked.phases] == [phase for phase, _ in calm.phases]


def test_a_spike_lasts_with_patience_one():
    """The other side: every record counts then."""
    log = [dict(record) for record in WHOLE]
    log[8]["test"] = 1.0
    assert len(detect_phases(log, patience=1).phases) > len(detect_phases(WHOLE, patience=1).phases)


def test_chatter_around_a_limit_is_one_phase():
    """Accuracy that goes to and fro within the margin below 0.95, for as long as it likes; fails without hysteresis."""
    log = [{"step": s, "train": 1.0, "test": 0.955 if s // 4 % 2 == 0 else 0.94} for s in range(60)]
    assert [phase for phase, _ in detect_phases(log).phases] == [Phase.GENERALIZATION]


def test_a_limit_that_is_really_left_is_left():
    """Beyond the margin, for long enough; fails when a state once entered is kept."""
    log = [{"step": s, "train": 1.0, "test": 0.96 if s < 20 else 0.9} for s in range(40)]
    assert [(phase.value, step) for phase, step in detect_phases(log).phases] == [
        ("generalization", 0),
        ("transition", 20),
    ]


def test_delay():
    """None without both; negative where the test came first, as with much regularisation."""
    assert detect_phases(course((9, 1.0, 0.1, 1.0))).delay is None
    assert detect_phases(course((5, 0.6, 0.97, 0.1), (9, 0.99, 0.99, 0.97))).delay == -50


def test_a_log_without_corrupted_labels():
    """No ``memorized``, or nan: clean data, so there is nothing to drop."""
    log = [{"step": s, "train": 1.0, "test": float(s > 5)} for s in range(20)]
    found = detect_phases(log)
    assert found.final is Phase.GENERALIZATION
    assert found.dropped_at is None
    assert detect_phases([{**r, "memorized": math.nan} for r in log]) == found


def test_plot():
    """Lines of what the log holds, a span for each phase."""
    axes = Figure().subplots()
    plot_grokking([{**r, "ipr": 0.3} for r in WHOLE], axes, phases=detect_phases(WHOLE, chance=1 / 53))
    assert len(axes.lines) == 4
    assert len(axes.patches) == len(axes.texts) == 5
