"""Does a policy that was learned against an adversary earn more when the dynamics shift, and what does it cost?

Two problems of the paper's group. *linear*: three steps, five states, and a bet on a good outcome that shifted dynamics
turn into failure (share q, in per cent); *put*: an American put option of 20 steps whose price goes up more often at
deployment. Agents play episodes in the simulator and never see the shift. Returns of the policies that they export are
exact, by backward induction, and so are regret and worst cases; only what the agents see is drawn, anew for each seed.

Claims: ``perturbed_return``, ``over_value_iteration``, ``put_perturbed`` (robust agents earn more under the shift),
``nominal_price``, ``put_price`` (and less without it), ``sublinear_regret``, ``as_value_based``, ``as_quick``,
``put_as_value_based`` (as good and as quick as robust value iteration), ``bonus`` (optimism lowers the suboptimality),
``mirror`` (the other reading of the policy step ends in the same place). Each arm's settings are the best of six
trials, by what it seeks itself: its exact return under its own adversary. Four minutes on one core, with the trials.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor

from regularized.evidence.experiment import About, Measurements, Seeds, Tuning, data_fingerprint
from regularized.robustness.robust_policy.environments import AmericanPut, LinearMDPEnvironment, simulated_linear_mdp
from regularized.robustness.robust_policy.model import LinearMDP
from regularized.robustness.robust_policy.policy import Greedy
from regularized.robustness.robust_policy.procedure import DRRPO
from regularized.robustness.robust_policy.uncertainty import NoUncertainty, TVBall, Uncertainty

DEFAULTS: Mapping[str, Any] = {
    "problem": "linear",
    "robust": False,
    "update": "closed_form",
    "eta": 0.05,
    "beta": 0.2,
    "step_size": None,
    "episode_share": 1.0,
}

# The linear problem and its radius are the group's. Radius, ridge and reference policy of the put, which holds nine of
# ten times, were chosen on seed 1000: with a ridge of 0.1 every agent sells at once.
_PROBLEMS: Mapping[str, Any] = {
    "influence": 0.2,
    "radius": 0.5,
    "ridge": 1.0,
    "worst_shift": 100,
    "put_radius": 0.1,
    "put_ridge": 0.001,
    "put_reference": 0.9,
    "put_worst_shift": 70,
    "horizon": 20,
}
SCALES: Mapping[str, Mapping[str, Any]] = {
    "smoke": {**_PROBLEMS, "episodes": 12, "put_episodes": 4, "anchors": 10, "horizon": 5},
    "laptop": {**_PROBLEMS, "episodes": 200, "put_episodes": 100, "anchors": 20},
    # "d = 30, H = 20", "|xi|_1 = 0.2", rho 0.5: the group's scripts. Episodes are ours, since the paper's own numbers
    # could not be read. Half an hour on one core.
    "paper": {**_PROBLEMS, "episodes": 2000, "put_episodes": 1000, "anchors": 30},
}

_PUT = {"problem": "put"}
ARMS: Mapping[str, Mapping[str, Any]] = {
    "value_based_non_robust": {"update": "greedy", "beta": 0.02},
    "non_robust": {"eta": 0.05, "beta": 0.05},
    "value_based": {"robust": True, "update": "greedy", "beta": 0.02},
    "robust": {"robust": True, "eta": 0.01, "beta": 0.05},
    "robust_short": {"robust": True, "eta": 0.01, "beta": 0.05, "episode_share": 0.25},
    "no_bonus": {"robust": True, "eta": 0.005, "beta": 0.0},
    "mirror": {"robust": True, "update": "mirror", "eta": 0.01, "beta": 0.2, "step_size": 20.0},
    "put_value_based_non_robust": {**_PUT, "update": "greedy", "beta": 0.3},
    "put_non_robust": {**_PUT, "eta": 0.0005, "beta": 0.01},
    "put_value_based": {**_PUT, "robust": True, "update": "greedy", "beta": 0.003},
    "put_robust": {**_PUT, "robust": True, "eta": 0.0005, "beta": 0.003},
}

# The best is at an edge for most arms. Two more trials for each, beyond the edges, moved own returns by 0.003 at most
# (linear) and 0.0003 (put), and value iteration stayed where it is with beta up to 3.2: features of the most cautious
# action alone make every other look worse to a ridge regression.
_SOFT = [{"eta": eta, "beta": beta} for eta, beta in product((0.01, 0.02, 0.05), (0.05, 0.2))]
_GREEDY = [{"beta": beta} for beta in (0.02, 0.05, 0.1, 0.2, 0.4, 0.8)]
_PUT_SOFT = [{"eta": eta, "beta": beta} for eta, beta in product((0.0005, 0.001, 0.002), (0.003, 0.01))]
_PUT_GREEDY = [{"beta": beta} for beta in (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)]
TUNING = Tuning(
    metric="own_return",
    direction="higher",
    grids={
        "value_based_non_robust": _GREEDY,
        "non_robust": _SOFT,
        "value_based": _GREEDY,
        "robust": _SOFT,
        "no_bonus": [{"eta": eta} for eta in (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)],
        "mirror": [{"eta": eta, "step_size": size} for eta, size in product((0.01, 0.05), (20.0, 100.0, 500.0))],
        "put_value_based_non_robust": _PUT_GREEDY,
        "put_non_robust": _PUT_SOFT,
        "put_value_based": _PUT_GREEDY,
        "put_robust": _PUT_SOFT,
    },
)

SEEDS = Seeds(
    20,
    first=200,
    why="Ten seeds left one claim open. For twenty fresh ones `regularized outlook robust_policy` said before"
    " the first run that put_perturbed would rather be decided than not.",
)


def about(s: Mapping[str, Any]) -> About:
    """Episodes are drawn anew for each seed."""
    if s["problem"] == "put":
        weights = s["horizon"] * (s["anchors"] + 1)
        return About(f"{s['put_episodes']:,} episodes of an option", s["put_episodes"], f"{weights} weights", weights)
    episodes = round(s["episode_share"] * s["episodes"])
    return About(f"{episodes:,} episodes of three steps", episodes, "12 weights", 12)


def run(s: Mapping[str, Any], seed: int) -> Measurements:
    """Learn in the simulator; measure what the policy earns there, under each shift, and under the adversary."""
    return put(s, seed) if s["problem"] == "put" else linear(s, seed)


def learner(feature_map: Callable[[Tensor], Tensor], s: Mapping[str, Any], seed: int, **options: Any) -> DRRPO:
    """The agent of an arm."""
    named = {name: s[name] for name in ("update", "eta", "beta", "step_size")}
    return DRRPO(feature_map, **named, seed=seed, **options)


# -- the linear problem -------------------------------------------------------------------------


def linear(s: Mapping[str, Any], seed: int) -> Measurements:
    """Regret after every episode, then returns by share of the good outcomes that fail."""
    # Numbers of actions say nothing: a greedy agent without data takes the first, which is the most cautious.
    order = torch.randperm(16, generator=torch.Generator().manual_seed(seed))
    world = linear_problem(s, order)
    # The bet of the first step is what may shift: factor 4, at step 1.
    bet = TVBall((0.0, 0.0, 0.0, s["radius"]))
    adversary: list[Uncertainty] = [bet if s["robust"] else NoUncertainty(), NoUncertainty(), NoUncertainty()]
    agent = learner(
        world.feature_map,
        s,
        seed,
        num_actions=world.num_actions,
        horizon=world.horizon,
        rewards=world.theta,
        uncertainty=adversary,
        ridge=s["ridge"],
    )
    eta = agent.policy_step.regularization
    best = float(world.best(Greedy(), adversary)[1][0, world.start])
    # Mirror steps have no best policy of their own, so nothing to regret.
    best_regularized = (
        None if s["update"] == "mirror" else float(world.best(agent.policy_step, adversary)[1][0, world.start])
    )
    env, suboptimal, regret = LinearMDPEnvironment(world), [], []
    for _ in range(round(s["episode_share"] * s["episodes"])):
        played = table(agent.policy, world)
        suboptimal.append(best - world.value(played, adversary))
        if best_regularized is not None:
            regret.append(best_regularized - world.value(played, adversary, eta=eta))
        agent.run_episode(env)
    policy = table(agent.export(), world)
    returns = {shift: linear_problem(s, order, shift=shift / 100).value(policy) for shift in range(0, 101, 10)}
    own = world.value(policy, adversary)
    return Measurements(
        metrics={
            "own_return": own,
            "robust_return": world.value(policy, [bet, NoUncertainty(), NoUncertainty()]),
            "nominal_return": world.value(policy),
            "perturbed_return": returns[s["worst_shift"]],
            **({"mean_regret": sum(regret) / len(regret)} if regret else {}),
            "mean_suboptimality": sum(suboptimal) / len(suboptimal),
        },
        curves={
            "linear_return_by_shift": list(returns.items()),
            **({"linear_mean_regret": averages(regret)} if regret else {}),
        },
        data=data_fingerprint(world.features.numpy(), world.factors.numpy()),
        curve_unit="episode; for returns, the shift in per cent",
    )


def linear_problem(s: Mapping[str, Any], order: Tensor, *, shift: float | None = None) -> LinearMDP:
    """The problem with its actions in another order."""
    world = simulated_linear_mdp(influence=(s["influence"] / 4,) * 4, shift=shift)
    return dataclasses.replace(world, features=world.features[:, order])


def table(policy: Callable[[int, Tensor], Tensor], world: LinearMDP) -> Tensor:
    """(H, S, A) probabilities of a policy."""
    states = torch.arange(len(world.features))
    return torch.stack([policy(step, states) for step in range(world.horizon)])


def averages(values: Sequence[float], points: int = 20) -> list[tuple[float, float]]:
    """Mean of all values so far, at equal steps."""
    ends = [len(values) * k // points for k in range(1, points + 1)]
    return [(float(end), sum(values[:end]) / end) for end in ends if end]


# -- the option ---------------------------------------------------------------------------------


def put(s: Mapping[str, Any], seed: int) -> Measurements:
    """Returns by the chance, in per cent, that the price goes up. The first price is the seed's own."""
    draws = torch.Generator().manual_seed(seed)
    option = AmericanPut(start=95.0 + 10.0 * float(torch.rand((), generator=draws)), horizon=s["horizon"])
    ball = TVBall(s["put_radius"])
    adversary: Uncertainty = ball if s["robust"] else NoUncertainty()
    holds = s["put_reference"]
    agent = learner(
        option.features(s["anchors"]),
        s,
        seed,
        num_actions=2,
        horizon=s["horizon"],
        rewards=option.rewards,
        uncertainty=adversary,
        ridge=s["put_ridge"],
        reference_policy=torch.tensor([holds, 1.0 - holds], dtype=torch.float64),
        refit="doubling",
    )
    earned = [episode.earned for episode in agent.fit(option, episodes=s["put_episodes"])]
    returned = functools.partial(option.expected_return, agent.export())
    returns = {shift: returned(up_probability=shift / 100) for shift in range(30, 81, 5)}
    return Measurements(
        metrics={
            "own_return": returned(uncertainty=adversary),
            "robust_return": returned(uncertainty=ball),
            "nominal_return": returned(),
            "perturbed_return": returns[s["put_worst_shift"]],
            "share_of_best": returned() / option.best_return(),
        },
        curves={"put_return_by_shift": list(returns.items()), "put_mean_earned": averages(earned)},
        data=data_fingerprint(torch.tensor([option.start]).numpy()),
        curve_unit="episode; for returns, the shift in per cent",
    )
