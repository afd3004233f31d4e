"""The rounds: who scores what, what the labels come from, and that they go on from any place."""

import copy

import pytest
import torch
from tests.alignment.cream.small import PROMPTS, build, model

from regularized.alignment.cream import SyntheticJudge
from regularized.alignment.sampling import Responses
from regularized.alignment.sequence_log_probs import sequence_log_probs


class Interrupt(Exception):
    pass


def stop_after(count):
    left = iter(range(count))

    def stop():
        if next(left, None) is None:
            raise Interrupt

    return stop


def score(network, responses, reduction="sum"):
    tokens, mask = responses.tokens.flatten(0, 1), responses.mask.flatten(0, 1)
    with torch.no_grad():
        scores = sequence_log_probs(network(tokens), tokens, mask, reduction=reduction)
    return scores.view(responses.mask.shape[:2])


class Kept:
    """Remembers the models and the responses of each chunk, and judges by nothing."""

    def __init__(self, sample):
        self.sample = sample
        self.drawn = []

    def __call__(self, network, prompts):
        self.drawn.append(self.sample(network, prompts))
        return self.drawn[-1]


def test_each_round_ranks_by_its_own_two_models():
    """Fails when the base is not subtracted, M_{t-1} is a model too old or too new, or round 1 is not ranked by M_0."""
    cream = build(chunk=24, consistency="each")
    kept = Kept(cream.sample)
    cream.sample = kept
    models = [copy.deepcopy(cream.base.module), copy.deepcopy(cream.policy)]
    for number in (1, 2, 3):
        pairs = cream.collect(PROMPTS)
        responses = kept.drawn[-1]
        base = score(models[0], responses)
        now = score(models[number], responses) - base
        before = score(models[0], responses, "mean") if number == 1 else score(models[number - 1], responses) - base
        chosen, rejected = now.argmax(1)[pairs.prompt], now.argmin(1)[pairs.prompt]
        assert torch.equal(pairs.place, torch.stack([chosen, rejected], 1))
        order = [(x[:, :, None] - x[:, None, :]).sign() for x in (now, before)]
        for row, prompt in enumerate(pairs.prompt.tolist()):
            if responses.first_identical()[prompt].tolist() == [0, 1, 2, 3]:
                tau = float((order[0][prompt] * order[1][prompt]).sum()) / 12
                assert float(pairs.consistency[row]) == pytest.approx((tau + 1) / 2, abs=1e-6)
        torch.testing.assert_close(
            cream.reference_log_probs, pairs.of(score(models[number], responses)), atol=1e-4, rtol=0
        )
        cream.train()
        cream.finish_round()
        models.append(copy.deepcopy(cream.policy))
    assert [done["round"] for done in cream.history] == [1, 2, 3]


def test_training_begins_at_ln_2_and_widens_the_margin():
    """Fails when the reference is not the model that the round began with, or chosen and rejected are exchanged."""
    cream = build(consistency=1.0, epochs=8, schedule=1.0)
    pairs = cream.collect(PROMPTS)
    losses = cream.train()
    assert losses[0] < 0.70
    assert losses[-1] < losses[0]
    with torch.no_grad():
        scores = score(cream.policy.eval(), Responses(pairs.tokens, pairs.mask))
    gain = scores - cream.reference_log_probs
    assert float((gain[:, 0] - gain[:, 1]).mean()) > 0.5


def test_soft_labels_hold_the_margin():
    """Fails when the label does not reach the loss: with 1/2 there is nothing to learn from a pair."""
    margins = {}
    for label in (1.0, 0.5):
        cream = build(consistency=label, epochs=8, schedule=1.0)
        pairs = cream.collect(PROMPTS)
        cream.train()
        gain = score(cream.policy.eval(), Responses(pairs.tokens, pairs.mask)) - cream.reference_log_probs
        margins[label] = float((gain[:, 0] - gain[:, 1]).abs().mean())
    assert margins[0.5] < 0.1 * margins[1.0]


def test_reference_may_be_the_base():
    """Fails when the option changes nothing."""
    cream = build(reference="base", chunk=24)
    kept = Kept(cream.sample)
    cream.sample = kept
    pairs = cream.collect(PROMPTS)
    torch.testing.assert_close(
        cream.reference_log_probs, pairs.of(score(cream.base.module, kept.drawn[-1])), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("steps", [0, 2, 3, 6])
def test_goes_on_exactly_from_any_step(tmp_path, steps):
    """Fails when responses, rewards, pairs, the model before, an optimizer or a position are not in the state."""
    whole = build()
    for _ in range(2):
        whole.run_round(PROMPTS)
    first = build()
    first.run_round(PROMPTS)
    with pytest.raises(Interrupt):
        first.run_round(PROMPTS, after_step=stop_after(steps))
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = build(policy=model(5))
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    second.run_round(PROMPTS)
    assert second.history == whole.history
    for ours, theirs in zip(second.policy.parameters(), whole.policy.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_what_is_drawn_is_a_function_of_the_seed_alone():
    """Fails when sampling draws from the outer state, or leaves a trace in it."""
    runs = []
    for outside in (0, 1):
        torch.manual_seed(outside)
        before = torch.get_rng_state()
        cream = build()
        cream.run_round(PROMPTS)
        runs.append(cream)
        torch.manual_seed(outside)
        assert torch.equal(torch.get_rng_state(), before)
    assert runs[0].history == runs[1].history
    assert build(seed=1).run_round(PROMPTS) != runs[0].history[0]


def test_a_judge_takes_the_place_of_the_model_s_own_rewards():
    """Fails when the judge is asked of the wrong rounds, or its rewards are not those that choose."""
    asked = []

    class Counting(SyntheticJudge):
        def __call__(self, network, responses, /, *, round):
            asked.append((round, network))
            return super().__call__(network, responses, round=round)

    cream = build(judge=Counting(lambda r: r.lengths.float()), chunk=24)
    pairs = cream.collect(PROMPTS)
    lengths = pairs.mask.sum(2)
    assert bool((lengths[:, 0] > lengths[:, 1]).all())
    assert [number for number, _ in asked] == [1, 0]
    assert asked[0][1] is cream.policy
    assert asked[1][1] is cream.base.module
    cream.train()
    cream.finish_round()
    cream.collect(PROMPTS)
    assert [number for number, _ in asked[2:]] == [2, 1]
    assert asked[3][1] is cream.previous.module


def test_the_base_stays_and_what_is_frozen_stays():
    """Fails when the base is trained, or parameters that need no gradient move."""
    policy = model(1)
    policy.embedding.requires_grad_(False)
    frozen = policy.embedding.weight.clone()
    cream = build(policy=policy)
    before = copy.deepcopy(cream.base.state_dict())
    cream.run_round(PROMPTS)
    assert torch.equal(cream.policy.embedding.weight, frozen)
    assert all(torch.equal(value, before[name]) for name, value in cream.base.state_dict().items())
    assert not torch.equal(cream.policy.head.weight, model(1).head.weight)


def test_identical_responses_tie():
    """Fails when equal responses get rewards that differ by rounding, and so an order."""
    cream = build(chunk=24)
    rank, found = cream._rank, {}

    def kept(prompts):
        found.update(rank(prompts))
        return found

    cream._rank = kept
    cream.collect(PROMPTS)
    first = Responses(found["tokens"], found["mask"]).first_identical()
    for name in ("now", "before"):
        assert torch.equal(found[name], found[name].gather(1, first))
