"""Bad inputs of `cream`: each is answered by what was given, what is allowed, and how to mend it."""

import copy

import pytest
import torch
from tests.alignment.cream.small import PROMPTS, build, model
from tests.bad_input import assert_refused, refused

from regularized.alignment.cream import (
    ConsistencyDPOLoss,
    SyntheticJudge,
    build_preference_pairs,
    consistency_dpo_loss,
    length_normalised,
    likelihood_ratio,
    rank_consistency,
)
from regularized.alignment.sampling import pack_responses

ONE, TWO, THREE = (torch.tensor([k]) for k in (1, 2, 3))
REWARDS = torch.tensor([[3.0, 2.0, 1.0]])


def answers(*rows):
    return pack_responses([torch.tensor([9])] * len(rows), rows)


def with_consistency(*values):
    zero = torch.zeros(len(values))
    ConsistencyDPOLoss()(zero, zero, zero, zero, consistency=torch.tensor(values))


def same_models():
    with_same = build()
    with_same.collect(PROMPTS)
    build_preference_pairs(answers([ONE, TWO, THREE]), REWARDS, REWARDS.clone())


def one_model():
    policy = model(1)
    build(policy=policy, base=policy)


def not_fine_tuned():
    build(policy=model(0), base=copy.deepcopy(model(0))).collect(PROMPTS)


def other_prompts():
    cream = build()

    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cream.collect(PROMPTS, after_chunk=interrupt)
    cream.collect(PROMPTS[::-1])


def other_base():
    build(base=model(3)).load_state_dict(build().state_dict())


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        refused(
            "consistency above 1",
            lambda: with_consistency(0.5, 1.5),
            ValueError,
            ["[0, 1]", "1.5", "pair 1"],
        ),
        refused(
            "consistency is no number",
            lambda: with_consistency(0.5, 0.6, float("nan")),
            ValueError,
            ["nan", "pair 2", "leave such a prompt out"],
        ),
        refused(
            "tau in [-1, 1] for a consistency",
            lambda: consistency_dpo_loss(torch.zeros(2), torch.tensor([0.8, -0.2])),
            ValueError,
            ["-0.2", "tau", "(tau + 1) / 2"],
        ),
        refused("a number outside", lambda: consistency_dpo_loss(torch.zeros(2), 2.0), ValueError, ["[0, 1]", "got 2"]),
        refused(
            "one response",
            lambda: build_preference_pairs(answers([ONE]), ONE[None] * 1.0, ONE[None] * 2.0),
            ValueError,
            ["1 response", "two or more"],
        ),
        refused(
            "all responses identical",
            lambda: build_preference_pairs(answers([ONE] * 3), REWARDS, REWARDS + 1),
            ValueError,
            ["none of the 1 prompts", "identical", "higher temperature"],
        ),
        refused(
            "constant scores everywhere",
            lambda: build_preference_pairs(answers([ONE, TWO, THREE]), REWARDS * 0, REWARDS),
            ValueError,
            ["none of the 1 prompts", "the same reward"],
        ),
        refused(
            "constant scores of the other model, by Spearman's correlation",
            lambda: rank_consistency(REWARDS, REWARDS * 0, method="spearman"),
            ValueError,
            ["prompt 0", "undefined", "kendall"],
        ),
        refused(
            "a score that is not finite",
            lambda: rank_consistency(REWARDS, REWARDS / 0),
            ValueError,
            ["prompt 0", "before", "not finite"],
        ),
        refused(
            "shapes of both scores differ",
            lambda: build_preference_pairs(answers([ONE, TWO, THREE]), REWARDS, REWARDS[:, :2]),
            ValueError,
            ["(1, 3)", "(1, 2)"],
        ),
        refused("shapes in a ranking", lambda: rank_consistency(REWARDS, REWARDS[0]), ValueError, ["(P, N)"]),
        refused("shapes in a ratio", lambda: likelihood_ratio(REWARDS, REWARDS[0]), ValueError, ["(1, 3)", "(3,)"]),
        refused("the same model twice", same_models, UserWarning, ["same rewards throughout", "self-rewarding"]),
        refused("one object for policy and base", one_model, ValueError, ["policy", "base", "same object"]),
        refused(
            "ratio of the base to itself in round 1",
            lambda: likelihood_ratio(REWARDS, REWARDS),
            ValueError,
            ["is the base", "length_normalised"],
        ),
        refused("the policy was not fine-tuned", not_fine_tuned, ValueError, ["fine-tune it first"]),
        refused(
            "a response without a token",
            lambda: length_normalised(REWARDS, torch.tensor([[1, 0, 2]])),
            ValueError,
            ["no token", "ends a response"],
        ),
        refused(
            "unknown label",
            lambda: build(consistency="avg").run_round(PROMPTS),
            ValueError,
            ["'mean'", "'each'", "avg"],
        ),
        refused(
            "unknown method", lambda: rank_consistency(REWARDS, REWARDS, method="pearson"), ValueError, ["kendall"]
        ),
        refused("unknown ties", lambda: rank_consistency(REWARDS, REWARDS, ties="random"), ValueError, ["'ordinal'"]),
        refused("beta 0", lambda: ConsistencyDPOLoss(beta=0.0), ValueError, ["beta", "positive"]),
        refused(
            "a bias towards nothing", lambda: SyntheticJudge(lambda r: r.lengths, bias=1.0), ValueError, ["feature"]
        ),
        refused("pairs before they are there", lambda: build().train(), RuntimeError, ["collect(prompts)"]),
        refused("other prompts in the middle of a round", other_prompts, ValueError, ["round 1", "other prompts"]),
        refused("a state beside another base", other_base, ValueError, ["another base"]),
        refused(
            "log-probabilities of two shapes",
            lambda: ConsistencyDPOLoss()(*[torch.zeros(2)] * 3, torch.zeros(3), consistency=1.0),
            ValueError,
            ["one shape"],
        ),
    ],
)
def test_bad_input(call, error, says):
    """Fails when bad input trains, or the message does not help."""
    assert_refused(call, error, says)
