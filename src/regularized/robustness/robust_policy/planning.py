"""From logged transitions to action values and a policy: one pass backwards through the horizon.

At step h of H, from the last one to the first, with the symbols of
:mod:`~regularized.robustness.robust_policy.uncertainty`::

    Z_h = Lambda_h^-1 Phi_h^T                                        ridge regression
    nu_h = worst case of E[V_{h+1}] under Z_h, in [0, H - h]         0 at the last step
    Q_h(s, a) = phi^T (theta_h + nu_h) + beta * bonus_h(phi)         in [0, H - h + 1]
    pi_h, V_h from Q_h around the reference policy                   V = 0 where an episode has ended

The paper could not be read beyond its abstract. This pass is assembled from it and from the published algorithms of
the same group (DR-LSVI-UCB for the bonus and the order, R2PVI for penalties): ours, where it says so on the card.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from regularized.robustness.robust_policy.log import StepLog
from regularized.robustness.robust_policy.policy import PolicyStep
from regularized.robustness.robust_policy.regression import Bonus, exploration_bonus, ridge_regression
from regularized.robustness.robust_policy.uncertainty import Uncertainty, robust_expectation

__all__ = ["ActionValues", "LinearPolicy", "Observed", "backward_pass", "remembered"]

Observed: TypeAlias = Callable[[int, Tensor], Tensor]
"""``(step, observations) -> (n, A)``: known rewards, or a reference policy. Steps count from 0."""

_FORGOTTEN = 1e-12


@dataclass(frozen=True, slots=True)
class ActionValues:
    """Action values, linear in the features but for a bonus and clipping.

    Args:
        weights: (H, d) ``theta + nu`` of each step, or ``nu`` alone where rewards are given beside the features.
        inverses: (H, d, d) inverses of Lambda.
        beta: factor of the exploration bonus; 0 for none.
        bonus: its kind, see :func:`~regularized.robustness.robust_policy.exploration_bonus`.
    """

    weights: Tensor
    inverses: Tensor
    beta: float
    bonus: Bonus = "sum_diag"

    def __call__(self, step: int, features: Tensor, rewards: Tensor | None = None) -> Tensor:
        """Q of one step.

        Args:
            step: counted from 0.
            features: (..., A, d).
            rewards: (..., A) known rewards beside the features; default none.

        Returns:
            (..., A) values in [0, H - step].
        """
        q = features @ self.weights[step]
        if rewards is not None:
            q = q + rewards
        if self.beta:
            q = q + self.beta * exploration_bonus(features, self.inverses[step], kind=self.bonus)
        return q.clamp(0.0, len(self.weights) - step)


def backward_pass(
    logs: Sequence[StepLog],
    *,
    uncertainty: Sequence[Uncertainty],
    policy_step: PolicyStep,
    theta: Tensor | None = None,
    ridge: float = 1.0,
    beta: float = 0.0,
    bonus: Bonus = "sum_diag",
    lowest: float | None = 0.0,
    clip: bool = True,
) -> ActionValues:
    """Action values from what was logged; adds to the sums that mirror steps remember.

    Args:
        logs: transitions of each of H steps.
        uncertainty: what the adversary may do at each step; that of the last step has no effect.
        policy_step: how the policy follows from action values.
        theta: (H, d) known reward weights; default None, estimated from the logged rewards by the same regression.
        ridge: lambda of the regression; default 1.
        beta: factor of the exploration bonus; default 0.
        bonus: its kind.
        lowest: least value that the adversary can reach; default 0, that of a fail state. None takes the least seen.
        clip: whether ``nu`` is kept in its range; default True.

    Returns:
        The action values.
    """
    horizon, width = len(logs), logs[0].features.shape[1]
    weights = logs[0].features.new_zeros(horizon, width)
    inverses = weights.new_zeros(horizon, width, width)
    q = ActionValues(weights, inverses, beta, bonus)
    for step in reversed(range(horizon)):
        log, left = logs[step], horizon - 1 - step
        regression = ridge_regression(log.features, ridge=ridge)
        inverses[step] = regression.inverse
        weights[step] = regression.weights @ log.rewards if theta is None else theta[step]
        if left == 0:
            continue
        next_q = q(step + 1, log.next_features, log.next_rewards)
        total = log.next_total
        total.mul_(policy_step.keep).add_(next_q)
        values = policy_step.value(total, next_q, log.next_reference).masked_fill(~log.alive, 0.0)
        nu = robust_expectation(regression.weights, values, uncertainty[step], cap=float(left), lowest=lowest)
        weights[step] += nu.clamp(0.0, left) if clip else nu
    return q


class LinearPolicy:
    """A policy for each step, from features and learned weights: what an agent follows, and what it leaves behind.

    Args:
        feature_map: observations (n, ...) to features (n, A, d) of all actions.
        policy_step: how the policy follows from action values.
        reference: the reference policy.
        values: action values, oldest first; mirror steps need all of them, the closed form the last one. None is the
            reference policy itself.
        rewards: known rewards beside the features; default None.

    Examples:
        >>> import torch
        >>> from regularized.robustness.robust_policy import Softmax, tabular_features
        >>> values = ActionValues(torch.tensor([[0.0, 1.0, 0.0, 0.0]]), torch.eye(4)[None], beta=0.0)
        >>> uniform = lambda step, observations: torch.full((len(observations), 2), 0.5)
        >>> policy = LinearPolicy(tabular_features(2, 2, dtype=torch.float32), Softmax(eta=1.0), uniform, [values])
        >>> policy(0, torch.tensor([0, 1]))
        tensor([[0.2689, 0.7311],
                [0.5000, 0.5000]])
    """

    def __init__(
        self,
        feature_map: Callable[[Tensor], Tensor],
        policy_step: PolicyStep,
        reference: Observed,
        values: Sequence[ActionValues],
        *,
        rewards: Observed | None = None,
    ) -> None:
        self.feature_map = feature_map
        self.policy_step = policy_step
        self.reference = reference
        self.rewards = rewards
        self.values = list(values)

    def q(self, step: int, observations: Tensor) -> Tensor:
        """Newest action values.

        Args:
            step: counted from 0.
            observations: (n, ...).

        Returns:
            (n, A).
        """
        return self._values(step, observations)[0]

    def total(self, step: int, observations: Tensor) -> Tensor:
        """(n, A) sums of action values, discounted by age; where nothing of the last policy is kept, the newest."""
        return self._values(step, observations)[1]

    def __call__(self, step: int, observations: Tensor) -> Tensor:
        """Probabilities of the actions.

        Args:
            step: counted from 0.
            observations: (n, ...).

        Returns:
            (n, A).
        """
        reference = self.reference(step, observations)
        if not self.values:
            return reference
        return self.policy_step.policy(self.total(step, observations), reference)

    def _values(self, step: int, observations: Tensor) -> tuple[Tensor, Tensor]:
        features = self.feature_map(observations)
        rewards = None if self.rewards is None else self.rewards(step, observations)
        newest = self.values[-1](step, features, rewards)
        total, discount = newest, self.policy_step.keep
        for values in reversed(self.values[:-1]):
            if discount < _FORGOTTEN:
                break
            total, discount = total + discount * values(step, features, rewards), discount * self.policy_step.keep
        return newest, total


def remembered(policy_step: PolicyStep) -> int:
    """How many of the last action values a policy depends on.

    Args:
        policy_step: how it follows from them.

    Examples:
        >>> from regularized.robustness.robust_policy import Softmax
        >>> remembered(Softmax(0.1)), remembered(Softmax(0.1, step_size=10.0))
        (1, 40)
    """
    return 1 if policy_step.keep == 0.0 else math.ceil(math.log(_FORGOTTEN) / math.log(policy_step.keep))
