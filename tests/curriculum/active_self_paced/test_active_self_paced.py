"""Active self-paced learning. Golden vectors, contract and bad input are checked in tests/test_contract.py."""

import csv
import io
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regularized.curriculum.active_self_paced.loss import (
    one_vs_rest_hinge,
    one_vs_rest_labels,
    self_paced_implicit_loss,
    self_paced_penalty,
    self_paced_weights,
    unique_labels,
)
from regularized.curriculum.active_self_paced.oracles import AnswersPending, CSVOracle, PromptOracle
from regularized.curriculum.active_self_paced.procedure import ActiveSelfPaced
from regularized.curriculum.active_self_paced.queries import ambiguity, disagreement, doubtful, lowest_best_score

seeds = st.integers(0, 200)


def random(seed, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_weights_at_their_corners():
    """Check 1: loss 0, half of lambda / C, exactly lambda / C. Fails for <= in the hard rule or C on the wrong side."""
    losses = torch.tensor([0.0, 0.25, 0.5, 2.0], dtype=torch.float64)
    assert self_paced_weights(losses, 1.0, cost=2.0).tolist() == [1.0, 0.5, 0.0, 0.0]
    assert self_paced_weights(losses, 1.0, cost=2.0, weighting="hard").tolist() == [1.0, 1.0, 0.0, 0.0]


@given(seed=seeds, cost=st.floats(0.1, 5), pace=st.floats(0.1, 5))
@settings(max_examples=30)
def test_weights_are_the_minimiser(seed, cost, pace):
    """Check 2 by brute force: no weight on a grid does better; the implicit loss is the value at the minimum."""
    losses = random(seed, 8).abs()
    grid = torch.linspace(0, 1, 101, dtype=torch.float64)
    for weighting in ("linear", "hard"):
        v = self_paced_weights(losses + 1e-9, pace, cost=cost, weighting=weighting)
        value = cost * v * losses + self_paced_penalty(v, pace, weighting=weighting)
        others = cost * grid[:, None] * losses + self_paced_penalty(
            grid[:, None].expand(-1, 8), pace, weighting=weighting
        )
        assert (value <= others.min(dim=0).values + 1e-6).all()
        if weighting == "linear":
            torch.testing.assert_close(self_paced_implicit_loss(losses, pace, cost=cost), value, rtol=1e-5, atol=1e-7)


def test_implicit_loss_is_bounded_rising_and_concave():
    """Check 4: fails if it is not constant beyond the pace, where robustness comes from."""
    losses = torch.linspace(0, 3, 301, dtype=torch.float64)
    implicit = self_paced_implicit_loss(losses, 0.9)
    steps = implicit.diff()
    assert (steps >= 0).all()
    assert (steps.diff() <= 1e-12).all()
    assert implicit[0] == pytest.approx(-0.45)
    assert (implicit[losses >= 0.9] == 0).all()


@given(seed=seeds)
@settings(max_examples=40)
def test_labels_by_brute_force(seed):
    """Check 5: all m + 1 admissible label vectors are tried. Fails for argmax of scores regardless of the weights."""
    scores, weights = 1.5 * random(seed, 6, 4), random(seed + 1, 6, 4).abs().clamp(max=1)
    labels = one_vs_rest_labels(scores, weights)
    assert ((labels > 0).sum(dim=1) <= 1).all()
    candidates = [-torch.ones(4, dtype=torch.float64)] + [
        2.0 * torch.eye(4, dtype=torch.float64)[c] - 1 for c in range(4)
    ]
    values = torch.stack([(weights * one_vs_rest_hinge(scores, c.expand(6, 4))).sum(dim=1) for c in candidates])
    ours = (weights * one_vs_rest_hinge(scores, labels)).sum(dim=1)
    torch.testing.assert_close(ours, values.min(dim=0).values)


TRUTH = torch.arange(30) % 3
FEATURES = torch.eye(3, dtype=torch.float64)[TRUTH] + 0.3 * random(5, 30, 3)


def ridge(labels, weights):
    x = torch.cat([FEATURES[: len(labels)], torch.ones(len(labels), 1, dtype=torch.float64)], dim=1)
    eye = 0.1 * torch.eye(4, dtype=torch.float64)
    pairs = zip(labels.T, weights.T, strict=True)
    return torch.stack([x @ torch.linalg.solve(x.T @ (w[:, None] * x) + eye, x.T @ (w * y)) for y, w in pairs], dim=1)


def oracle(samples):
    return TRUTH[list(samples)].tolist()


def learner(**changes):
    return ActiveSelfPaced(30, {0: 0, 1: 1, 2: 2}, **{"num_classes": 3, "pace": 0.9, "budget": 2, **changes})


def test_limits_of_the_pace():
    """Check 3: a huge pace is self-training on everything, a tiny one leaves certified samples alone."""
    scores = 0.1 * random(0, 30, 3)
    _, weights = learner(pace=1e9, no_class_weight=True).assign(scores)
    assert weights.min() > 1 - 1e-6
    small = learner(pace=1e-9)
    with pytest.warns(UserWarning, match="raise the pace"):
        _, weights = small.assign(scores)
    assert torch.equal(weights.bool().any(dim=1), small.certified)


def test_certified_samples_keep_label_and_weight():
    """Check 7: fails when the label or weight step touches them, however wrong the scores are."""
    chosen = learner()
    labels, weights = chosen.assign(-50.0 * torch.eye(3, dtype=torch.float64).repeat(10, 1))
    assert torch.equal(weights[:3], torch.ones(3, 3, dtype=torch.float64))
    assert torch.equal(labels[:3], 2 * torch.eye(3, dtype=torch.float64) - 1)


def test_objective_never_rises():
    """Check 6: label step, then weight step, with certified samples fixed, in float64."""
    scores = random(3, 30, 3)
    chosen = learner(no_class_weight=True)
    free = ~chosen.certified
    chosen.weights[free] = 1.0
    before = chosen.objective(scores)
    chosen.labels[free] = one_vs_rest_labels(scores[free], chosen.weights[free])
    after_labels = chosen.objective(scores)
    chosen.weights[free] = self_paced_weights(one_vs_rest_hinge(scores[free], chosen.labels[free]), chosen.pace)
    after_weights = chosen.objective(scores)
    assert after_labels <= before + 1e-12
    assert after_weights <= after_labels + 1e-12
    assert after_weights < before


@pytest.mark.parametrize("order", list(itertools.permutations(range(3)))[1:3])
def test_renamed_classes_rename_everything(order):
    """Check 8: fails for any dependence on the number of a class."""
    scores = random(7, 30, 3)
    labels, weights = learner().assign(scores)
    renamed = ActiveSelfPaced(30, {i: order.index(i) for i in range(3)}, num_classes=3, pace=0.9)
    other_labels, other_weights = renamed.assign(scores[:, list(order)])
    assert torch.equal(other_labels, labels[:, list(order)])
    torch.testing.assert_close(other_weights, weights[:, list(order)])


def test_pace_rises_with_accuracy_and_stops():
    """Check 9: eta 0 leaves lambda as it is, and after tau rounds it is constant."""
    chosen = learner(pace_rounds=1, pace_step=0.1)
    chosen.step_pace([0.0, 0.5, 1.0])
    torch.testing.assert_close(chosen.pace, torch.tensor([0.9, 0.95, 1.0], dtype=torch.float64))
    chosen.round = 1
    chosen.step_pace([1.0, 1.0, 1.0])
    torch.testing.assert_close(chosen.pace, torch.tensor([0.9, 0.95, 1.0], dtype=torch.float64))


def test_queries():
    """The smallest gap is asked first, only uncertified samples, and disagreement ranks before ambiguity."""
    scores = torch.tensor([[2.0, -1.0], [0.4, 0.3], [0.9, 0.2], [-0.1, -0.9]], dtype=torch.float64)
    assert ambiguity(scores).argsort(descending=True).tolist() == [1, 2, 3, 0]
    assert disagreement(scores).argsort(descending=True).tolist() == [1, 2, 3, 0]
    chosen = ActiveSelfPaced(4, {0: 0, 1: 1}, num_classes=2, budget=1)
    assert chosen.ask(scores) == [2]


def test_lowest_best_score_asks_what_no_class_wants():
    """The released query. Fails for the lowest *mean* score, and when what has a pseudo-label is asked about."""
    scores = torch.tensor([[2.0, -1.0], [-1.0, 2.0], [0.3, 0.3], [0.6, -9.0], [0.95, -1.0]], dtype=torch.float64)
    assert lowest_best_score(scores).argsort(descending=True).tolist() == [2, 3, 4, 0, 1]
    by_score = learner_of(scores, query="lowest_best_score", accept="unique", budget=1, pace=0.1)
    by_score.assign(scores)
    assert by_score.ask(scores) == [2]
    known = learner_of(scores, query="lowest_best_score", accept="unique", budget=3, pace=0.5)
    known.assign(scores)
    assert known.pseudo_labels() == {3: 0, 4: 0}
    with pytest.warns(UserWarning, match="larger than the 1 samples"):
        assert known.ask(scores) == [2]
    with pytest.raises(ValueError, match="ambiguity, disagreement, lowest_best_score"):
        learner(query="entropy")


def learner_of(scores, **changes):
    return ActiveSelfPaced(len(scores), {0: 0, 1: 1}, num_classes=2, **changes)


def test_a_label_only_where_one_class_alone_accepts():
    """The released acceptance. Fails where several may accept, for <= instead of <, or when C or the square is lost."""
    scores = torch.tensor([[0.9, -2.0], [0.9, 0.8], [0.5, -2.0], [-0.2, -2.0]], dtype=torch.float64)
    assert unique_labels(scores, 0.5).tolist() == [[1, -1], [-1, -1], [-1, -1], [-1, -1]]
    assert unique_labels(scores, torch.tensor([0.5, 0.1])).tolist() == [[1, -1], [1, -1], [-1, -1], [-1, -1]]
    assert unique_labels(scores, 0.5, cost=0.9)[2].tolist() == [1, -1]
    assert unique_labels(scores, 0.5, squared=True)[2].tolist() == [1, -1]


def test_what_is_accepted_weighs_the_same_in_every_classifier():
    """As a negative of the others, too. Fails when the weights of argmin are kept: the -0.9 would leave class 1."""
    scores = torch.tensor([[1.0, -1.0], [-1.0, 1.0], [0.8, 0.1], [0.9, 0.7], [0.2, -1.0]], dtype=torch.float64)
    for weighting, expected in (("linear", 0.5), ("hard", 1.0)):
        chosen = learner_of(scores, accept="unique", weighting=weighting, pace=0.4)
        labels, weights = chosen.assign(scores)
        assert labels[2].tolist() == [1, -1]
        assert weights[2].tolist() == pytest.approx([expected] * 2)
        assert weights[3:].tolist() == [[0, 0], [0, 0]]
    _, by_argmin = learner_of(scores, pace=0.4).assign(scores)
    assert by_argmin[2].tolist() == pytest.approx([0.5, 0])
    with pytest.raises(ValueError, match="no_class_weight"):
        learner(accept="unique", no_class_weight=True)


def test_squared_hinge():
    """Fails when the square reaches the loss but not labels, weights or objective."""
    scores, labels = torch.tensor([[0.5, -3.0]], dtype=torch.float64), torch.tensor([[1, -1]])
    assert one_vs_rest_hinge(scores, labels, squared=True).tolist() == [[0.25, 0]]
    near_and_far = torch.tensor([[0.2, 2.0]], dtype=torch.float64), torch.tensor([[1.0, 0.1]], dtype=torch.float64)
    assert one_vs_rest_labels(*near_and_far).tolist() == [[1, -1]]  # -0.4 and -0.3
    assert one_vs_rest_labels(*near_and_far, squared=True).tolist() == [[-1, 1]]  # -0.8 and -0.9
    pool = torch.tensor([[9.0, -9.0], [-9.0, 9.0], [0.5, -9.0]], dtype=torch.float64)
    plain, squared = (learner_of(pool, pace=1.0, squared=squared) for squared in (False, True))
    assert plain.assign(pool)[1][2, 0] == 0.5
    assert squared.assign(pool)[1][2, 0] == 0.75
    assert squared.objective(pool) == pytest.approx(0.75 * 0.25 + (0.75**2 / 2 - 0.75) - 5 * 0.5)


def test_pace_stops_at_its_cap():
    """Fails when the cap is not applied, or to the first class alone; a cap below the start is refused."""
    chosen = learner(pace=[0.8, 0.5, 0.2], pace_step=0.3, max_pace=0.9)
    chosen.step_pace([1.0, 1.0, 1.0])
    torch.testing.assert_close(chosen.pace, torch.tensor([0.9, 0.8, 0.5], dtype=torch.float64))
    chosen.step_pace([1.0, 1.0, 1.0])
    torch.testing.assert_close(chosen.pace, torch.tensor([0.9, 0.9, 0.8], dtype=torch.float64))
    with pytest.raises(ValueError, match="at least the pace"):
        learner(pace=0.9, max_pace=0.5)


def test_doubtful():
    """Another class is best, none is positive, two are. Fails for either half of the rule alone."""
    scores = torch.tensor([[1.0, -1], [-1, 1], [-0.1, -1], [1, 0.5]])
    assert doubtful(scores, torch.tensor([[1, -1]]).expand(4, 2)).tolist() == [False, True, True, True]


def test_certified_samples_with_too_many_strikes_are_set_aside(tmp_path):
    """More than so many rounds of doubt, not as many; for good, saved too; the last of a class stays.

    Fails for >=, when doubts are counted of uncertified samples, and when the weight comes back in the next round.
    """
    scores = 2.0 * torch.eye(3, dtype=torch.float64)[TRUTH] - 1
    scores[[1, 3]] = torch.tensor([-1.0, -1.0, 1.0], dtype=torch.float64)  # 3 is of class 0, 1 the only one of its own
    scores[4] = -1.0  # no class wants it, but nobody has certified it
    chosen = ActiveSelfPaced(30, {0: 0, 3: 0, 1: 1, 2: 2}, num_classes=3, budget=0, strikes=1, pace=0.9)
    assert chosen.run_round(lambda labels, weights: scores).set_aside == ()
    chosen.save(tmp_path / "labels")
    resumed = learner(strikes=1, budget=0).restore(tmp_path / "labels")
    assert resumed.run_round(lambda labels, weights: scores).set_aside == (3,)
    assert resumed.run_round(lambda labels, weights: scores).set_aside == ()
    assert resumed.doubts.tolist() == [0, 3, 0, 3] + 26 * [0]
    assert resumed.weights[3].tolist() == [0, 0, 0]
    assert resumed.weights[1].tolist() == [1, 1, 1]
    assert resumed.certified[3]
    assert (resumed.trail[-1].origin, resumed.trail[-1].sample) == ("set aside", 3)
    resumed.correct(3, 2)
    assert resumed.weights[3].tolist() == [1, 1, 1]
    assert resumed.doubts[3] == 0
    assert learner(budget=0).run_round(lambda labels, weights: scores).set_aside == ()


def test_rounds_learn_and_leave_a_trail():
    """It bites: labels are found, the trail tells where each came from, and adds up with the state."""
    chosen = learner()
    for _ in range(4):
        report = chosen.run_round(ridge, oracle=oracle)
    assert report.certified == 3 + 4 * 2
    assert report.pseudo > 10
    known = chosen.classes()
    assert (known[known >= 0] == TRUTH[known >= 0]).float().mean() > 0.9
    origins = [event.origin for event in chosen.trail]
    assert origins.count("initial") == 3
    assert origins.count("oracle") == 8
    last = {event.sample: event for event in chosen.trail}
    for sample, label in chosen.pseudo_labels().items():
        assert (last[sample].origin, last[sample].label) == ("pseudo", label)


def test_pseudo_labels_can_be_withdrawn_and_certified_ones_not():
    """Fails when pseudo-labels are remembered: scores that turn round take them away, with an entry in the trail."""
    chosen = learner(inner=1, budget=0)
    good = 2.0 * torch.eye(3, dtype=torch.float64)[TRUTH] - 1
    assert chosen.run_round(lambda labels, weights: good).pseudo == 27
    report = chosen.run_round(lambda labels, weights: -torch.ones(30, 3, dtype=torch.float64))
    assert (report.pseudo, report.withdrawn, report.certified) == (0, 27, 3)
    assert sum(event.origin == "withdrawn" for event in chosen.trail) == 27


def test_new_class_grows_everything():
    """The annotator names class 3: a column, its pace and negatives appear; without leave it is refused."""
    chosen = learner(new_classes=True)
    chosen.certify([5], [3])
    assert chosen.labels.shape == chosen.weights.shape == (30, 4)
    assert chosen.labels[5].tolist() == [-1, -1, -1, 1]
    assert chosen.pace.shape == (4,)
    assert chosen.weights[:, 3].nonzero().flatten().tolist() == [0, 1, 2, 5]
    chosen.run_round(ridge, oracle=oracle)
    with pytest.raises(ValueError, match="new_classes"):
        learner().certify([5], [3])


def test_correcting_a_certified_label():
    chosen = learner()
    chosen.correct(0, 2)
    assert int(chosen.classes()[0]) == 2
    assert chosen.trail[-1].origin == "corrected"
    with pytest.raises(ValueError, match="not certified"):
        chosen.correct(9, 1)


def test_saved_between_rounds_and_resumed(tmp_path):
    """Two rounds, saved, restored in a fresh object, two more: everything equals four rounds in one go."""
    whole, first = learner(), learner()
    for _ in range(4):
        whole.run_round(ridge, oracle=oracle)
    for _ in range(2):
        first.run_round(ridge, oracle=oracle)
        first.save(tmp_path / "labels")
    resumed = learner().restore(tmp_path / "labels")
    for _ in range(2):
        resumed.run_round(ridge, oracle=oracle)
    for name in ("labels", "weights", "pace", "certified"):
        assert torch.equal(getattr(whole, name), getattr(resumed, name))
    assert whole.trail == resumed.trail
    resumed.write_trail(tmp_path / "trail.csv")
    rows = list(csv.DictReader((tmp_path / "trail.csv").open()))
    assert [int(row["sample"]) for row in rows] == [event.sample for event in whole.trail]
    with pytest.raises(ValueError, match="30 samples"):
        ActiveSelfPaced(5, {0: 0, 1: 1}, num_classes=2).restore(tmp_path / "labels")


def test_csv_oracle_waits_for_a_person(tmp_path):
    """A round whose questions are open changes nothing; with answers it goes on, and nothing is asked twice."""
    path = tmp_path / "questions.csv"
    chosen = learner()
    with pytest.raises(AnswersPending, match=r"2 of 2.*questions\.csv"):
        chosen.run_round(ridge, oracle=CSVOracle(path))
    assert chosen.round == 0
    assert int(chosen.certified.sum()) == 3
    asked = [int(row["sample"]) for row in csv.DictReader(path.open())]
    path.write_text("sample,label\n" + "\n".join(f"{sample},{int(TRUTH[sample])}" for sample in asked))
    report = chosen.run_round(ridge, oracle=CSVOracle(path))
    assert list(report.asked) == asked
    with pytest.raises(AnswersPending):
        chosen.run_round(ridge, oracle=CSVOracle(path))
    assert len(path.read_text().splitlines()) == 1 + 2 + 2
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="columns"):
        CSVOracle(path)([1])
    path.write_text("sample,label\n4,bird\n")
    with pytest.raises(ValueError, match="bird"):
        CSVOracle(path, classes=["cat", "dog"])([4])


def test_prompt_asks_again_and_notices_the_end():
    out = io.StringIO()
    ask = PromptOracle(lambda i: f"image {i}.png", ["cat", "dog"], stdin=io.StringIO("x\n-1\n1\ncat\n"), stdout=out)
    assert ask([4, 9]) == [1, 0]
    assert out.getvalue().count("image 4.png") == 3
    with pytest.raises(AnswersPending, match="0 of 1"):
        PromptOracle(str, ["cat"], stdin=io.StringIO(""), stdout=out)([1])
