"""Pressure, temperature and factors of `hestia` over a training."""

import math

import pytest

from regularized.compression.hestia import Annealing, sensitivities, temperature_factors

SHARES = [step / 40 for step in range(41)]


@pytest.mark.parametrize("decay", ["cosine", "linear"])
@pytest.mark.parametrize("on", ["temperature", "progress"])
@pytest.mark.parametrize("factor", [0.6, 1.0, 1.5])
def test_schedule_ends_hard_and_never_warms_up(decay, on, factor):
    """Fails when pressure does not go from 0 to 1, the temperature rises, or is not exactly 0 at the end."""
    annealing = Annealing(compress=0.2, anneal=0.7, decay=decay, factor_on=on)
    pressures = [annealing.pressure(u) for u in SHARES]
    assert pressures[0] == 0.0
    assert annealing.pressure(0.2) == 1.0
    assert pressures == sorted(pressures)
    cooling = [annealing.cooling(u, factor) for u in SHARES]
    assert cooling == sorted(cooling, reverse=True)
    assert cooling[-1] == 0.0
    assert cooling[-2] > 0.0


def test_what_the_factor_does():
    """Fails when text and code of the paper are mixed up: a small factor cools, or keeps a tensor soft for longer."""
    code, text = Annealing(factor_on="temperature"), Annealing(factor_on="progress")
    assert code.cooling(0.6, 0.7) == pytest.approx(0.7 * code.cooling(0.6))
    assert text.cooling(0.6, 0.7) > text.cooling(0.6)
    assert text.cooling(0.1, 0.7) == 1.0
    plateau = Annealing(factor_on="plateau", anneal=0.5)
    assert plateau.cooling(0.5, 0.7) == 0.7
    assert plateau.cooling(0.51, 0.7) > 0.99  # the official code's jump


def test_no_compression_and_no_temperature():
    """Fails when compress 0 divides by it, or temperature 0 is not straight-through training from the start."""
    annealing = Annealing(compress=0.0, temperature=0.0)
    assert [annealing.pressure(u) for u in (0.0, 0.5, 1.0)] == [1.0, 1.0, 1.0]
    assert annealing.start() == 0.0
    assert Annealing().start("binary") > 1.0  # each codebook has its own optimum


def test_factors_from_traces():
    """Fails for a sample deviation, a sigmoid of raw traces, or another sign."""
    traces = {"a": 1.0, "b": 10.0, "c": 100.0}
    z = math.log(10.0) / (math.log(10.0) * math.sqrt(2 / 3))
    expected = [1 / (1 + math.exp(z)), 0.5, 1 / (1 + math.exp(-z))]
    scores = sensitivities(traces)
    assert list(scores.values()) == pytest.approx(expected, rel=1e-7)
    factors = temperature_factors(traces, alpha=0.6)
    assert list(factors.values()) == pytest.approx([math.exp(-0.6 * s) for s in scores.values()])
    assert set(temperature_factors(traces, alpha=0.0).values()) == {1.0}


def test_equal_traces_are_equally_sensitive():
    """Fails when a deviation of zero gives NaN."""
    assert set(sensitivities({"a": 3.0, "b": 3.0, "c": 3.0}).values()) == {0.5}
    assert sensitivities({"a": 3.0}) == {"a": 0.5}
