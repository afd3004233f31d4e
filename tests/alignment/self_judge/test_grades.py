"""Scores, labels, gates, choices, and how they are compared with the truth."""

import pytest
import torch

from regularized.alignment.self_judge import (
    SelectiveGate,
    best_of_n,
    combined_grades,
    digit_token_ids,
    expected_score,
    pairwise_accuracy,
    pearson,
    select_instructions,
    spearman,
)

DIGITS = (5, 3, 8, 1, 11, 2, 7, 0, 9, 4)  # an order of its own, so that a column is no grade


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("grade", range(10))
def test_a_sure_judge_gives_that_grade(grade):
    """Fails when the value of a token is its column, or grades begin at 1."""
    z = torch.full((12,), -torch.inf)
    z[DIGITS[grade]] = 3.0
    assert float(expected_score(z, DIGITS)) == grade


def test_expected_score_is_over_the_grades_alone():
    """Fails when probabilities are not brought to the sum 1 (other tokens then lower every score)."""
    z = normal(7, 12)
    z[:, 10] = 20.0  # no grade
    p = z[:, list(DIGITS)].exp()
    expected = (p / p.sum(1, keepdim=True) * torch.arange(10)).sum(1)
    torch.testing.assert_close(expected_score(z, DIGITS), expected)
    assert float(expected_score(torch.zeros(12), DIGITS)) == 4.5
    torch.testing.assert_close(expected_score(z.log_softmax(1), DIGITS), expected_score(z, DIGITS))


def test_truncation():
    """Fails when top_k counts among the grades instead of all tokens, or drops one of those that are left."""
    z = normal(5, 40)
    z[:, list(DIGITS)] += 30.0
    assert torch.equal(expected_score(z, DIGITS, top_k=10), expected_score(z, DIGITS))
    z = torch.zeros(12)
    z[6], z[DIGITS[2]], z[DIGITS[8]], z[DIGITS[9]] = 9.0, 4.0, 4.0, 3.0
    assert float(expected_score(z, DIGITS, top_k=3)) == pytest.approx(5.0)  # token 6 is the first of the three


def test_gradients_flow_through_the_score():
    """Fails when the score is computed without a graph: it can be a loss, too."""
    z = normal(3, 12).requires_grad_()
    expected_score(z, DIGITS).sum().backward()
    assert float(z.grad.abs().sum()) > 0


def test_digits_of_a_tokenizer():
    """Fails when a digit is looked up alone, while it is another token behind the prompt."""
    pieces = {"Grade:": [1], "Grade: ": [1, 2], **{str(d): [50 + d] for d in range(10)}}
    pieces |= {f"Grade:{d}": [1, 70 + d] for d in range(10)} | {f"Grade: {d}": [1, 80 + d] for d in range(10)}
    assert digit_token_ids(pieces.__getitem__) == tuple(range(50, 60))
    assert digit_token_ids(pieces.__getitem__, after="Grade:") == tuple(range(70, 80))
    with pytest.raises(ValueError, match="one token each"):  # the space and the digit become one token
        digit_token_ids(pieces.__getitem__, after="Grade: ")


def test_combined_labels():
    """Fails when the cosine is not brought to the grades' scale, is counted below 0, or the mean is a sum."""
    s, cosine = torch.tensor([0.0, 9.0, 9.0, 6.0]), torch.tensor([-1.0, 1.0, 0.0, 0.4])
    assert combined_grades(s, cosine).tolist() == [0, 9, 4, 5]


def test_gate_by_coverage():
    """Fails when a share is rounded down, or the threshold itself is not answered."""
    scores = torch.tensor([1.0, 5.0, 3.0, 8.0, 7.0])
    quality = torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0])
    for coverage, threshold in ((0.2, 8.0), (0.21, 7.0), (0.6, 5.0), (1.0, 1.0)):
        gate = SelectiveGate.calibrate(scores, quality, coverage=coverage)
        assert gate.threshold == threshold
        assert gate.coverage >= coverage
        assert gate.quality == pytest.approx(float(quality[gate(scores)].mean()))
    hundred = torch.arange(100) / 20
    assert SelectiveGate.calibrate(hundred, coverage=0.07).coverage == 0.07


def test_gate_by_quality():
    """Fails when equal scores are cut apart, or the smallest instead of the largest coverage is taken."""
    scores = torch.tensor([9.0, 8.0, 8.0, 6.0, 5.0])
    quality = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0])
    assert SelectiveGate.calibrate(scores, quality, least_quality=0.7).threshold == 6.0
    assert SelectiveGate.calibrate(scores, quality, least_quality=0.9).threshold == 9.0


def test_best_of_n():
    """Fails when the last of equals is taken, or a missing answer is chosen."""
    scores = torch.tensor([[4.0, 9.0, 9.0], [-torch.inf, -3.0, -torch.inf]])
    assert best_of_n(scores).tolist() == [1, 1]


def test_instructions_are_chosen_within_groups():
    """Fails when groups compete with each other, or rows come in the order of scores."""
    scores = torch.tensor([1.0, 5.0, 5.0, 9.0, 0.5])
    assert select_instructions(scores, keep=2).tolist() == [1, 3]
    assert select_instructions(scores, keep=1, groups=["b", "a", "a", "a", "b"]).tolist() == [0, 3]
    assert select_instructions(scores, keep=9, groups=["b", "a", "a", "a", "b"]).tolist() == [0, 1, 2, 3, 4]


def test_correlations():
    """Fails when ties get different ranks, or Pearson's r forgets the means."""
    stats = pytest.importorskip("scipy.stats")
    x, y = normal(40), normal(40, seed=1)
    y = (x + y).round()  # with ties
    assert float(pearson(x + 100, y)) == pytest.approx(stats.pearsonr(x, y).statistic, abs=1e-12)
    assert float(spearman(x, y)) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)
    assert float(pearson(x, -3 * x)) == pytest.approx(-1.0)


def test_pairs_are_of_one_question():
    """Fails when answers to different questions are compared, ties count as wrong, or equal grades count."""
    scores = torch.tensor([[1.0, 2.0, 2.0], [9.0, 8.0, 7.0]])
    grades = torch.tensor([[0.0, 3.0, 3.0], [3.0, 6.0, 6.0]])
    assert float(pairwise_accuracy(scores, grades)) == 0.5  # two right, two wrong
    assert float(pairwise_accuracy(scores[:1] * 0, grades[:1])) == 0.5
