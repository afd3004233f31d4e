"""Self-regularisation. Golden vectors, contract and bad input are checked in tests/test_contract.py."""

import copy
import json
import warnings
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from regularized.evidence.conformance import UnknownCase, load_cases
from regularized.evidence.experiment import Unavailable, run_arm
from regularized.fine_tuning.sae_regularization.autoencoder import TopKSAE, normalized_error, usable_rows
from regularized.fine_tuning.sae_regularization.files import load_sae, load_sae_lens, save_sae
from regularized.fine_tuning.sae_regularization.judging import (
    Example,
    FeatureMask,
    Judgement,
    LanguageModelJudge,
    parse_answer,
    select_features,
    top_examples,
)
from regularized.fine_tuning.sae_regularization.penalty import FeatureRemoval, SelfReg, feature_penalty
from regularized.fine_tuning.sae_regularization.procedure import SAETraining, falling_k
from regularized.fine_tuning.sae_regularization.term import SelfRegularization
from regularized.mechanisms.sealed_files import save_sealed
from regularized.papers.sae_regularization import conformance, experiment
from regularized.training import CrossEntropy, TensorData, Trainer

D, C = 6, 20


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def autoencoder(k=4, *, untied=False, threshold=False, seed=0, dtype=torch.float64):
    return TopKSAE.from_tensors(
        random(C, D, seed=seed, dtype=dtype),
        encoder_bias=0.3 * random(C, seed=seed + 1, dtype=dtype),
        decoder=random(C, D, seed=seed + 2, dtype=dtype) if untied else None,
        decoder_bias=0.3 * random(D, seed=seed + 3, dtype=dtype),
        threshold=random(C, seed=seed + 4, dtype=dtype).abs() if threshold else None,
        k=k,
    )


def slow_loss(sae, x, k, dead=None, weight=0.1):
    """Written from the sheet, row by row and densely, with autograd all the way."""
    w, b_e, b_d = sae.encoder.T, sae.encoder_bias, sae.decoder_bias
    decoder = sae.encoder if sae.decoder is None else sae.decoder
    total = 0.0
    for row in x:
        pre = (row - b_d) @ w + b_e

        def decoded(allowed, rectified, pre=pre):
            order = [j for j in pre.argsort(descending=True).tolist() if allowed[j]][:k]
            mask = torch.zeros_like(pre)
            mask[order] = 1.0
            codes = pre * mask
            return (codes.relu() if rectified else codes) @ decoder + b_d

        def nmse(guess, true):
            return (guess - true).square().mean() / true.square().mean()

        if dead is None:
            total = total + nmse(decoded(torch.ones(len(pre)), True), row)
        else:
            first = decoded(~dead, False)
            total = total + nmse(first, row) + weight * nmse(decoded(dead, False), row - first.detach())
    return total / len(x)


@given(
    rows=st.integers(1, 5),
    k=st.integers(1, C),
    untied=st.booleans(),
    dead=st.integers(0, C - 1),
    seed=st.integers(0, 99),
)
@settings(max_examples=25)
def test_losses_are_those_of_a_slow_loop(rows, k, untied, dead, seed):
    """Second derivation of both losses and of every gradient, which ours computes from k rows only.

    Fails for a missing b_d in encoder or decoder, a relu in fine-tuning or none in pre-training, a residual that is not
    detached, a sum for a mean, dead and live exchanged, or live features that fill up a short list of dead ones.
    """
    sae = autoencoder(k, untied=untied, seed=seed).requires_grad_(True)
    x = random(rows, D, seed=seed + 9)
    mask = torch.randperm(C, generator=torch.Generator().manual_seed(seed)) < dead
    for ours, theirs in (
        (sae.loss(x), slow_loss(sae, x, k)),
        (sae.fine_tuning_loss(x, mask), slow_loss(sae, x, k, mask)),
    ):
        torch.testing.assert_close(ours, theirs)
        names, parameters = zip(*sae.named_parameters(), strict=True)
        expected = torch.autograd.grad(theirs, parameters, allow_unused=True)
        for name, a, b in zip(names, torch.autograd.grad(ours, parameters), expected, strict=True):
            torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")


class CountDenseGradients(TorchDispatchMode):
    """How many gradients of the size of the whole weight a backward pass makes for its chosen rows."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._embedding_bag_backward.default
        return func(*args, **(kwargs or {}))


def test_a_tied_weight_has_one_gradient():
    """Fails when encoder and decoder make a gradient each, as large as the weight, that are added up afterwards."""
    sae, x = autoencoder(4).requires_grad_(True), random(5, D)
    for loss, expected in ((sae.loss(x), 1), (sae.fine_tuning_loss(x, torch.arange(C) < 8), 2)):
        with CountDenseGradients() as counted:
            loss.backward()
        assert counted.count == expected


@pytest.mark.parametrize("relu", [True, False])
def test_gradient_by_the_embeddings(relu):
    """Fails when what flows back to the input (of a model that makes the embeddings) misses encoder or decoder."""
    sae = autoencoder(4)
    x = random(5, D).requires_grad_()
    dead = torch.arange(C) < 8
    ours, theirs = (
        (sae.loss(x), slow_loss(sae, x, 4)) if relu else (sae.fine_tuning_loss(x, dead), slow_loss(sae, x, 4, dead))
    )
    torch.testing.assert_close(*(torch.autograd.grad(loss, x)[0] for loss in (ours, theirs)))


def test_a_loss_of_nan_stays_one():
    """Fails when a NaN counts as not positive and so disappears: training would go on with it."""
    sae = autoencoder(4)
    sae.encoder_bias.data[3] = float("nan")
    assert torch.isnan(sae.loss(random(5, D)))


def test_official_adam_is_fused_and_the_same():
    """Fails when weights, two moments and the step are passes of their own again, or the update is another one."""
    start, x = TopKSAE(8, 24, k=2), clusters()
    fused = SAETraining(copy.deepcopy(start), k_steps=0)
    assert all(group["fused"] for group in fused.optimizer.param_groups)
    plain = SAETraining(
        copy.deepcopy(start), k_steps=0, optimizer=partial(torch.optim.Adam, lr=1e-3, eps=6.25e-10, fused=False)
    )
    assert torch.equal(fused.training_step(x), plain.training_step(x))
    for a, b in zip(fused.sae.parameters(), plain.sae.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_top_k_codes():
    """At most k non-zeros, those of torch.topk, no negative one; dense and sparse decoding agree."""
    sae, x = autoencoder(5), random(7, D)
    codes = sae.encode(x)
    assert ((codes != 0).sum(dim=1) <= 5).all()
    assert (codes >= 0).all()
    pre = sae.preactivations(x)
    values, index = pre.topk(5, dim=1)
    torch.testing.assert_close(codes, torch.zeros_like(pre).scatter(1, index, values.relu()))
    torch.testing.assert_close(sae.decode(codes), sae.decode(sae.top_codes(x)))
    torch.testing.assert_close(sae(x.reshape(7, 1, D)), sae(x)[:, None])
    torch.testing.assert_close(sae.encode(x.reshape(1, 7, D))[0], codes)


def test_normalized_error_at_its_ends():
    """0 for a perfect reconstruction, 1 for zeros, and finite for a row of zeros."""
    x = random(3, D)
    assert torch.equal(normalized_error(x, x), torch.zeros(3, dtype=x.dtype))
    torch.testing.assert_close(normalized_error(torch.zeros_like(x), x), torch.ones(3, dtype=x.dtype))
    assert torch.isfinite(normalized_error(x, torch.zeros_like(x))).all()
    torch.testing.assert_close(normalized_error(3 * x, 1.5 * x), normalized_error(2 * x, x))


def test_k_falls_linearly_and_stays():
    """The official values: int(200 - 180 (t + 1) / total), then 20; fails when it starts a step late or overshoots."""
    assert [falling_k(t, start=200, end=20, steps=8) for t in range(9)] == [177, 155, 132, 110, 87, 65, 42, 20, 20]
    assert falling_k(0, start=200, end=20, steps=0) == 20


def clusters(n=512, seed=0):
    """Sparse mixtures of twelve directions in eight dimensions."""
    generator = torch.Generator().manual_seed(seed)
    directions = F.normalize(torch.randn(12, 8, generator=generator), dim=1)
    codes = torch.rand(n, 12, generator=generator) * (torch.rand(n, 12, generator=generator) < 0.15)
    return codes @ directions + 0.02 * torch.randn(n, 8, generator=generator) + 0.1


def test_training_counts_and_lowers_the_error():
    """The schedule moves with the steps, every active code is counted, and the error falls below that of zeros."""
    torch.manual_seed(0)
    sae = TopKSAE(8, 24, k=2)
    adam = partial(torch.optim.Adam, lr=3e-3)
    training = SAETraining(sae, optimizer=adam, k_start=12, k_steps=40)
    assert training.k < 12
    x = clusters()
    records = training.fit(x, epochs=40, batch_size=64)
    assert records[-1]["k"] == 2
    assert records[0]["k"] > records[3]["k"] > 2
    assert records[-1]["loss"] < 0.3
    wide = SAETraining(TopKSAE(8, 24, k=2), k_start=12, k_steps=40)
    expected = wide.sae.loss(x, k=11).detach()
    assert wide.k == 11
    assert torch.equal(wide.training_step(x), expected)
    before = sae.fired.clone()
    codes = sae.encode(x)
    training.training_step(x)
    assert torch.equal(sae.fired - before, (codes > 0).sum(dim=0))


def test_fine_tuning_trains_dead_features_on_what_is_left():
    """It bites: dead features learn to reconstruct the residual of the live ones; with the weight 0 they stay put.

    Fails when the dead ones get no gradient (a relu in between), or the live ones move for them (no detach).
    """

    def trained(weight, steps):
        torch.manual_seed(1)
        sae = TopKSAE(8, 24, k=2)
        with torch.no_grad():
            sae.encoder_bias[:10] = -1.5
        x = clusters(256)
        dead = sae.never_active(x)
        start = sae.encoder.detach().clone()
        training = SAETraining(sae, optimizer=partial(torch.optim.Adam, lr=2e-3), k_steps=0, dead_weight=0.1)
        for _ in range(steps):
            training.training_step(x, dead=dead, dead_weight=weight)
        with torch.no_grad():
            rest = x - sae.decode(sae.top_preactivations(x, among=~dead))
            error = normalized_error(sae.decode(sae.top_preactivations(x, among=dead)), rest).mean()
        return error, (sae.encoder - start).abs().amax(dim=1).detach(), dead

    error, moved, dead = trained(0.1, 100)
    still, unmoved, _ = trained(0.0, 100)
    assert dead[:10].all()
    assert error < 0.5 * still
    assert (moved[dead] > 0.01).all()
    assert (unmoved[dead] == 0).all()
    # The live features move alike: what they leave over is a constant to the dead ones.
    one, other = trained(0.1, 1)[1], trained(0.0, 1)[1]
    torch.testing.assert_close(one[~dead], other[~dead], rtol=1e-2, atol=1e-4)


def test_fine_tuning_without_dead_features_is_the_first_loss_alone():
    """Fails when an empty dead set pulls b_d towards the residual; the number of dead features is reported."""
    torch.manual_seed(0)
    sae = TopKSAE(8, 24, k=2)
    x = torch.cat([clusters(100), -clusters(100)]) * 3
    assert not sae.never_active(x).any()
    first = normalized_error(sae.decode(sae.top_preactivations(x)), x).mean().item()
    assert sae.fine_tuning_loss(x, torch.zeros(24, dtype=torch.bool)).item() > first + 0.01
    records = SAETraining(sae, dead_weight=0.1).fit(x, epochs=1, batch_size=200)
    assert records[0]["dead"] == 0
    assert records[0]["loss"] == pytest.approx(first)


def test_not_finite_is_reported():
    sae = TopKSAE(8, 24, k=2)
    with torch.no_grad():
        sae.encoder.fill_(torch.inf)
    with pytest.raises(FloatingPointError, match="epoch 0"):
        SAETraining(sae).fit(clusters(64), epochs=1)
    with pytest.raises(ValueError, match="none of the 2 rows"):
        usable_rows(torch.full((2, 3), torch.nan))


@pytest.mark.parametrize("similarity", ["preactivation", "dot", "cosine"])
@pytest.mark.parametrize("untied", [False, True])
def test_penalty_and_its_gradient(similarity, untied):
    """Second derivation: the sheet's formula, and its closed gradient.

    Fails for a sum over S, a mean over C, encoder rows for "dot", or a bias left out of "preactivation".
    """
    sae, mask, w = autoencoder(untied=untied), torch.arange(C) % 3 == 0, random(2, D, seed=7).requires_grad_()
    penalty = SelfReg(sae, mask, strength=1.7, similarity=similarity)(w)
    chosen = sae.encoder[mask] if similarity == "preactivation" else sae.directions[mask]
    if similarity == "preactivation":
        scores = (w - sae.decoder_bias) @ chosen.T + sae.encoder_bias[mask]
    elif similarity == "dot":
        scores = w @ chosen.T
    else:
        scores = F.cosine_similarity(w[:, None], chosen[None], dim=2)
    torch.testing.assert_close(penalty, 1.7 * scores.abs().mean())
    (gradient,) = torch.autograd.grad(penalty, w)
    if similarity == "cosine":
        (expected,) = torch.autograd.grad(1.7 * scores.abs().mean(), w)
    else:
        expected = 1.7 * scores.sign() @ chosen / scores.numel()
    torch.testing.assert_close(gradient, expected)
    scaled = SelfReg(sae, mask, strength=1.7, similarity=similarity)(3 * w.detach())
    assert bool(torch.isclose(scaled, penalty.detach())) == (similarity == "cosine")


def test_orthogonal_weights_cost_nothing():
    """ "dot": w orthogonal to S gives exactly 0; and the pre-activation of zero weights does not (the code's quirk)."""
    sae = TopKSAE.from_tensors(torch.eye(4), encoder_bias=torch.full((4,), 0.5), decoder_bias=torch.ones(4))
    mask = torch.tensor([1, 1, 0, 0])
    w = torch.tensor([[0.0, 0.0, 2.0, -3.0]])
    assert SelfReg(sae, mask, similarity="dot")(w) == 0.0
    assert SelfReg(sae, mask, similarity="cosine")(w) == 0.0
    assert SelfReg(sae, mask)(torch.zeros(1, 4)) == 0.5


def test_strength_does_not_depend_on_the_number_of_features():
    """Mean and not sum: listing each direction twice changes nothing."""
    w, directions = random(3, D), random(5, D, seed=1)
    torch.testing.assert_close(feature_penalty(w, directions), feature_penalty(w, directions.repeat(2, 1)))


def test_nothing_to_remove_is_plain_training_bit_for_bit():
    """Empty S with beta > 0: penalty 0 and no nan (a mean of nothing); beta 0: the loss is BCE bit for bit."""
    sae, z, y = autoencoder(), random(5, D), torch.tensor([0.0, 1, 1, 0, 1], dtype=torch.float64)
    head = nn.Linear(D, 1).double()
    with pytest.warns(UserWarning, match="no feature is unintended"):
        empty = SelfReg(sae, torch.zeros(C), strength=3.0)
    bce = F.binary_cross_entropy_with_logits(head(z)[:, 0], y)
    assert torch.equal(F.binary_cross_entropy_with_logits(head(empty.clean(z))[:, 0], y) + empty(head.weight), bce)
    off = SelfReg(sae, torch.arange(C) < 3, strength=0.0)(head.weight)
    assert off == 0.0
    assert not off.requires_grad
    with pytest.warns(UserWarning, match="no feature is unintended"):
        cleaned = SelfReg(sae, torch.zeros(C), compat=True).clean(z)
    torch.testing.assert_close(cleaned, z - sae.decoder_bias)


def test_cleaning_takes_the_positive_codes_out():
    """All positive codes of S, not the top k: second derivation; with an untied decoder its rows are subtracted."""
    for changes in ({}, {"untied": True}, {"threshold": True, "k": None}):
        sae, mask, z = autoencoder(**changes), torch.arange(C) % 2 == 0, random(8, D)
        pre = (z - sae.decoder_bias) @ sae.encoder.T + sae.encoder_bias
        active = pre > (0 if sae.threshold is None else sae.threshold)
        expected = z - (pre.relu() * active * mask) @ sae.directions
        torch.testing.assert_close(FeatureRemoval(sae, mask)(z), expected)
        torch.testing.assert_close(FeatureRemoval(sae, mask, compat=True)(z), expected - sae.decoder_bias)


def test_orthonormal_features_are_silent_after_cleaning():
    """Exactly 0 for orthonormal directions; not promised, and not true, where directions overlap."""
    mask = torch.tensor([True, False, True, False])
    orthonormal = TopKSAE.from_tensors(torch.linalg.qr(random(4, 4))[0])
    z = random(6, 4, seed=3)
    clean = FeatureRemoval(orthonormal, mask)(z)
    assert orthonormal.preactivations(clean)[:, mask].max() < 1e-12
    torch.testing.assert_close(orthonormal.preactivations(clean)[:, ~mask], orthonormal.preactivations(z)[:, ~mask])
    overlapping = TopKSAE.from_tensors(torch.tensor([[2.0, 0.0], [-0.8, 0.6], [0.0, 1.0]]))
    removal = FeatureRemoval(overlapping, torch.tensor([True, True, False]))
    again = overlapping.preactivations(removal(torch.tensor([[1.0, 0.0]])))
    torch.testing.assert_close(again, torch.tensor([[-6.0, 2.4, 0.0]]))


def test_no_gradient_reaches_the_autoencoder():
    """Slices are copies: training the head leaves the autoencoder, and its later change leaves the regulariser."""
    sae = autoencoder(dtype=torch.float32)
    reg = SelfReg(sae, torch.arange(C) < 4)
    assert not list(reg.parameters())
    head = nn.Linear(D, 1)
    (reg(head.weight) + head(reg.clean(torch.randn(3, D))).sum()).backward()
    assert all(p.grad is None for p in sae.parameters())
    before = reg(head.weight).item()
    with torch.no_grad():
        sae.encoder.mul_(2)
    assert reg(head.weight).item() == before


def test_a_mask_for_each_class():
    """The published recipe for several classes: penalties of rows added, inputs cleaned with the intersection."""
    sae, z = autoencoder(), random(4, D)
    one, two = torch.arange(C) < 6, torch.arange(C) > 3
    w = random(3, D, seed=2)
    total = SelfReg(sae, one)(w[:1]) + SelfReg(sae, two)(w[1:2])
    scores = sae.preactivations(w).abs()
    torch.testing.assert_close(total, scores[0, one].mean() + scores[1, two].mean())
    assert FeatureRemoval(sae, one & two).activations(z).shape == (4, 2)


def shortcut(n, agree, seed):
    """A label carried weakly by the first number, and a shortcut that is strong in the last two."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(2, (n,), generator=generator)
    z = torch.where(torch.rand(n, generator=generator) < agree, y, 1 - y)
    x = 0.3 * torch.randn(n, 4, generator=generator)
    x[:, 0] += 0.5 * (2 * y - 1)
    x[:, 2] += 2.0 * z
    return x, y


def test_it_keeps_a_shortcut_out():
    """It bites: with the judged feature cleaned and penalised accuracy survives a reversed shortcut.

    Control: the mask of another feature, which does nothing; fails when mask and features are misaligned.
    """
    sae = TopKSAE.from_tensors(torch.cat([torch.eye(4), -torch.eye(4)]))
    train, test = shortcut(400, 0.97, 0), shortcut(400, 0.0, 1)

    def accuracy(feature, clean=True, weight=0.1):
        mask = torch.arange(8) == feature
        removal = FeatureRemoval(sae, mask) if clean else nn.Identity()
        torch.manual_seed(0)
        model = nn.Sequential(removal, nn.Linear(4, 2))
        term = SelfRegularization(sae, mask, layer="1", similarity="dot", weight=weight)
        terms = {"task": CrossEntropy(), "features": term}
        trainer = Trainer(model, terms=terms, optimizer=partial(torch.optim.SGD, lr=0.3))
        trainer.fit(TensorData(*train, batch_size=100), epochs=30)
        return float((model(test[0]).argmax(1) == test[1]).float().mean()), model[1].weight.detach()[:, 2].abs().max()

    judged, other = accuracy(2), accuracy(1)
    assert judged[0] > 0.85
    assert other[0] < 0.4
    alone, without = accuracy(2, clean=False, weight=0.5), accuracy(2, clean=False, weight=0.0)
    assert alone[0] > 0.85
    assert alone[1] < 0.2 * without[1]


# -- judging -------------------------------------------------------------------------------------


def test_top_examples_in_parts():
    """The strongest rows over all parts; fails when a part starts at row 0 again or the order is rising."""
    sae, x = autoencoder(), random(50, D)
    values, rows = top_examples(sae, x, count=6, batch_size=7)
    expected = sae.preactivations(x).T.topk(6, dim=1)
    torch.testing.assert_close(values, expected.values.float())
    assert torch.equal(rows, expected.indices)
    assert top_examples(sae, x[:2], count=6)[1].shape == (C, 2)


def test_judge_sees_the_items_and_decides():
    """Examples are positive, strongest first, and carry their own items, also where rows were left out."""
    sae = TopKSAE.from_tensors(torch.eye(3), k=3)
    x = torch.tensor([[1.0, 0, 0], [torch.nan, 0, 0], [0.5, 2.0, 0], [2.0, 0, 0]])
    seen = {}

    def judge(feature, examples):
        seen[feature] = [(e.item, e.activation) for e in examples]
        return Judgement(feature == 0, "no", "first axis") if feature == 0 else False

    with pytest.warns(UserWarning, match="not finite"):
        chosen = select_features(sae, x, judge, items=["a", "lost", "b", "c"], count=2)
    assert seen == {0: [("c", 2.0), ("a", 1.0)], 1: [("b", 2.0)]}
    assert chosen.features == [0]
    assert chosen.judgements[0].summary == "first axis"
    assert chosen.provenance["rows"] == 3
    with pytest.raises(ValueError, match="as many as the rows"):
        select_features(sae, x, judge, items=["a"])


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Fine. Final decision: [[ Yes ]]", "yes"),
        ("``Final Decision: [[No]]``", "no"),
        ("At first [[Yes]], but then: [[Maybe]]", "maybe"),
        ("Final Decision: Probably. It is polite.", "probably"),
        ("No", "no"),
        ("yes.", "yes"),
        ("There is no reason to know. Final decision: [[Probably]]", "probably"),
        ("Final decision: [[Yes/Probably/Maybe/No]]", None),
        ("Final decision: Yes/Probably/Maybe/No", None),
        ("I have no idea, nobody does", None),
        ("", None),
    ],
)
def test_parsing_of_answers(text, answer):
    """Fails when a word in passing is taken for the decision, or the unfilled form for a Yes."""
    assert parse_answer(text) == answer


def scripted(answers, asked=None):
    """A language model that answers by what the prompt shows."""

    def generate(prompt):
        if asked is not None:
            asked.append(prompt)
        if prompt.rstrip().endswith("reacts to:"):
            return "Cannot tell." if "zzz" in prompt else f"About {'cats' if 'cat' in prompt else 'verbs'}."
        return answers.pop(0) if isinstance(answers, list) else answers

    return generate


@pytest.mark.parametrize(
    ("answer", "unintended"), [("[[Yes]]", False), ("[[Probably]]", False), ("[[Maybe]]", True), ("[[No]]", True)]
)
def test_answers_decide(answer, unintended):
    """Unintended is what is neither Yes nor Probably; fails when Maybe is allowed."""
    judge = LanguageModelJudge(scripted(answer), task="Find cats.", guideline="Animals only.")
    said = judge(3, [Example(0, 1.0, "a cat"), Example(1, 0.5, "the cat")])
    assert said == Judgement(unintended, answer.strip("[]").lower(), "About cats.")


def test_what_the_model_is_asked():
    """Prompts hold texts, summary, task and guideline, at most `count` texts of `width` characters from their end."""
    asked = []
    judge = LanguageModelJudge(scripted("[[No]]", asked), task="TASK {x}", guideline="RULE", count=2, width=5)
    judge(0, [Example(0, 3.0, "12345 cat!"), Example(1, 2.0, "b"), Example(2, 1.0, "never")])
    assert "- cat!\n- b\n" in asked[0].replace("-  cat!", "- cat!")
    assert "never" not in asked[0] + asked[1]
    assert "12345" not in asked[0]
    for part in ("TASK {x}", "RULE", "About cats.", "Yes/Probably/Maybe/No"):
        assert part in asked[1]


def test_what_cannot_be_interpreted_stays_allowed():
    """One question only; fails when "cannot tell" counts as unintended, as any other answer than Yes would."""
    asked = []
    judge = LanguageModelJudge(scripted("[[No]]", asked), task="t", guideline="g")
    assert judge(0, [Example(0, 1.0, "zzz")]) == Judgement(False, "cannot tell", "Cannot tell.")
    assert len(asked) == 1


def test_a_model_that_does_not_answer():
    """Asked twice, then an error that says what to do; a first answer without a decision is forgiven."""
    judge = LanguageModelJudge(scripted(["Hm.", "[[Yes]]"]), task="t", guideline="g")
    assert judge(0, [Example(0, 1.0, "cat")]).answer == "yes"
    with pytest.raises(ValueError, match="feature 4, in two tries"):
        LanguageModelJudge(scripted("Hm."), task="t", guideline="g")(4, [Example(0, 1.0, "cat")])
    with pytest.raises(ValueError, match="items=texts"):
        judge(0, [Example(0, 1.0)])
    with pytest.raises(ValueError, match="guideline must say something"):
        LanguageModelJudge(scripted("Hm."), task="t", guideline=" ")


def test_judging_by_a_language_model_end_to_end(tmp_path):
    """Texts to mask to files and back: the provenance names model, task, prompt and autoencoder."""
    sae = TopKSAE.from_tensors(torch.eye(3), k=1)
    x, texts = torch.eye(3).repeat(2, 1), ["a cat", "to run", "zzz", "cats", "to go", "zzz zzz"]

    def generate(prompt):
        if "reacts to:" in prompt[-20:]:
            return scripted("")(prompt)
        return "[[Yes]]" if "About cats" in prompt else "[[No]]"

    judge = LanguageModelJudge(generate, task="Find cats.", guideline="Animals only.", model="scripted-1")
    chosen = select_features(sae, x, judge, items=texts)
    assert chosen.features == [1]
    assert [chosen.judgements[j].answer for j in range(3)] == ["yes", "no", "cannot tell"]
    chosen.save(tmp_path / "mask")
    again = FeatureMask.load(tmp_path / "mask")
    assert torch.equal(again.mask, chosen.mask)
    assert again.judgements == chosen.judgements
    assert again.provenance["model"] == "scripted-1"
    assert again.provenance["task"] == "Find cats."
    assert again.provenance["judge"] == "LanguageModelJudge"
    assert SelfReg(sae, again).removal.activations(x).shape == (6, 1)
    assert {path.name for path in (tmp_path / "mask").iterdir()} == {"mask.safetensors", "mask.json"}
    text = json.loads((tmp_path / "mask" / "mask.json").read_text())
    (tmp_path / "mask" / "mask.json").write_text(json.dumps({**text, "provenance": {}}))
    with pytest.raises(ValueError, match="checksum"):
        FeatureMask.load(tmp_path / "mask")
    save_sealed(tmp_path / "wrong", "mask", {"mask": torch.ones(3)}, {"judgements": [1], "provenance": 0}, version=2)
    with pytest.raises(ValueError, match="not those of a mask"):
        FeatureMask.load(tmp_path / "wrong")
    (tmp_path / "mask" / "mask.json").write_text(json.dumps({**text, "format": 99}))
    with pytest.raises(ValueError, match="format 99"):
        FeatureMask.load(tmp_path / "mask")


def test_judging_by_a_transformers_pipeline():
    """A real generation pipeline goes in as it is: a tiny random model, whose babble is no answer and is told so."""
    transformers = pytest.importorskip("transformers", reason="the judge of this test is a transformers pipeline")
    tokenizers = pytest.importorskip("tokenizers", reason="comes with transformers")
    words = {word: i for i, word in enumerate(["[UNK]", "[EOS]", "yes", "no", "cat"])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="[EOS]", unk_token="[UNK]")
    config = transformers.GPT2Config(
        vocab_size=5, n_positions=512, n_embd=8, n_layer=1, n_head=1, bos_token_id=1, eos_token_id=1
    )
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.copy_(10 * F.normalize(model.lm_head.weight[3], dim=0))  # always "no"
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)

    def generate(prompt):
        return pipe(prompt, max_new_tokens=1, do_sample=False, return_full_text=False)[0]["generated_text"]

    judge = LanguageModelJudge(generate, task="Find cats.", guideline="Animals only.", model="tiny")
    said = judge(0, [Example(0, 1.0, "cat")])
    assert said.answer == "no"
    assert said.unintended


# -- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"untied": True}, {"threshold": True, "k": None}])
def test_autoencoder_survives_its_files(changes, tmp_path):
    sae = autoencoder(dtype=torch.float32, **changes)
    sae.fired += 3
    save_sae(sae, tmp_path)
    again = load_sae(tmp_path)
    x = torch.randn(5, D)
    assert torch.equal(again(x), sae(x))
    assert torch.equal(again.fired, sae.fired)
    assert not any(p.requires_grad for p in again.parameters())
    text = (tmp_path / "sae.json").read_text()
    for damaged in (text.replace('"k"', '"q"'), text.replace('"format"', '"farmat"'), text[:-3], "[]"):
        (tmp_path / "sae.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"checksum|format|damaged"):
            load_sae(tmp_path)
    for wrong in (
        {"encoder": torch.ones(2, 2)},
        {"fired": torch.ones(2), "encoder": torch.ones(2), "x": torch.ones(1)},
    ):
        save_sealed(tmp_path / "wrong", "sae", wrong, {"k": 2}, version=2)
        with pytest.raises(ValueError, match=r"not those of an autoencoder"):
            load_sae(tmp_path / "wrong")
    (tmp_path / "sae.json").write_text('{"format": 7, "k": 2}')
    with pytest.raises(ValueError, match="format 7"):
        load_sae(tmp_path)


def lens(x, t, config):
    """SAELens's inference, written from its documentation."""
    pre = (x - (t["b_dec"] if config.get("apply_b_dec_to_input", True) else 0)) @ t["W_enc"] + t["b_enc"]
    norm = t["W_dec"].norm(dim=1) if config.get("rescale_acts_by_decoder_norm") else torch.ones(len(t["W_dec"]))
    pre = pre * norm
    if config["architecture"] == "topk":
        values, index = pre.topk(config["k"], dim=1)
        codes = torch.zeros_like(pre).scatter(1, index, values.relu())
    else:
        codes = pre.relu() * (pre > t["threshold"] if config["architecture"] == "jumprelu" else 1)
    return codes / norm @ t["W_dec"] + t["b_dec"]


@pytest.mark.parametrize(
    "config",
    [
        {"architecture": "topk", "k": 3},
        {"architecture": "topk", "k": 3, "rescale_acts_by_decoder_norm": True, "normalize_activations": "none"},
        {"architecture": "standard", "apply_b_dec_to_input": False},
        {"architecture": "jumprelu", "apply_b_dec_to_input": False},
    ],
)
def test_autoencoders_of_sae_lens(config, tmp_path):
    """Untied, (d, C) encoders: fails when one is not transposed, or b_dec is subtracted where it must not be."""
    tensors = {"W_enc": random(D, C, seed=1), "W_dec": random(C, D, seed=2)}
    tensors |= {"b_enc": random(C, seed=3), "b_dec": random(D, seed=4)}
    if config["architecture"] == "jumprelu":
        tensors["threshold"] = random(C, seed=5).abs()
    tensors = {name: tensor.float() for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / "sae_weights.safetensors")
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    x = random(7, D).float()
    sae = load_sae_lens(tmp_path)
    torch.testing.assert_close(sae(x), lens(x, tensors, config), rtol=1e-4, atol=1e-4)
    mask = torch.arange(C) < 3
    torch.testing.assert_close(SelfReg(sae, mask, similarity="dot").directions, sae.decoder[mask])


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"architecture": "gated"}, "'gated' is not one of"),
        ({"architecture": "topk", "k": 2, "normalize_activations": "layer_norm"}, "layer_norm"),
        ({"architecture": "topk"}, "has no k"),
        ({"architecture": "topk", "k": "two"}, "none that is a number"),
        ({"architecture": "topk", "activation_fn_kwargs": "k=2"}, "has no k"),
        ({"architecture": "jumprelu"}, "has no threshold"),
        ([], "damaged"),
    ],
)
def test_autoencoders_that_are_refused(config, says, tmp_path):
    tensors = {"W_enc": torch.ones(2, 3), "W_dec": torch.ones(3, 2), "b_enc": torch.zeros(3), "b_dec": torch.zeros(2)}
    save_file(tensors, tmp_path / "sae_weights.safetensors")
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=says):
        load_sae_lens(tmp_path)


def test_given_tensors_must_fit():
    with pytest.raises(ValueError, match=r"decoder must have shape \(3, 2\).*transpose"):
        TopKSAE.from_tensors(torch.ones(3, 2), decoder=torch.ones(2, 3))
    with pytest.raises(ValueError, match="k=None"):
        SAETraining(TopKSAE.from_tensors(torch.ones(3, 2)))
    with pytest.raises(ValueError, match="k=None"):
        TopKSAE.from_tensors(torch.ones(3, 2)).loss(torch.ones(1, 2))
    with pytest.raises(ValueError, match="leave it out"):
        SAETraining(TopKSAE(2, 3, k=1), k_start=2, dead_weight=0.1)
    with pytest.raises(ValueError, match="dead_weight"):
        SAETraining(TopKSAE(2, 3, k=1), dead_weight=-0.1)


def test_low_precision():
    """bf16 autocast: finite losses and gradients, in the type of the parameters, near the exact ones."""
    sae = autoencoder(dtype=torch.float32).requires_grad_(True)
    x = random(16, D, dtype=torch.float32)
    dead = torch.arange(C) < 6
    exact = torch.autograd.grad(sae.fine_tuning_loss(x, dead), sae.encoder)[0]
    with torch.autocast("cpu", torch.bfloat16):
        loss = sae.fine_tuning_loss(x, dead)
    low = torch.autograd.grad(loss, sae.encoder)[0]
    assert low.dtype == torch.float32
    assert torch.isfinite(low).all()
    assert F.cosine_similarity(low.flatten(), exact.flatten(), dim=0) > 0.98


# -- experiment ----------------------------------------------------------------------------------


def test_arms_of_a_seed_start_from_the_same_data():
    """Fails when the fingerprint is that of cleaned embeddings, or data draws from an arm's own stream."""
    arms = ("plain", "leace", "cleaning_only", "self_regularized", "sighted", "random_features")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        seen = {run_arm(experiment, arm, 0, "smoke").data for arm in arms}
        other = run_arm(experiment, "plain", 1, "smoke").data
    assert len(seen) == 1
    assert other not in seen


def test_paper_scale_runs_where_its_files_are(tmp_path, monkeypatch):
    """The published schedule on files of the promised form, here tiny ones; without them it says which are missing."""
    monkeypatch.setenv("REGULARIZED_DATA", str(tmp_path))
    with pytest.raises(Unavailable, match=r"train\.safetensors.*mask\.json"):
        run_arm(experiment, "plain", 0, "paper")
    folder = tmp_path / "selfreg_toxicchat"
    sae = autoencoder(dtype=torch.float32)
    save_sae(sae, folder / "sae")
    with pytest.warns(UserWarning, match="normalised error"):
        select_features(sae, random(60, D).float(), lambda j, _: j < 3).save(folder / "mask")
    for name, seed in (("train", 0), ("test", 1)):
        x = random(200, D, seed=seed).float()
        save_file({"x": x, "y": (x[:, 0] > 0).float()}, folder / f"{name}.safetensors")
    for arm in ("plain", "self_regularized", "random_features"):
        measured = run_arm(experiment, arm, 0, "paper")
        assert 0 <= measured.metrics["test_f1"] <= 100
        assert 1 < len(measured.curves["validation_f1"]) <= 50


# -- conformance ---------------------------------------------------------------------------------


def test_fine_tuning_cases_find_their_autoencoder(tmp_path):
    """A case of a dead mask alone is paired by shape, by number where shapes do not tell, and never guessed."""
    import numpy as np

    rng = np.random.default_rng(0)
    arrays = {}
    for number in (0, 3):
        arrays |= {
            f"sae{number}/in/W_enc": rng.normal(size=(4, 9)),
            f"sae{number}/in/hidden": rng.normal(size=(3, 4)),
            f"sae{number}/hp/topk": np.array(2),
        }
    for name in ("ft3", "ft7"):
        arrays |= {f"{name}/in/dead_mask": (np.arange(9) < 4).astype(float), f"{name}/out/loss": np.array(0.0)}
    np.savez(tmp_path / "golden.npz", **arrays)
    cases = {case.name: case for case in load_cases(tmp_path / "golden.npz")}
    ours = conformance.compute(cases["ft3"])
    x = torch.tensor(arrays["sae3/in/hidden"])
    sae = TopKSAE.from_tensors(torch.tensor(arrays["sae3/in/W_enc"]).T, k=2)
    expected = sae.fine_tuning_loss(x, torch.arange(9) < 4)
    np.testing.assert_allclose(ours["loss"], expected.numpy())
    with pytest.raises(UnknownCase):
        conformance.compute(cases["ft7"])


def test_no_warning_in_ordinary_use():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sae = TopKSAE.from_tensors(torch.eye(3), k=3)
        reg = SelfReg(sae, select_features(sae, torch.eye(3), lambda j, _: j == 0))
        assert repr(reg.removal) == "FeatureRemoval(features=1, width=3, compat=False)"
