"""Linear problems whose factors are known: the best robust policy, and what a policy earns at worst, without sampling.

This is what an agent's suboptimality is measured by. The worst case is the exact one, of probabilities.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from regularized.robustness.robust_policy.policy import PolicyStep, regularized_value
from regularized.robustness.robust_policy.uncertainty import NoUncertainty, Uncertainty, robust_expectation

__all__ = ["LinearMDP"]


@dataclass(frozen=True, slots=True, eq=False)
class LinearMDP:
    """A finite problem with ``P_h(.|s,a) = sum_i phi_i(s,a) mu_h,i`` and ``r_h(s,a) = phi(s,a)^T theta_h``.

    Args:
        features: (S, A, d) features, points of the simplex.
        factors: (H, d, S) distributions mu of the next state.
        theta: (H, d) reward weights.
        terminal: (S,) states in which nothing can be earned any more.
        start: the first state; default 0.

    Raises:
        ValueError: shapes do not fit, or features or factors are no distributions.

    Examples:
        One state and two actions, of which the second earns 1 in each of two steps:

        >>> features = torch.eye(2).view(1, 2, 2)
        >>> rewards = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
        >>> model = LinearMDP(features, torch.ones(2, 2, 1), rewards, torch.tensor([False]))
        >>> model.value(torch.full((2, 1, 2), 0.5))
        1.0
    """

    features: Tensor
    factors: Tensor
    theta: Tensor
    terminal: Tensor
    start: int = 0

    def __post_init__(self) -> None:
        states, _, width = self.features.shape
        wanted = {
            "factors": (len(self.theta), width, states),
            "theta": (len(self.theta), width),
            "terminal": (states,),
        }
        for name, shape in wanted.items():
            if tuple(getattr(self, name).shape) != shape:
                raise ValueError(f"{name} must be of shape {shape}, got {tuple(getattr(self, name).shape)}")
        for name in ("features", "factors"):
            rows = getattr(self, name)
            if not bool((rows >= 0).all()) or not torch.allclose(rows.sum(dim=-1), torch.ones((), dtype=rows.dtype)):
                raise ValueError(f"{name} must be >= 0 and sum to 1 over the last dimension; divide them by their sum")

    @property
    def horizon(self) -> int:
        """H."""
        return len(self.theta)

    @property
    def num_actions(self) -> int:
        """A."""
        return self.features.shape[1]

    def feature_map(self, states: Tensor) -> Tensor:
        """(n, A, d) features of (n,) states, as an agent asks for them."""
        return self.features[states]

    def best(
        self,
        policy_step: PolicyStep,
        uncertainty: Sequence[Uncertainty] | Uncertainty | None = None,
        *,
        reference: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The best policy under the worst case, by exact backward induction.

        Args:
            policy_step: how the policy follows from action values; mirror steps have no best policy of their own.
            uncertainty: what the adversary may do, one for all steps or one for each; default none.
            reference: (A,) or (S, A) reference policy; default uniform.

        Returns:
            (H, S, A) probabilities and (H, S) values, less what the divergence from the reference costs.
        """
        reference = self._reference(reference)
        value, policies, values = self.theta.new_zeros(len(self.features)), [], []
        for step in reversed(range(self.horizon)):
            q = self._backup(step, value, uncertainty)
            policies.append(policy_step.policy(q, reference))
            value = policy_step.value(q, q, reference).masked_fill(self.terminal, 0.0)
            values.append(value)
        return torch.stack(policies[::-1]), torch.stack(values[::-1])

    def value(
        self,
        policy: Tensor,
        uncertainty: Sequence[Uncertainty] | Uncertainty | None = None,
        *,
        eta: float = 0.0,
        reference: Tensor | None = None,
    ) -> float:
        """What a policy earns from the start under the worst case.

        Args:
            policy: (H, S, A) probabilities.
            uncertainty: what the adversary may do; default none: the expected return.
            eta: price of a nat of divergence from the reference; default 0.
            reference: (A,) or (S, A) reference policy; default uniform.
        """
        reference = self._reference(reference)
        value = self.theta.new_zeros(len(self.features))
        for step in reversed(range(self.horizon)):
            q = self._backup(step, value, uncertainty)
            value = regularized_value(policy[step], q, reference, eta).masked_fill(self.terminal, 0.0)
        return float(value[self.start])

    def _backup(self, step: int, value: Tensor, uncertainty: Sequence[Uncertainty] | Uncertainty | None) -> Tensor:
        """(S, A) action values, given those of the states one step later."""
        if isinstance(uncertainty, Sequence):
            uncertainty = uncertainty[step]
        allowed = NoUncertainty() if uncertainty is None else uncertainty
        nu = robust_expectation(self.factors[step], value, allowed, cap=float(self.horizon))
        return self.features @ (self.theta[step] + nu)

    def _reference(self, reference: Tensor | None) -> Tensor:
        if reference is None:
            return self.features.new_full((1, self.num_actions), 1.0 / self.num_actions)
        return reference if reference.dim() == 2 else reference[None]
