"""Policies around a reference policy: the softmax that is best for given action values, mirror steps, and argmax.

With action values Q, a reference policy and the price eta of a nat of divergence from it::

    pi = argmax  E_pi[Q] - eta KL(pi || pi_ref)                             pi ~ pi_ref exp(Q / eta)
    V  = max     E_pi[Q] - eta KL(pi || pi_ref)                             V = eta log E_ref[exp(Q / eta)]
    mirror step  argmax E_pi[Q] - eta KL(pi || pi_ref) - KL(pi || pi_last) / t

The mirror step of size t keeps a share ``1 / (1 + eta t)`` of the last policy's logits. Started at the reference, the
policy after j steps is ``pi_ref exp(s sum_i keep^(j - i) Q_i)`` with ``s = t / (1 + eta t)``: a sum of action values,
discounted by age, is all that has to be remembered. An infinite step is the closed form.

Whether the paper takes the closed form or mirror steps could not be read; both are here, the closed form is the
default, and the mirror step is our reconstruction.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from regularized.mechanisms.ranges import allowed, check_fields, positive

__all__ = ["Greedy", "PolicyStep", "Softmax", "kl_regularized_policy", "regularized_value"]

_ETA = positive(
    "the price of a nat of divergence from the reference policy",
    "for the policy without it take Greedy(), update='greedy'",
)


@allowed(eta=_ETA)
def kl_regularized_policy(q: Tensor, reference: Tensor, eta: float) -> tuple[Tensor, Tensor]:
    """The policy that is best for action values less eta times its divergence from the reference, and its value.

    Args:
        q: (..., A) action values.
        reference: (..., A) probabilities; an action of probability 0 stays at 0.
        eta: price of a nat, in the unit of ``q``. Towards 0 it is the best action, towards infinity the reference.

    Returns:
        (..., A) probabilities and (...) values ``E_pi[Q] - eta KL(pi || reference)``.

    Raises:
        ValueError: ``eta`` is not positive.

    Examples:
        >>> policy, value = kl_regularized_policy(torch.tensor([0.0, 1.0]), torch.tensor([0.5, 0.5]), eta=1.0)
        >>> policy, value
        (tensor([0.2689, 0.7311]), tensor(0.6201))
    """
    logits = q / eta + reference.log()
    log_total = logits.logsumexp(dim=-1, keepdim=True)
    return (logits - log_total).exp(), eta * log_total.squeeze(-1)


def regularized_value(policy: Tensor, q: Tensor, reference: Tensor, eta: float) -> Tensor:
    """``E_pi[Q] - eta KL(pi || reference)`` of any policy; minus infinity where it does what the reference never does.

    Args:
        policy: (..., A) probabilities.
        q: (..., A) action values.
        reference: (..., A) probabilities.
        eta: price of a nat; 0 is the value without regularization.

    Returns:
        (...) values.

    Examples:
        >>> regularized_value(torch.tensor([1.0, 0.0]), torch.tensor([2.0, 0.0]), torch.tensor([0.5, 0.5]), eta=1.0)
        tensor(1.3069)
    """
    expected = (policy * q).sum(dim=-1)
    if eta == 0.0:
        return expected
    log_ratio = torch.where(policy > 0, policy.log() - reference.log(), 0.0)
    return expected - eta * (policy * log_ratio).sum(dim=-1)


class PolicyStep(Protocol):
    """How a policy follows from action values."""

    @property
    def keep(self) -> float:
        """Share of the last policy that remains, in [0, 1)."""
        ...

    @property
    def regularization(self) -> float:
        """Price eta of a nat of divergence from the reference in the objective; 0 for none."""
        ...

    def policy(self, total: Tensor, reference: Tensor) -> Tensor:
        """(..., A) probabilities from the discounted sum of action values; where ``keep`` is 0, from the newest."""
        ...

    def value(self, total: Tensor, q: Tensor, reference: Tensor) -> Tensor:
        """(...) value of that policy by the newest action values."""
        ...


@dataclass(frozen=True, slots=True)
class Softmax:
    """The regularized policy, in closed form or by mirror steps.

    Args:
        eta: price of a nat of divergence from the reference policy, in the unit of returns.
        step_size: t of a mirror step from the last policy; default infinity, the closed form.

    Raises:
        ValueError: one of them is not positive.

    Examples:
        >>> Softmax(eta=0.1).keep, Softmax(eta=0.1, step_size=10.0).keep
        (0.0, 0.5)
    """

    eta: float
    step_size: float = math.inf

    def __post_init__(self) -> None:
        check_fields(
            self, eta=_ETA, step_size=positive("of a mirror step", "infinity is the closed form", infinity=True)
        )

    @property
    def keep(self) -> float:
        """``1 / (1 + eta t)``."""
        return 1.0 / (1.0 + self.eta * self.step_size)

    @property
    def regularization(self) -> float:
        """Eta."""
        return self.eta

    @property
    def temperature(self) -> float:
        """What the discounted sum of action values is divided by: eta, and as much again as the last policy holds."""
        return self.eta + 1.0 / self.step_size

    def policy(self, total: Tensor, reference: Tensor) -> Tensor:
        """Softmax around the reference, see :meth:`PolicyStep.policy`."""
        return kl_regularized_policy(total, reference, self.temperature)[0]

    def value(self, total: Tensor, q: Tensor, reference: Tensor) -> Tensor:
        """Expectation less eta times the divergence, see :meth:`PolicyStep.value`."""
        if self.keep == 0.0:
            return kl_regularized_policy(q, reference, self.eta)[1]
        return regularized_value(self.policy(total, reference), q, reference, self.eta)


@dataclass(frozen=True, slots=True)
class Greedy:
    """The best action that the reference allows: value iteration, without regularization."""

    @property
    def keep(self) -> float:
        """0."""
        return 0.0

    @property
    def regularization(self) -> float:
        """0."""
        return 0.0

    def policy(self, total: Tensor, reference: Tensor) -> Tensor:
        """All on the first of the best actions, see :meth:`PolicyStep.policy`."""
        best = total.masked_fill(reference == 0, -math.inf).argmax(dim=-1, keepdim=True)
        return torch.zeros_like(total).scatter(-1, best, 1.0)

    def value(self, total: Tensor, q: Tensor, reference: Tensor) -> Tensor:
        """The largest action value that the reference allows, see :meth:`PolicyStep.value`."""
        return q.masked_fill(reference == 0, -math.inf).amax(dim=-1)
