"""The agent: what it remembers and learns, that it goes on from a state, and that robustness shows where it should."""

import math
from functools import partial

import gymnasium
import pytest
import torch

from regularized.robustness.robust_policy import (
    DRRPO,
    AmericanPut,
    NoUncertainty,
    TVBall,
    simulated_linear_mdp,
    tabular_features,
)
from regularized.robustness.robust_policy.environments import LinearMDPEnvironment

NOMINAL = simulated_linear_mdp()
BET = [TVBall((0.0, 0.0, 0.0, 0.5)), TVBall(0.0), TVBall(0.0)]


def build(**options):
    settings = {"num_actions": 16, "horizon": 3, "rewards": NOMINAL.theta, "uncertainty": BET, **options}
    return DRRPO(NOMINAL.feature_map, **settings)


def table(policy, model=NOMINAL):
    return torch.stack([policy(step, torch.arange(len(model.features))) for step in range(model.horizon)])


def test_robust_wins_where_dynamics_shift_and_pays_where_they_do_not():
    """Fails when the adversary does nothing, or the agent learns nothing: exact returns of the exported policies."""
    robust, plain = build(), build(uncertainty=NoUncertainty())
    returns = {}
    for name, agent in (("robust", robust), ("plain", plain)):
        agent.fit(LinearMDPEnvironment(NOMINAL), episodes=80)
        policy = table(agent.export())
        returns[name] = [simulated_linear_mdp(shift=q).value(policy) for q in (0.0, 1.0)]
    assert returns["robust"][1] - returns["plain"][1] > 0.1
    assert returns["robust"][0] - returns["plain"][0] < -0.05


def test_suboptimality_falls():
    """Fails when more episodes teach nothing: the regularized robust objective, against the exact optimum."""
    agent = build()
    best = float(NOMINAL.best(agent.policy_step, BET)[1][0, 0])

    def gap():
        return best - NOMINAL.value(table(agent.policy), BET, eta=0.05)

    first = gap()
    agent.fit(LinearMDPEnvironment(NOMINAL), episodes=100)
    assert 0.0 <= gap() < 0.5 * first


@pytest.mark.parametrize(
    "options",
    [{}, {"refit": "doubling"}, {"update": "mirror", "step_size": 5.0}, {"update": "greedy", "rewards": None}],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_goes_on_bit_for_bit(options, tmp_path):
    """Fails when something that was learned, drawn or remembered is not in the state."""
    whole = build(**options)
    whole.fit(LinearMDPEnvironment(NOMINAL), episodes=6)
    whole.policy(0, torch.tensor([0]))  # has learned from all of them: doing so once more would be another mirror step
    torch.save(whole.state_dict(), tmp_path / "state.pt")
    rest = whole.fit(LinearMDPEnvironment(NOMINAL), episodes=6)
    resumed = build(**options)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert resumed.fit(LinearMDPEnvironment(NOMINAL), episodes=6) == rest
    assert table(resumed.policy).equal(table(whole.policy))
    assert resumed.refits == whole.refits


def test_a_state_is_no_view():
    """Fails when training on changes a state that was taken before."""
    agent = build(update="mirror", step_size=5.0)
    agent.fit(LinearMDPEnvironment(NOMINAL), episodes=3)
    state = agent.state_dict()
    kept = [log["next_total"].clone() for log in state["logs"]]
    agent.fit(LinearMDPEnvironment(NOMINAL), episodes=3)
    assert all(log["next_total"].equal(before) for log, before in zip(state["logs"], kept, strict=True))


def test_doubling_learns_rarely_and_as_well():
    """Fails when the rule never fires, or always: about d log K times, with nearly the same result."""
    every, rare = build(), build(refit="doubling")
    for agent in (every, rare):
        agent.fit(LinearMDPEnvironment(NOMINAL), episodes=120)
    assert every.refits == 119
    assert 5 <= rare.refits <= 60
    values = [NOMINAL.value(table(agent.export()), BET) for agent in (every, rare)]
    assert values[0] == pytest.approx(values[1], abs=0.03)


def test_mirror_steps_remember_what_they_took():
    """Fails when sums in the log, and those that are built anew from all action values, are two things."""
    agent = build(update="mirror", step_size=4.0)
    agent.fit(LinearMDPEnvironment(NOMINAL), episodes=12)
    agent.policy(0, torch.tensor([0]))  # learns from the last episode, too
    log = agent._logs[0]
    alive = log.alive
    for row, features in zip(log.next_total[alive], log.next_features[alive], strict=True):
        state = int((NOMINAL.features == features).all(dim=(1, 2)).nonzero()[0])
        rebuilt = agent._policy().total(1, torch.tensor([state]))[0]
        torch.testing.assert_close(row, rebuilt, rtol=1e-9, atol=1e-9)


def test_small_mirror_steps_stay_behind():
    """Fails when the step size has no effect: after one episode a small step is nearer to the reference."""
    distances = []
    for options in ({"update": "mirror", "step_size": 0.5}, {"update": "mirror", "step_size": 50.0}, {}):
        agent = build(**options)
        agent.fit(LinearMDPEnvironment(NOMINAL), episodes=20)
        distances.append(float((table(agent.policy)[0, 0] - 1 / 16).abs().sum()))
    assert distances[0] < distances[1] <= distances[2] + 1e-6


def test_the_reference_pulls():
    """Fails when the reference is not what the policy is regularized to, or 0 is not never."""
    reference = torch.zeros(16, dtype=torch.float64)
    reference[:2] = torch.tensor([0.75, 0.25], dtype=torch.float64)
    agent = build(reference_policy=reference, eta=1e4)
    agent.fit(LinearMDPEnvironment(NOMINAL), episodes=5)
    torch.testing.assert_close(table(agent.policy)[0, 0], reference, rtol=0, atol=1e-3)
    # A function of the state does the same, state by state.
    by_state = build(reference_policy=lambda step, states: reference.roll(step).expand(len(states), -1), eta=1e4)
    by_state.fit(LinearMDPEnvironment(NOMINAL), episodes=5)
    torch.testing.assert_close(table(by_state.policy)[1, 1], reference.roll(1), rtol=0, atol=1e-3)


def test_exported_policy_is_without_bonus_and_stays():
    """Fails when what is deployed still explores, or changes as the agent learns on."""
    agent = build(beta=5.0)
    agent.fit(LinearMDPEnvironment(NOMINAL), episodes=40)
    policy = agent.export()
    assert policy.values[0].beta == 0.0
    before = table(policy)
    agent.fit(LinearMDPEnvironment(NOMINAL), episodes=5)
    assert table(policy).equal(before)
    assert not table(agent.policy).equal(before)


def test_a_broken_episode_leaves_no_trace():
    """Fails when half an episode stays in the log."""

    class Breaks:
        def __init__(self):
            self.env = LinearMDPEnvironment(NOMINAL)
            self.steps = 0

        def reset(self, *, seed=None):
            return self.env.reset(seed=seed)

        def step(self, action):
            self.steps += 1
            observation, reward, *rest = self.env.step(action)
            return observation, 7.0 if self.steps == 5 else reward, *rest

    agent, clean = build(), build()
    agent.run_episode(env := Breaks())
    clean.run_episode(LinearMDPEnvironment(NOMINAL))
    with pytest.raises(ValueError, match="rewards must be"):
        agent.fit(env, episodes=2)
    assert agent.episodes == 1
    assert [len(log) for log in agent._logs] == [len(log) for log in clean._logs]
    assert agent.run_episode(LinearMDPEnvironment(NOMINAL)) == clean.run_episode(LinearMDPEnvironment(NOMINAL))


def test_learns_an_environment_of_gymnasium():
    """Fails when gymnasium's own environments do not fit: rewards unknown, states in a table."""
    env = gymnasium.make("FrozenLake-v1", map_name="4x4", is_slippery=False, max_episode_steps=8)
    agent = DRRPO(
        tabular_features(16, 4),
        num_actions=4,
        horizon=8,
        uncertainty=TVBall(0.05),
        eta=0.002,
        beta=0.5,
        ridge=0.1,
        refit="doubling",
    )
    agent.fit(env, episodes=150)
    policy = agent.export()
    observation, _ = env.reset(seed=0)
    for step in range(8):
        action = int(policy(step, torch.tensor([observation])).argmax())
        observation, reward, terminated, *_ = env.step(action)
        if terminated:
            break
    assert reward == 1.0


def test_a_put_is_sold_earlier_by_who_fears_a_rise():
    """Fails when robustness has no direction: an adversary who makes prices rise makes selling now worth more."""
    put = AmericanPut(horizon=6)
    sold = {}
    for name, uncertainty in (("plain", NoUncertainty()), ("robust", TVBall(0.1))):
        agent = DRRPO(
            put.features(15),
            num_actions=2,
            horizon=6,
            rewards=put.rewards,
            uncertainty=uncertainty,
            eta=0.002,
            beta=0.01,
            ridge=0.001,
        )
        agent.fit(put, episodes=80)
        sold[name] = float(agent.export()(2, torch.tensor([96.0]))[0, 1])
    assert sold["robust"] > sold["plain"] + 0.1


def test_known_and_estimated_rewards_agree():
    """Fails when rewards that are known beside the features are added twice, or left out."""
    theta = NOMINAL.theta
    by_function = build(rewards=lambda step, states: NOMINAL.features[states] @ theta[step])
    by_weights = build()
    for agent in (by_function, by_weights):
        agent.fit(LinearMDPEnvironment(NOMINAL), episodes=15)
    torch.testing.assert_close(table(by_function.policy), table(by_weights.policy), rtol=1e-9, atol=1e-12)


def test_seeds_differ():
    """Fails when the seed does not reach the draws."""
    first, second, again = (
        partial(agent.fit, LinearMDPEnvironment(NOMINAL), episodes=10)()
        for agent in (build(seed=1), build(seed=2), build(seed=1))
    )
    assert first == again
    assert first != second
    assert math.isfinite(sum(one.earned for one in first))
