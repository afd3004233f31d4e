import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from regularized.training.progress import (
    Progress,
    as_schedule,
    cosine,
    gaussian_ramp,
    is_always,
    linear,
    piecewise,
    warmup,
)

values = st.floats(-10, 10)
units = st.sampled_from(["step", "epoch"])


@st.composite
def positions(draw):
    total_epochs = draw(st.integers(1, 50))
    per_epoch = draw(st.integers(1, 20))
    step = draw(st.integers(0, total_epochs * per_epoch - 1))
    return Progress(step, total_epochs * per_epoch, step // per_epoch, total_epochs)


@given(values, values, positions(), units)
def test_linear_and_cosine_stay_between_their_ends(start, end, position, unit):
    """Fails on a wrong sign or a share outside [0, 1]."""
    low, high = min(start, end) - 1e-9, max(start, end) + 1e-9
    assert low <= linear(start, end, unit=unit)(position) <= high
    assert low <= cosine(start, end, unit=unit)(position) <= high


@given(values, values, st.integers(1, 40), units)
def test_they_begin_and_end_where_they_say(start, end, epochs, unit):
    """Fails if the ends are swapped, or the last epoch is off by one."""
    for schedule in (linear(start, end, unit=unit), cosine(start, end, unit=unit)):
        done = schedule(Progress(epochs, epochs, epochs - 1, epochs))
        assert done == pytest.approx(end, abs=1e-9)
    assert linear(start, end)(Progress(0, epochs, 0, epochs)) == pytest.approx(start)
    assert cosine(start, end)(Progress(0, epochs, 0, epochs)) == pytest.approx(start)
    assert linear(start, end, unit="epoch")(Progress(0, 9, 0, epochs)) == pytest.approx(start + (end - start) / epochs)


@given(st.integers(1, 30), st.integers(0, 29))
def test_epoch_unit_does_not_move_within_an_epoch(epochs, epoch):
    """Fails if the step leaks into an epoch schedule."""
    schedule = linear(0, 1, unit="epoch")
    assert len({schedule(Progress(step, 1000, epoch, epochs)) for step in (0, 10, 999)}) == 1


@given(values, positions(), st.floats(0, 1))
def test_warmup_is_the_schedule_after_its_share(value, position, share):
    """Fails if the warm-up also bends what comes after it."""
    result = warmup(value, share)(position)
    if position.fraction >= share:
        assert result == value
    else:
        assert result == pytest.approx(value * position.fraction / share)


@given(positions(), st.dictionaries(st.floats(0, 1), values, max_size=5), values)
def test_piecewise_takes_the_last_milestone_reached(position, milestones, initial):
    """Fails if the milestones are not sorted, or the comparison is strict."""
    reached = [share for share in milestones if share <= position.fraction]
    expected = milestones[max(reached)] if reached else initial
    assert piecewise(milestones, initial=initial)(position) == expected


@given(st.integers(0, 100), st.integers(0, 200))
def test_gaussian_ramp_is_the_formula(steps, step):
    """Fails if the ramp is not clamped after its end, or divides by zero without one."""
    result = gaussian_ramp(2.0, steps=steps)(Progress(step, 1000))
    expected = 2.0 if step >= steps else 2.0 * math.exp(-5 * (1 - step / steps) ** 2)
    assert result == pytest.approx(expected)


def test_cosine_restarts():
    """Fails if the cycles are not of equal length or the end is not reached."""
    schedule = cosine(1.0, 0.0, cycles=2)
    assert [round(schedule(Progress(s, 4)), 6) for s in range(5)] == [1.0, 0.5, 1.0, 0.5, 0.0]


def test_window_of_linear():
    """Fails if begin and until are ignored."""
    schedule = linear(1.0, 3.0, begin=0.25, until=0.75)
    assert [schedule(Progress(s, 4)) for s in range(5)] == [1.0, 1.0, 2.0, 3.0, 3.0]


def test_as_schedule_and_is_always():
    """Fails if a schedule is taken for a constant, or True for the number 1."""
    assert as_schedule(0.0)(Progress(0, 1)) == 0.0
    assert is_always(0, 0.0)
    assert is_always(as_schedule(0.5), 0.5)
    assert not is_always(linear(0, 0), 0.0)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: as_schedule("fast"), TypeError, "number or a function"),
        (lambda: as_schedule(True), TypeError, "number or a function"),
        (lambda: as_schedule(math.nan, name="strength"), ValueError, "strength"),
        (lambda: linear(0, 1, begin=0.5, until=0.5), ValueError, "begin"),
        (lambda: cosine(cycles=0), ValueError, "cycles"),
        (lambda: piecewise({2: 1.0}), ValueError, "shares"),
        (lambda: warmup(1.0, 1.5), ValueError, "share"),
        (lambda: gaussian_ramp(steps=-1), ValueError, "steps"),
        (lambda: linear(0, 1, unit="week"), ValueError, "unit"),
        (lambda: cosine(unit="week"), ValueError, "unit"),
    ],
)
def test_bad_arguments(call, error, says):
    """Fails if a wrong argument is taken silently."""
    with pytest.raises(error, match=says):
        call()
