"""Golden vectors: worst cases and bonuses on logged transitions, regularized policies, and one whole backward pass.

There is no code of the authors. The vectors were made in NumPy and compared with the sibling's code where its search
converges. They have its conventions: the KL penalty leaves out the mass that ridge regression lacks, alpha of the KL
ball is at most the cap, and nothing is clipped. What is searched for is compared to six digits.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from regularized.evidence.conformance import Case, UnknownCase
from regularized.robustness.robust_policy.log import StepLog
from regularized.robustness.robust_policy.planning import backward_pass
from regularized.robustness.robust_policy.policy import Softmax, kl_regularized_policy
from regularized.robustness.robust_policy.regression import exploration_bonus, ridge_regression
from regularized.robustness.robust_policy.uncertainty import (
    Chi2Penalty,
    KLBall,
    KLPenalty,
    TVBall,
    TVPenalty,
    robust_expectation,
)

_SEARCHED = {"kl_constraint_nu_alpha_ge_1e-3", "chi2_penalty_nu"}


def tolerance(case: Case, output: str) -> float:
    """1e-8; 1e-6 where a variable of the dual is searched for."""
    return 1e-6 if output in _SEARCHED else 1e-8


def compute(case: Case) -> Mapping[str, NDArray[Any]]:
    """What a case's keys ask for."""
    if case.has("in/phi", "in/v_next"):
        found = _worst_cases(case)
    elif case.has("in/q", "in/reference_policy"):
        found = _policies(case)
    elif case.has("in/features", "in/theta", "in/states"):
        found = _pass(case)
    else:
        raise UnknownCase(case)
    return {name: tensor.numpy() for name, tensor in found.items()}


def _worst_cases(case: Case) -> dict[str, Tensor]:
    regression = ridge_regression(_tensor(case, "phi"), ridge=case.number("ridge", 1.0))
    weights, values, cap = regression.weights, _tensor(case, "v_next"), case.number("value_cap")
    found = {"Lambda": regression.gram}
    if case.has("in/rho"):
        radius = tuple(np.broadcast_to(case.inputs["rho"], len(weights)).tolist())
        ball = TVBall(radius).worst(weights, values, cap=cap, lowest=0.0)
        assert ball.alpha is not None
        found |= {"tv_constraint_nu": ball.value, "tv_constraint_alpha": ball.alpha}
        kl_ball = KLBall(radius, up_to_cap=True)
        found["kl_constraint_nu_alpha_ge_1e-3"] = robust_expectation(weights, values, kl_ball, cap=cap)
    if case.has("hp/penalty"):
        sigma = case.number("penalty")
        kl = KLPenalty(sigma, centred=False)
        found["kl_penalty_nu"] = robust_expectation(weights, values, kl, cap=cap)
        found["tv_penalty_nu"] = robust_expectation(weights, values, TVPenalty(sigma), cap=cap, lowest=None)
        found["tv_penalty_nu_failstate"] = robust_expectation(weights, values, TVPenalty(sigma), cap=cap)
        found["chi2_penalty_nu"] = robust_expectation(weights, values, Chi2Penalty(sigma), cap=cap)
    if case.has("in/query_phi"):
        query, inverse = _tensor(case, "query_phi"), regression.inverse
        found["bonus_sum_diag"] = exploration_bonus(query, inverse, kind="sum_diag")
        found["bonus_l2_diag"] = exploration_bonus(query, inverse, kind="l2_diag")
        found["bonus_elliptic"] = exploration_bonus(query, inverse, kind="elliptic")
    return found


def _policies(case: Case) -> dict[str, Tensor]:
    """One for each eta; a case with a single one may leave out its number."""
    found: dict[str, Tensor] = {}
    for name in case.hp:
        if name.startswith("eta"):
            number = name.removeprefix("eta")
            policy, value = kl_regularized_policy(_tensor(case, "q"), _reference(case), case.number(name))
            found |= {f"policy{number}": policy, f"value{number}": value}
    return found


def _pass(case: Case) -> dict[str, Tensor]:
    features, theta = _tensor(case, "features"), _tensor(case, "theta")
    states, actions, next_states = (torch.as_tensor(case.inputs[name]) for name in ("states", "actions", "next_states"))
    reference, horizon = _reference(case), len(theta)
    alive = torch.ones(len(features), dtype=torch.bool)
    fail_state = int(case.number("fail_state", -1))
    if fail_state >= 0:
        alive[fail_state] = False
    logs = []
    for step in range(horizon):
        log = StepLog(num_actions=features.shape[1], width=features.shape[2], dtype=features.dtype)
        log.append(
            features=features[states[step], actions[step]],
            next_features=features[next_states[step]],
            next_reference=reference[next_states[step]],
            alive=alive[next_states[step]],
        )
        logs.append(log)
    radii = np.broadcast_to(case.inputs["rho"], tuple(theta.shape)).tolist()
    policy_step = Softmax(case.number("eta"))
    values = backward_pass(
        logs,
        uncertainty=[TVBall(tuple(row)) for row in radii],
        policy_step=policy_step,
        theta=theta,
        ridge=case.number("ridge", 1.0),
        beta=case.number("beta", 0.0),
        clip=False,
    )
    q = torch.stack([values(step, features) for step in range(horizon)])
    q[:, ~alive] = 0.0
    return {
        "w": values.weights,
        "q": q,
        "policy": policy_step.policy(q, reference),
        "value": policy_step.value(q, q, reference),
    }


def _reference(case: Case) -> Tensor:
    return _tensor(case, "reference_policy")


def _tensor(case: Case, name: str) -> Tensor:
    return torch.as_tensor(case.inputs[name], dtype=torch.float64)
