"""Cost of the adversary beside the same agent without one, of exact duals beside a search, and of learning rarely.

No package has the algorithm. The nearest code is the sibling's, whose dual variables are searched for one by one with
SciPy's Nelder-Mead; its operations are typed anew here.
"""

from functools import partial

import torch
from torch import Tensor

from regularized.evidence.bench import StepFunction, Workload
from regularized.robustness.robust_policy.environments import AmericanPut
from regularized.robustness.robust_policy.procedure import DRRPO, Refit
from regularized.robustness.robust_policy.regression import ridge_regression
from regularized.robustness.robust_policy.uncertainty import (
    KLPenalty,
    NoUncertainty,
    TVBall,
    Uncertainty,
    robust_expectation,
)

_PUT = AmericanPut()
_KEPT, _WIDTH, _CAP = 200, 30, 3.0


def _agent(uncertainty: Uncertainty, refit: Refit, episodes: int) -> DRRPO:
    agent = DRRPO(
        _PUT.features(_WIDTH),
        num_actions=2,
        horizon=20,
        rewards=_PUT.rewards,
        uncertainty=uncertainty,
        eta=0.002,
        beta=0.01,
        ridge=0.001,
        reference_policy=torch.tensor([0.9, 0.1], dtype=torch.float64),
        refit=refit,
    )
    agent.fit(_PUT, episodes=episodes)
    return agent


def _episodes(plain: tuple[Uncertainty, Refit], method: tuple[Uncertainty, Refit]) -> tuple[StepFunction, StepFunction]:
    """The episode behind the first 200; the state is put back each time, so that the log does not grow."""

    def step(uncertainty: Uncertainty, refit: Refit) -> StepFunction:
        agent = _agent(uncertainty, refit, _KEPT)
        state = agent.state_dict()

        def play() -> None:
            agent.load_state_dict(state)
            agent.fit(_PUT, episodes=5)

        return play

    return step(*plain), step(*method)


def _logged() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    features = torch.rand(_KEPT, _WIDTH, generator=generator, dtype=torch.float64).softmax(dim=1)
    return ridge_regression(features, ridge=0.1).weights, _CAP * torch.rand(_KEPT, generator=generator).double()


def _searched(weights: Tensor, values: Tensor, radius: float) -> StepFunction:
    from scipy.optimize import minimize

    rows, sample = weights.numpy(), values.numpy()

    def step() -> None:
        for row in rows:
            minimize(
                lambda alpha, row=row: radius * alpha[0] - row @ sample.clip(max=alpha[0]),
                _CAP / 2,
                method="Nelder-Mead",
                bounds=[(0, _CAP)],
            )

    return step


def _duals() -> tuple[StepFunction, StepFunction]:
    weights, values = _logged()

    def exact() -> None:
        robust_expectation(weights, values, TVBall(0.1), cap=_CAP)

    return _searched(weights, values, 0.1), exact


def workloads() -> list[Workload]:
    """Five episodes of an option after 200, and the duals of one step."""
    size = "option, 20 steps, 31 features, 5 episodes behind 200"
    plain: tuple[Uncertainty, Refit] = (NoUncertainty(), "every")
    return [
        Workload(f"{size}, total variation", partial(_episodes, plain, (TVBall(0.1), "every"))),
        Workload(f"{size}, KL penalty", partial(_episodes, plain, (KLPenalty(0.03), "every"))),
        Workload(
            f"{size}, learning when a determinant has doubled",
            partial(_episodes, (TVBall(0.1), "every"), (TVBall(0.1), "doubling")),
            "learning before every episode counts as 1",
            floor=0.5,
        ),
        Workload(
            "duals of one step, 30 factors, 200 transitions",
            _duals,
            "the sibling's search, coordinate by coordinate, counts as 1",
            floor=0.0,
        ),
    ]
