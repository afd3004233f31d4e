"""Calibration tools against slow loops, known answers, and symmetries."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from regularized.mechanisms.calibration import (
    area_under_risk_coverage,
    excess_area_under_risk_coverage,
    expected_calibration_error,
    fit_temperature,
    negative_log_likelihood,
    reliability,
)

sizes = st.tuples(st.integers(1, 40), st.integers(2, 6), st.integers(0, 999))


def problem(samples: int, classes: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    draws = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(samples, classes, generator=draws, dtype=torch.float64)
    return logits.softmax(dim=1), torch.randint(classes, (samples,), generator=draws)


def slow_ece(p, labels, bins: int) -> float:
    total = 0.0
    confidence, predicted = p.max(dim=1)
    for k in range(bins):
        inside = [i for i in range(len(p)) if k / bins < confidence[i] <= (k + 1) / bins]
        if inside:
            accuracy = sum(float(predicted[i] == labels[i]) for i in inside) / len(inside)
            mean = sum(float(confidence[i]) for i in inside) / len(inside)
            total += len(inside) * abs(accuracy - mean)
    return total / len(p)


def slow_aurc(p, labels, order) -> float:
    confidence, predicted = p.max(dim=1)
    ranked = sorted(order, key=lambda i: -float(confidence[i]))  # stable: equal ones stay as given
    wrong, total = 0, 0.0
    for covered, i in enumerate(ranked, start=1):
        wrong += int(predicted[i] != labels[i])
        total += wrong / covered
    return total / len(p)


@given(sizes, st.integers(1, 20))
@settings(max_examples=60)
def test_slow_loops(size, bins):
    """Fails for bins that are closed on the wrong side, weighed by their width, or risks that start at 0 coverage."""
    p, y = problem(*size)
    assert float(expected_calibration_error(p, y, bins=bins)) == pytest.approx(slow_ece(p, y, bins), abs=1e-12)
    assert float(area_under_risk_coverage(p, y)) == pytest.approx(slow_aurc(p, y, range(len(p))), abs=1e-12)
    assert float(negative_log_likelihood(p, y)) == pytest.approx(float(F.cross_entropy(p.log(), y)), rel=1e-12)
    by_bounds = expected_calibration_error(p, y, bins=[(k + 1) / bins for k in range(bins)])
    assert torch.equal(by_bounds, expected_calibration_error(p, y, bins=bins))


def test_a_bound_belongs_to_the_bin_below():
    """Left-open, right-closed: a confidence of exactly 0.5 is in (0.4, 0.5], and 1 is in the last bin."""
    diagram = reliability(torch.tensor([[0.5, 0.5], [1.0, 0.0]]), torch.tensor([0, 1]), bins=10)
    assert diagram.count.tolist() == [0, 0, 0, 0, 1, 0, 0, 0, 0, 1]
    assert diagram.accuracy.tolist() == [0, 0, 0, 0, 1, 0, 0, 0, 0, 0]
    assert float(diagram.expected_calibration_error) == 0.75
    assert float(diagram.overconfidence) == 0.25
    assert diagram.lower.tolist() == pytest.approx([k / 10 for k in range(10)])


@given(sizes)
@settings(max_examples=30)
def test_order_does_not_matter(size):
    """Permuting the samples changes nothing, ties of the confidence included."""
    p, y = problem(*size)
    p = ((p * 4).round() + 1e-3).div_(((p * 4).round() + 1e-3).sum(dim=1, keepdim=True))  # few different values
    order = torch.randperm(len(p), generator=torch.Generator().manual_seed(size[2]))
    for measure in (area_under_risk_coverage, excess_area_under_risk_coverage, expected_calibration_error):
        torch.testing.assert_close(measure(p, y), measure(p[order], y[order]), rtol=1e-12, atol=1e-12)


def test_ties_are_the_mean_over_all_orders():
    """Brute force over the orders of five equally confident samples, one surer and one less sure."""
    p = torch.tensor([[0.9, 0.1], *[[0.7, 0.3]] * 5, [0.4, 0.6]], dtype=torch.float64)
    y = torch.tensor([0, 0, 1, 1, 0, 1, 0])
    orders = [slow_aurc(p, y, [0, *middle, 6]) for middle in itertools.permutations(range(1, 6))]
    assert float(area_under_risk_coverage(p, y)) == pytest.approx(sum(orders) / len(orders), rel=1e-12)


@given(sizes)
@settings(max_examples=30)
def test_excess(size):
    """Never negative; 0 when every wrong prediction is less confident than every right one."""
    p, y = problem(*size)
    assert float(excess_area_under_risk_coverage(p, y)) >= -1e-12
    confidence, predicted = p.max(dim=1)
    order = confidence.argsort(descending=True)
    p, predicted, right = p[order], predicted[order], len(p) // 2
    labels = torch.where(torch.arange(len(p)) < right, predicted, (predicted + 1) % size[1])
    assert float(excess_area_under_risk_coverage(p, labels)) == pytest.approx(0.0, abs=1e-12)


def test_calibrated_by_construction():
    """Labels drawn from the probabilities themselves: the error goes to 0 with the number of samples."""
    draws = torch.Generator().manual_seed(0)
    p = (2 * torch.randn(100_000, 4, generator=draws)).softmax(dim=1)
    y = torch.multinomial(p, 1, generator=draws).squeeze(1)
    assert float(expected_calibration_error(p, y)) < 0.006
    sharper = (3 * p.log()).softmax(dim=1)
    assert float(expected_calibration_error(sharper, y)) > 0.1
    assert float(reliability(sharper, y).overconfidence) > 0.1
    # Temperature scaling undoes exactly what was done.
    assert float(fit_temperature(3 * p.log(), y)) == pytest.approx(3.0, rel=0.02)


@given(sizes, st.floats(0.1, 10.0))
@settings(max_examples=30)
def test_temperature(size, scale):
    """A minimum of the likelihood loss, and proportional to the logits."""
    p, y = problem(*size)
    z = p.log()
    temperature = fit_temperature(z, y)
    assert temperature > 0
    if 0.01 < temperature < 100:
        best = F.cross_entropy(z / temperature, y)
        for factor in (0.97, 1.03):
            assert F.cross_entropy(z / (temperature * factor), y) >= best - 1e-12
        assert float(fit_temperature(scale * z, y)) == pytest.approx(scale * float(temperature), rel=1e-6)


def test_temperature_ends():
    """Every label the largest logit: the likelihood grows without end. Every label the smallest: it falls."""
    z = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    assert float(fit_temperature(z, torch.tensor([0, 1]))) == pytest.approx(1e-3, rel=1e-6)
    assert float(fit_temperature(z, torch.tensor([1, 0]), limit=50.0)) == pytest.approx(50.0, rel=1e-6)


def test_half_precision():
    """Probabilities of autocast models are taken as they are; the sums are made in float32."""
    p, y = problem(400, 5, 0)
    exact = expected_calibration_error(p, y)
    assert float(expected_calibration_error(p.bfloat16(), y)) == pytest.approx(float(exact), abs=0.02)
    assert expected_calibration_error(p.bfloat16(), y).dtype == torch.float32


@pytest.mark.parametrize("measure", [reliability, area_under_risk_coverage, negative_log_likelihood])
@pytest.mark.parametrize(
    ("probabilities", "labels", "words"),
    [
        (torch.randn(3, 2), torch.zeros(3).long(), "take .softmax"),
        (torch.full((3, 2), 0.5), torch.zeros(4).long(), r"got \(3, 2\) and \(4,\)"),
        (torch.full((3, 2), 0.5), torch.zeros(3), "integer labels"),
        (torch.zeros(0, 2), torch.zeros(0).long(), "M > 0"),
        (torch.full((3, 2), float("nan")), torch.zeros(3).long(), "sum to 1"),
    ],
)
def test_errors(measure, probabilities, labels, words):
    """Logits instead of probabilities is the usual mistake, and would give a number."""
    with pytest.raises(ValueError, match=words):
        measure(probabilities, labels)


@pytest.mark.parametrize("bins", [0, [], [0.5, 0.5, 1.0], [0.2, 0.9], [-0.1, 1.0]])
def test_bins(bins):
    """Bounds that do not rise to 1 would leave samples out."""
    with pytest.raises(ValueError, match="bins must"):
        expected_calibration_error(*problem(5, 2, 0), bins=bins)


def test_temperature_errors():
    """Shapes and limit."""
    with pytest.raises(ValueError, match="limit must be above 1"):
        fit_temperature(torch.zeros(1, 2), torch.zeros(1).long(), limit=1.0)
    with pytest.raises(ValueError, match="need logits"):
        fit_temperature(torch.zeros(2), torch.zeros(2).long())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_temperature_of_logits_that_are_not_finite(value):
    """Fails when the search runs to its end on comparisons with nan and returns the largest temperature."""
    logits = torch.zeros(3, 2)
    logits[1, 0] = value
    with pytest.raises(ValueError, match=r"1 of 3 rows of logits are not finite"):
        fit_temperature(logits, torch.tensor([0, 1, 0]))


def test_labels_of_a_temperature():
    """Fails with torch's raw message for int32 labels, and for labels that are no classes."""
    logits, labels = torch.randn(20, 3), torch.randint(3, (20,))
    assert fit_temperature(logits, labels.int()) == fit_temperature(logits, labels)
    for wrong in (-100, 3):
        with pytest.raises(ValueError, match=r"labels must be integers in \[0, 3\)"):
            fit_temperature(logits, torch.full((20,), wrong))
