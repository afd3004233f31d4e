"""The curriculum against the sheet's ten checks, a second derivation, limits, and what it is for.

The official vectors are in the contract suite. Mutations tried and seen: weights that start at 1, i/m one epoch late,
maximum over the negatives, no flip for documents that are not relevant, 1 - D also after the flip, the mean divided by
the sum of the weights, the forms exchanged, difficulty read at another sample's row.
"""

import json
import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from regularized.curriculum.ranking_curriculum.first_stage import FirstStageDifficulty, FirstStageRun
from regularized.curriculum.ranking_curriculum.loss import (
    DifficultyWeightedLoss,
    RankingCurriculum,
    curriculum_weights,
    pairwise_difficulty,
    pointwise_difficulty,
)
from regularized.curriculum.ranking_curriculum.reranker_losses import pairwise_softmax_loss
from regularized.curriculum.ranking_curriculum.term import DifficultyWeighted
from regularized.evidence.conformance import Case, UnknownCase
from regularized.evidence.experiment import Unavailable, resolve, run_arm
from regularized.evidence.models import mlp, seeded
from regularized.mechanisms.sample_weights import WeightedSampler
from regularized.papers.ranking_curriculum import conformance, experiment
from regularized.training.data import TensorData
from regularized.training.progress import Progress
from regularized.training.step import Batch, Step
from regularized.training.terms import Loss
from regularized.training.trainer import Trainer

UNIT = st.floats(0, 1)
MSE = nn.MSELoss(reduction="none")


def tensor(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def at(epoch: float, end: float = 20, **kwargs) -> RankingCurriculum:
    curriculum = RankingCurriculum(end, **kwargs)
    curriculum.set_epoch(epoch)
    return curriculum


@st.composite
def batches(draw):
    b, k = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    easy = draw(st.lists(st.lists(UNIT, min_size=k + 1, max_size=k + 1), min_size=b, max_size=b))
    scores = draw(st.lists(st.lists(st.floats(-5, 5), min_size=k + 1, max_size=k + 1), min_size=b, max_size=b))
    return easy, scores, draw(st.integers(0, 12)), draw(st.integers(0, 12)), draw(st.booleans())


@given(batches())
def test_second_derivation(batch):
    """Fails on any changed term: difficulty, weight, both forms, entry by entry in plain Python."""
    easy, scores, epoch, end, anti = batch
    weights, losses = [], []
    for row, s in zip(easy, scores):
        d = min((row[0] - other + 1) / 2 for other in row[1:])
        # The code turns round after the minimum.
        d = 1 - d if anti else d
        weights.append(d * (1 - epoch / end) + epoch / end if epoch < end else 1.0)
        losses.append(1 - math.exp(s[0]) / sum(map(math.exp, s)))
    b = len(easy)
    expected = {
        "per_sample": sum(w * loss for w, loss in zip(weights, losses)) / b,
        "batch_mean": sum(weights) / b * sum(losses) / b,
    }
    column, z = tensor(easy), tensor(scores)
    curriculum = at(epoch, end, anti=anti)
    assert curriculum.pairwise(column[:, 0], column[:, 1:]).tolist() == pytest.approx(weights, abs=1e-12)
    difficulty = pairwise_difficulty(column[:, 0], column[:, 1:], anti=anti)
    for form, value in expected.items():
        loss = DifficultyWeightedLoss(pairwise_softmax_loss, curriculum, aggregate=form)(z[:, 0], z[:, 1:], difficulty)
        assert loss.item() == pytest.approx(value, abs=1e-12)


@given(st.lists(UNIT, min_size=1, max_size=6), st.lists(st.sampled_from([-999, 0, 1, 3]), min_size=6, max_size=6))
def test_pointwise_by_hand(easy, labels):
    """Fails when unjudged or graded labels are taken for the other kind, or `anti` acts after the flip as well."""
    labels = labels[: len(easy)]
    plain = pointwise_difficulty(tensor(easy), torch.tensor(labels)).tolist()
    anti = pointwise_difficulty(tensor(easy), torch.tensor(labels), anti=True).tolist()
    expected = [e if label > 0 else 1 - e for e, label in zip(easy, labels)]
    assert plain == pytest.approx(expected, abs=1e-15)
    assert anti == pytest.approx([1 - d for d in expected], abs=1e-15)


# -- the sheet's checks, by number --------------------------------------------------------------


@pytest.mark.parametrize(("epoch", "end"), [(20, 20), (21, 20), (1000, 20), (0, 0), (3, 0)])
@pytest.mark.parametrize("form", ["per_sample", "batch_mean"])
def test_1_after_the_end_nothing_is_left(epoch, end, form):
    """Fails when a weight after the end, or with m = 0, is not exactly 1."""
    z, y, difficulty = torch.randn(9), torch.randn(9), torch.rand(9)
    curriculum = at(epoch, end, smoothing=1e-8)
    assert torch.equal(curriculum(difficulty), torch.ones(9))
    assert torch.equal(DifficultyWeightedLoss(MSE, curriculum, aggregate=form)(z, y, difficulty), MSE(z, y).mean())


@given(st.lists(UNIT, min_size=1, max_size=5), st.integers(0, 30))
def test_2_limits_of_the_difficulty(easy, epoch):
    """Fails when the first epoch's weights are not exactly D, or when D = 1 is not exactly no weight in some epoch."""
    assert at(0)(tensor(easy)).tolist() == easy
    assert at(epoch)(torch.ones(3)).tolist() == [1.0] * 3
    assert at(epoch, math.inf)(tensor(easy)).tolist() == easy


def test_3_corners():
    """Fails when top and bottom of the list are exchanged for relevant or other documents."""
    run = FirstStageRun.from_scores({"q": {str(i): -float(i) for i in range(50)}})
    for heuristic in ("reciprank", "normscore"):
        easy = FirstStageDifficulty(heuristic)(run)
        top, last = tensor([easy["q", "0"]]), tensor([easy["q", "49"]])
        assert pointwise_difficulty(top, torch.tensor([1])).item() == 1.0
        assert pointwise_difficulty(top, torch.tensor([0])).item() == 0.0
        assert pairwise_difficulty(top, last).item() >= 0.99
        assert pairwise_difficulty(last, top).item() <= 0.011
        assert pairwise_difficulty(last, last).item() == 0.5


@given(UNIT, UNIT, st.floats(0, 1), st.floats(0, 1))
def test_4_linear_and_bounded(d, other, p, q):
    """Fails when the weight is not linear in progress and in D, leaves [0, 1], or falls."""

    def w(value, progress):
        return curriculum_weights(tensor([value]), progress).item()

    assert 0 <= w(d, p) <= 1
    assert w(d, (p + q) / 2) == pytest.approx((w(d, p) + w(d, q)) / 2, abs=1e-12)
    assert w((d + other) / 2, p) == pytest.approx((w(d, p) + w(other, p)) / 2, abs=1e-12)
    assert w(d, min(p, q)) <= w(d, max(p, q)) + 1e-15


@given(UNIT, UNIT)
def test_5_antisymmetry(a, b):
    """Fails when exchanging the documents does not turn the difficulty round."""
    forth, back = pairwise_difficulty(tensor([a]), tensor([b])), pairwise_difficulty(tensor([b]), tensor([a]))
    assert (forth + back).item() == pytest.approx(1.0, abs=1e-15)


# 6 and 7 (the heuristics) are in test_first_stage.py.


@given(UNIT, st.lists(UNIT, min_size=1, max_size=3))
def test_8_reversed(a, others):
    """Fails when the reversed curriculum does not start at 1 - D."""
    easy = tensor([a]), tensor([others])
    assert at(0, anti=True).pairwise(*easy).item() == pytest.approx(1 - at(0).pairwise(*easy).item(), abs=1e-15)


def test_9_forms_agree_on_equal_difficulty():
    """Fails when the forms differ by more than how the weights are spread; with unequal ones they must differ."""
    z, y = tensor([1.0, 2.0, 5.0]), tensor([0.0, 0.0, 1.0])
    sample, batch = (DifficultyWeightedLoss(MSE, at(4), aggregate=form) for form in ("per_sample", "batch_mean"))
    equal, spread = tensor([0.3, 0.3, 0.3]), tensor([0.0, 0.3, 0.6])
    assert sample(z, y, equal).item() == pytest.approx(batch(z, y, equal).item(), rel=1e-14)
    assert batch(z, y, spread).item() == pytest.approx(batch(z, y, equal).item(), rel=1e-14)
    assert abs(sample(z, y, spread).item() - batch(z, y, spread).item()) > 0.1


def test_10_gradients():
    """Fails when a sample's gradient is not W_b (or the mean of W) times its own, or flows into the difficulty."""
    z, y = torch.randn(6, dtype=torch.float64, requires_grad=True), torch.randn(6, dtype=torch.float64)
    difficulty = torch.rand(6, dtype=torch.float64)
    (plain,) = torch.autograd.grad(MSE(z, y).mean(), z)
    for form in ("per_sample", "batch_mean"):
        curriculum = at(7)
        weights = curriculum(difficulty)
        loss = DifficultyWeightedLoss(MSE, curriculum, aggregate=form)(z, y, difficulty)
        (gradient,) = torch.autograd.grad(loss, z)
        factor = weights if form == "per_sample" else weights.mean()
        torch.testing.assert_close(gradient, factor * plain, rtol=1e-12, atol=1e-14)


# -- settings and state -------------------------------------------------------------------------


def test_several_negatives_take_the_hardest():
    """Fails when mean or maximum over the negatives is taken, or their order matters."""
    positive = tensor([0.5])
    for others in ([0.1, 0.9, 0.4], [0.9, 0.4, 0.1]):
        assert pairwise_difficulty(positive, tensor([others])).item() == pytest.approx(0.3)


def test_clip_on_request_only():
    """Fails when values outside are clipped unasked, or are not clipped when asked."""
    beyond = tensor([1.2, -0.1]), tensor([0.5, 0.5])
    with pytest.raises(ValueError, match="clip=True"):
        at(0).pairwise(*beyond)
    assert at(0, clip=True).pairwise(*beyond).tolist() == [0.75, 0.25]
    assert at(0, clip=True).pointwise(beyond[0], torch.tensor([0, 0])).tolist() == [0.0, 1.0]


def test_fractions_of_epochs():
    """Fails when the weights can only change at whole epochs, though steps may be told."""
    assert at(2.5, 10)(tensor([0.0])).item() == 0.25


def test_evaluation_is_plain_and_needs_no_epoch():
    """Fails when a validation loss is weighted, or asks for the epoch."""
    criterion = DifficultyWeightedLoss(MSE, RankingCurriculum()).eval()
    assert criterion(torch.ones(3), torch.zeros(3), torch.zeros(3)).item() == 1.0


def test_state_is_the_epoch():
    """Fails when a resumed run starts the curriculum again, or an untold epoch is remembered as told."""
    criterion = DifficultyWeightedLoss(MSE, at(7))
    fresh = DifficultyWeightedLoss(MSE, RankingCurriculum())
    fresh.load_state_dict(criterion.state_dict())
    assert fresh.curriculum.progress == 7 / 20
    untold = RankingCurriculum()
    untold.load_state_dict(RankingCurriculum().state_dict())
    with pytest.raises(RuntimeError, match="set_epoch"):
        _ = untold.progress


def test_weight_table_for_a_sampler():
    """Fails when the weights of an epoch cannot be a sampler's: easy samples are drawn more often, later all alike."""
    curriculum, difficulty = RankingCurriculum(4), torch.tensor([0.1, 0.9])

    def weights(epoch):
        curriculum.set_epoch(epoch)
        return curriculum(difficulty)

    sampler = WeightedSampler(weights, num_samples=4000)
    shares = []
    for epoch in (0, 4):
        sampler.set_epoch(epoch)
        shares.append(sum(sampler) / 4000)
    assert shares[0] == pytest.approx(0.9, abs=0.03)
    assert shares[1] == pytest.approx(0.5, abs=0.05)


# -- the term -----------------------------------------------------------------------------------


def test_term_is_the_loss_in_the_loop():
    """Fails when the term reads another sample's difficulty, or counts epochs otherwise than the plain loss."""
    generator = torch.Generator().manual_seed(0)
    x, y, difficulty = torch.randn(32, 4), torch.randn(32), torch.rand(32, generator=generator)
    net = seeded(0, partial(mlp, [4, 8, 1]))
    by_hand = seeded(0, partial(mlp, [4, 8, 1]))

    def loss(z, targets):
        return (z.squeeze(-1) - targets).square()

    sgd = partial(torch.optim.SGD, lr=0.05)
    data = TensorData(x, y, batch_size=8, seed=1)
    term = DifficultyWeighted(loss, difficulty, end_epoch=3)
    Trainer(net, terms={"task": term}, optimizer=sgd).fit(data, epochs=5)

    criterion, optimizer = DifficultyWeightedLoss(loss, RankingCurriculum(3)), sgd(by_hand.parameters())
    for epoch in range(5):
        criterion.curriculum.set_epoch(epoch)
        for batch in data.batches(epoch):
            optimizer.zero_grad()
            criterion(by_hand(batch.inputs), batch.targets, difficulty[batch.index]).backward()
            optimizer.step()
    for ours, theirs in zip(net.parameters(), by_hand.parameters()):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_term_without_targets_and_in_evaluation():
    """Fails when pairs need made-up targets, or evaluation needs an index."""
    term = DifficultyWeighted(lambda z, _: pairwise_softmax_loss(z[:, 0], z[:, 1]), torch.zeros(4))
    inputs = torch.zeros(4, 2)
    train = Step(nn.Identity(), Batch(inputs, index=torch.arange(4)), Progress(0, 1))
    assert term(train).item() == 0.0
    assert term.eval()(Step(nn.Identity(), Batch(inputs), Progress(0, 1))).item() == 2.0


def test_difficulty_is_data_not_state():
    """Fails when a table of millions of pairs goes into every checkpoint, or a caller's tensor is shared."""
    given = torch.zeros(5)
    term = DifficultyWeighted(MSE, given)
    given.fill_(1.0)
    assert term.difficulty.tolist() == [0.0] * 5
    assert not term.state_dict()


def test_half_precision_losses_keep_exact_weights():
    """Fails when weights are rounded to bfloat16, where small steps of the curriculum are lost."""
    term = DifficultyWeighted(lambda z, y: z, torch.full((2,), 0.001), end_epoch=1000)
    step = Step(nn.Identity(), Batch(torch.ones(2, dtype=torch.bfloat16), index=torch.arange(2)), Progress(0, 1))
    assert term(step).item() == pytest.approx(0.002, rel=1e-6)


# -- what it is for -----------------------------------------------------------------------------


def test_it_bites():
    """Fails when the order does not act: in the first epochs false negatives at high ranks pull less than true ones.

    A linear ranker with one useful feature; the first stage sees it, half of the relevant documents are unjudged. With
    the curriculum its first-epoch gradient points further towards the feature than without, and reversed less far.
    """
    generator = torch.Generator().manual_seed(0)
    relevant = torch.rand(4000, generator=generator) < 0.5
    feature = relevant + 0.3 * torch.randn(4000, generator=generator)
    judged = relevant & (torch.rand(4000, generator=generator) < 0.5)
    easiness = (feature - feature.min()) / (feature.max() - feature.min())
    (positive,), (other,) = torch.where(judged), torch.where(~judged)
    other = other[torch.randint(len(other), positive.shape, generator=generator)]
    slopes = {}
    for name, curriculum in {"none": at(0, 0), "easy": at(0), "hard": at(0, anti=True)}.items():
        weight = torch.zeros((), requires_grad=True)
        difficulty = pairwise_difficulty(easiness[positive], easiness[other], anti=name == "hard")
        weights = curriculum(difficulty)
        losses = pairwise_softmax_loss(weight * feature[positive], weight * feature[other])
        ((weights * losses).sum() / weights.sum()).backward()
        slopes[name] = -weight.grad.item()
    assert slopes["easy"] > 1.1 * slopes["none"] > 1.1 * 1.1 * slopes["hard"]


# -- conformance and experiment -----------------------------------------------------------------


def test_unknown_cases_are_errors():
    """Fails when a case that nobody understands passes for something else."""
    import numpy as np

    scores = np.zeros((2, 2))
    common = {"epoch": np.array(0), "eoc_epoch": np.array(20), "curriculum": np.array("reciprank")}
    for inputs, hp in (
        ({"scores": scores}, {}),
        (
            {"scores": scores, "rank": np.ones((2, 2))},
            {**common, "mode": np.array("pairwise"), "lossfn": np.array("x")},
        ),
        ({"scores": scores}, {**common, "mode": np.array("pairwise"), "lossfn": np.array("softmax")}),
        (
            {"scores": scores, "rank": np.ones((2, 2))},
            {**common, "mode": np.array("pairwise"), "lossfn": np.array("softmax"), "aggregate": np.array("x")},
        ),
    ):
        with pytest.raises(UnknownCase):
            conformance.compute(Case("c", inputs, hp))


def test_official_end_of_the_curriculum():
    """Fails when m <= 0 does not mean weights forever for pairs, and no curriculum for documents, as in the code."""
    import numpy as np

    hp = {
        "epoch": np.array(5),
        "eoc_epoch": np.array(0),
        "curriculum": np.array("normscore"),
        "lossfn": np.array("mse"),
    }
    pair = Case(
        "p",
        {"scores": np.zeros((1, 2)), "normscore": np.array([[0.2, 0.8]])},
        {**hp, "mode": np.array("pairwise"), "lossfn": np.array("softmax")},
    )
    assert conformance.compute(pair)["loss"] == pytest.approx(0.5 * (0.2 + 1e-8), rel=1e-12)
    single = Case(
        "s",
        {"scores": np.array([2.0]), "normscore": np.array([0.2]), "relscore": np.array([1.0])},
        {**hp, "mode": np.array("pointwise")},
    )
    assert conformance.compute(single)["loss"] == 1.0


def test_arms_of_a_seed_differ_in_the_method_alone():
    """Fails when data, initialisation or the drawn pairs differ between arms."""
    runs = {
        arm: run_arm(experiment, arm, 3, "smoke", lr=0.0)
        for arm in ("no_curriculum", "curriculum", "reversed", "shuffled")
    }
    assert len({m.data for m in runs.values()}) == 1
    assert len({m.metrics["final_mrr"] for m in runs.values()}) == 1
    assert (
        run_arm(experiment, "no_curriculum", 4, "smoke", lr=0.0).metrics["final_mrr"]
        != runs["reversed"].metrics["final_mrr"]
    )


def test_training_labels_are_incomplete_and_test_labels_complete():
    """Fails when the experiment trains on complete labels, or is judged by incomplete ones."""
    digits = {"data": "digits", "queries": (60, 300, 300)}
    task = experiment.images(0, resolve(experiment, "curriculum", "laptop", digits))
    shares = [lists.positive.float().mean().item() for lists in (task.train, task.validation, task.test)]
    assert shares[0] == pytest.approx(shares[2] / 2, rel=0.2)
    assert shares[1] == pytest.approx(shares[2] / 2, rel=0.1)


def test_paper_scale_says_what_is_missing(tmp_path, monkeypatch):
    """Fails when a person who asks for the paper's scale is not told what to get."""
    monkeypatch.setenv("REGULARIZED_DATA", str(tmp_path))
    with pytest.raises(Unavailable, match=r"train\.bm25\.run.*bert-base-uncased.*ciir"):
        run_arm(experiment, "curriculum", 0, "paper")


def test_paper_scale_runs_on_a_tiny_collection(tmp_path, monkeypatch):
    """Fails when the paper's path breaks: files of ANTIQUE's form and a BERT of a few hundred weights, on the CPU."""
    transformers = pytest.importorskip("transformers")
    monkeypatch.setenv("REGULARIZED_DATA", str(tmp_path))
    folder, weights = tmp_path / "antique", tmp_path / "bert-base-uncased"
    folder.mkdir()
    weights.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]
    (weights / "vocab.txt").write_text("\n".join(words))
    tokenizer = transformers.BertTokenizerFast(vocab=str(weights / "vocab.txt"))
    tokenizer.save_pretrained(weights)
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    transformers.BertModel(config).save_pretrained(weights)
    (folder / "collection.tsv").write_text("".join(f"d{i}\t{'abcdefgh'[i]} a b\n" for i in range(8)))
    for split, count in (("train", 6), ("test", 3)):
        names = [f"{split}{q}" for q in range(count)]
        (folder / f"{split}.queries.tsv").write_text("".join(f"{name}\ta c e\n" for name in names))
        (folder / f"{split}.qrels").write_text(
            "".join(f"{name} U0 d{i} {1 + i % 4}\n" for name in names for i in range(6))
        )
        (folder / f"{split}.bm25.run").write_text(
            "".join(f"{name} Q0 d{i} {i + 1} {9.0 - i} bm25\n" for name in names for i in range(8))
        )
    settings = {"device": "cpu", "epochs": 2, "batches": 2, "batch": 3, "validation": 2, "early": 1}
    measured = run_arm(experiment, "curriculum", 0, "paper", **settings)
    json.dumps(dict(measured.metrics))
    assert measured.metrics["first_stage_mrr"] == pytest.approx(1 / 3)  # the first of grade 3 is third
    assert 0 < measured.metrics["stopped_mrr"] <= 1


def test_plain_loss_and_term_off_agree():
    """Fails when the term without a curriculum is not the plain loss bit for bit, the index included."""
    x, y = torch.randn(8, 3), torch.randn(8)
    step = Step(nn.Linear(3, 1), Batch(x, y, torch.arange(8)), Progress(0, 1))

    def loss(z, targets):
        return (z.squeeze(-1) - targets).abs()

    assert torch.equal(DifficultyWeighted(loss, torch.rand(8), end_epoch=0)(step), Loss(loss)(step))
