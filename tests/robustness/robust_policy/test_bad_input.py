"""Bad inputs of the robust agent: each is answered by what was given, what is allowed, and how to mend it."""

import math
import sys

import pytest
import torch
from tests.bad_input import assert_refused, refused

from regularized.robustness.robust_policy import (
    DRRPO,
    AmericanPut,
    Chi2Penalty,
    KLBall,
    KLPenalty,
    LinearMDP,
    NoUncertainty,
    Softmax,
    TVBall,
    TVPenalty,
    as_gymnasium,
    exploration_bonus,
    kl_regularized_policy,
    ridge_regression,
    robust_expectation,
    simulated_linear_mdp,
)
from regularized.robustness.robust_policy.environments import LinearMDPEnvironment

WORLD = simulated_linear_mdp()


def build(**options):
    settings = {"num_actions": 16, "horizon": 3, "rewards": WORLD.theta, "uncertainty": NoUncertainty(), **options}
    return DRRPO(settings.pop("feature_map", WORLD.feature_map), **settings)


def play(env=None, **options):
    return build(**options).run_episode(env or LinearMDPEnvironment(WORLD))


def _features(change):
    def feature_map(states):
        features = WORLD.features[states].clone()
        change(features)
        return features

    return feature_map


def _negative(features):
    features[..., 5, 0] -= 1.0
    features[..., 5, 1] += 1.0


def _too_much(features):
    features[..., 5, 0] += 0.5


class Scaled:
    """The environment with other rewards."""

    def __init__(self, factor):
        self.env = LinearMDPEnvironment(WORLD)
        self.factor = factor

    def reset(self, *, seed=None):
        return self.env.reset(seed=seed)

    def step(self, action):
        observation, reward, *rest = self.env.step(action)
        return observation, self.factor * (reward + 1.0), *rest


def _without_gymnasium():
    kept = sys.modules.get("gymnasium")
    sys.modules["gymnasium"] = None
    try:
        as_gymnasium(AmericanPut())
    finally:
        del sys.modules["gymnasium"]
        if kept is not None:
            sys.modules["gymnasium"] = kept


def _other_state(**options):
    one, other = build(), build(**options)
    one.fit(LinearMDPEnvironment(WORLD), episodes=1)
    other.load_state_dict(one.state_dict())


def _other_actions():
    one = build()
    one.fit(LinearMDPEnvironment(WORLD), episodes=1)
    DRRPO(WORLD.feature_map, num_actions=4, horizon=3, uncertainty=NoUncertainty()).load_state_dict(one.state_dict())


def bad_inputs():
    ones = torch.ones(16, dtype=torch.float64)
    never = ValueError
    return [
        refused(
            "negative features",
            lambda: play(feature_map=_features(_negative)),
            never,
            ("sum to 1", "observation 0", "action 5"),
        ),
        refused(
            "features that sum to more",
            lambda: play(feature_map=_features(_too_much)),
            never,
            ("sum to 1", "action 5", "divide"),
        ),
        refused(
            "features that are NaN", lambda: play(feature_map=_features(lambda f: f.fill_(math.nan))), never, ("nan",)
        ),
        refused(
            "features of one action",
            lambda: play(feature_map=lambda states: WORLD.features[states][:, 0]),
            never,
            ("(n, 16, d)", "gave"),
        ),
        refused("radius above 1", lambda: TVBall(1.2), never, ("TVBall.radius", "[0, 1]", "1.2")),
        refused("negative radius of one factor", lambda: TVBall((0.0, -0.1)), never, ("TVBall.radius", "-0.1")),
        refused("negative radius in nats", lambda: KLBall(-1.0), never, ("KLBall.radius", ">= 0")),
        refused("price 0, TV", lambda: TVPenalty(0.0), never, ("TVPenalty.strength", "positive")),
        refused("price 0, KL", lambda: KLPenalty(0.0), never, ("KLPenalty.strength", "positive")),
        refused("price below 0, chi2", lambda: Chi2Penalty(-1.0), never, ("Chi2Penalty.strength", "positive")),
        refused(
            "another number of radii",
            lambda: robust_expectation(torch.ones(3, 2) / 2, torch.ones(2), TVBall((0.1, 0.1))),
            never,
            ("3 factors", "2 radii"),
        ),
        refused(
            "values of another length",
            lambda: robust_expectation(torch.ones(3, 2) / 2, torch.ones(3), TVBall(0.1)),
            never,
            ("(3, 2)", "(3,)"),
        ),
        refused("eta 0", lambda: build(eta=0.0), never, ("eta", "positive", "Greedy")),
        refused("eta 0 of a function", lambda: kl_regularized_policy(ones, ones / 16, 0.0), never, ("eta", "greedy")),
        refused("step size 0", lambda: Softmax(0.1, step_size=0.0), never, ("step_size", "positive")),
        refused("mirror without a step", lambda: build(update="mirror"), never, ("mirror", "step_size")),
        refused("a step without mirror", lambda: build(step_size=1.0), never, ("mirror", "closed_form")),
        refused("unknown update", lambda: build(update="adam"), never, ("'mirror'", "adam")),
        refused(
            "unknown bonus", lambda: exploration_bonus(ones, torch.eye(16), kind="ucb"), never, ("'elliptic'", "ucb")
        ),
        refused("negative beta", lambda: build(beta=-1.0), never, ("beta", ">= 0")),
        refused("ridge 0", lambda: ridge_regression(torch.ones(2, 2), ridge=0.0), never, ("ridge", "positive")),
        refused(
            "reference that does not sum to 1",
            lambda: build(reference_policy=ones),
            never,
            ("reference", "sum to 1", "divide"),
        ),
        refused(
            "reference of a state that does not sum to 1",
            lambda: play(reference_policy=lambda step, states: ones.expand(len(states), -1)),
            never,
            ("reference", "sum to 1"),
        ),
        refused("reference of other actions", lambda: build(reference_policy=ones[:3] / 3), never, ("16", "(1, 3)")),
        refused("rewards above 1", lambda: play(Scaled(3.0)), never, ("[0, 1]", "3.0", "TransformReward")),
        refused("negative rewards", lambda: play(Scaled(-0.5)), never, ("[0, 1]", "-0.5")),
        refused(
            "reward weights above 1",
            lambda: build(rewards=2.0 * WORLD.theta),
            never,
            ("[0, 1]", "0 to 2", "rewards=None"),
        ),
        refused("reward weights of other steps", lambda: build(rewards=WORLD.theta[:2]), never, ("(3, d)", "(2, 4)")),
        refused(
            "reward weights of other features", lambda: play(rewards=torch.ones(7)), never, ("7 weights", "4 features")
        ),
        refused(
            "known rewards above 1",
            lambda: play(rewards=lambda step, states: torch.full((len(states), 16), 2.0)),
            never,
            ("known rewards", "[0, 1]"),
        ),
        refused("uncertainties of other steps", lambda: build(uncertainty=[TVBall(0.1)] * 2), never, ("3 steps", "2")),
        refused(
            "total variation without a fail state",
            lambda: build(uncertainty=TVBall(0.1), fail_state=False),
            UserWarning,
            ("least value", "estimated"),
        ),
        refused(
            "environment that ends earlier",
            lambda: build(horizon=4, rewards=None).fit(LinearMDPEnvironment(WORLD), episodes=20),
            never,
            ("horizon=4", "truncated after 3", "TimeLimit"),
        ),
        refused(
            "environment that goes on",
            lambda: play(horizon=2, rewards=None),
            never,
            ("horizon=2", "goes on after 2", "TimeLimit"),
        ),
        refused(
            "state of another horizon", lambda: _other_state(horizon=4, rewards=None), never, ("horizon=3", "horizon=4")
        ),
        refused("state of another seed", lambda: _other_state(seed=5), never, ("seed=0", "seed=5")),
        refused("state of other actions", _other_actions, never, ("same actions",)),
        refused("a shift above 1", lambda: simulated_linear_mdp(shift=1.5), never, ("shift", "[0, 1]")),
        refused("too much influence", lambda: simulated_linear_mdp(influence=(0.5,)), never, ("[0, 1]", "-0.2 to 0.8")),
        refused("a price of 0", lambda: AmericanPut(start=0.0), never, ("start", "positive")),
        refused(
            "factors that are no distributions",
            lambda: LinearMDP(WORLD.features, 2 * WORLD.factors, WORLD.theta, WORLD.terminal),
            never,
            ("factors", "sum to 1"),
        ),
        refused(
            "factors of another shape",
            lambda: LinearMDP(WORLD.features, WORLD.factors[:2], WORLD.theta, WORLD.terminal),
            never,
            ("factors", "(3, 4, 5)", "(2, 4, 5)"),
        ),
        refused("no gymnasium", _without_gymnasium, ModuleNotFoundError, ("pip install", "environments")),
    ]


@pytest.mark.parametrize(("call", "error", "says"), bad_inputs())
def test_bad_input(call, error, says):
    """Fails when a bad input passes, or is answered with something that does not help."""
    assert_refused(call, error, says)
