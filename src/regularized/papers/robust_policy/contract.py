"""What the contract suite checks of the robust agent: closed form, mirror steps, and rare learning on an option."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from regularized.evidence.contract import ProcedureSubject
from regularized.robustness.robust_policy.environments import AmericanPut, LinearMDPEnvironment, simulated_linear_mdp
from regularized.robustness.robust_policy.procedure import DRRPO
from regularized.robustness.robust_policy.uncertainty import KLBall, NoUncertainty, TVBall

_WORLD = simulated_linear_mdp()
_PUT = AmericanPut(horizon=4)


def _linear(**options: Any) -> DRRPO:
    settings = {"uncertainty": TVBall(0.3), "num_actions": 16, "horizon": 3, **options}
    return DRRPO(_WORLD.feature_map, rewards=_WORLD.theta, **settings)


def _option(**options: Any) -> DRRPO:
    settings = {"uncertainty": KLBall(0.05), "num_actions": 2, "horizon": 4, "eta": 0.01, "ridge": 0.01, **options}
    return DRRPO(_PUT.features(8), rewards=_PUT.rewards, refit="doubling", **settings)


def _play(agent: DRRPO, epochs: int) -> None:
    agent.fit(LinearMDPEnvironment(_WORLD), episodes=10 * epochs)


def _trade(agent: DRRPO, epochs: int) -> None:
    agent.fit(_PUT, episodes=10 * epochs)


def _policies(agent: DRRPO) -> Mapping[str, Tensor]:
    states = torch.arange(5)
    return {f"step {step}": agent.policy(step, states) for step in range(agent.horizon)}


def _decisions(agent: DRRPO) -> Mapping[str, Tensor]:
    prices = torch.linspace(92.0, 104.0, 7)
    return {f"step {step}": agent.policy(step, prices) for step in range(agent.horizon)}


def subjects() -> list[ProcedureSubject]:
    """Plain is the same agent without an adversary."""
    mirror = partial(_linear, update="mirror", step_size=10.0)
    nominal = NoUncertainty()
    return [
        ProcedureSubject("closed form", _linear, partial(_linear, uncertainty=nominal), _play, _policies),
        ProcedureSubject("mirror steps", mirror, partial(mirror, uncertainty=nominal), _play, _policies),
        ProcedureSubject("option", _option, partial(_option, uncertainty=nominal), _trade, _decisions),
    ]
