"""Environments of the paper's kind by gymnasium's interface: a linear problem with shifted dynamics, an American put.

They need no gymnasium: whatever has its ``reset`` and ``step`` is an environment.
:func:`~regularized.robustness.robust_policy.gymnasium.as_gymnasium` makes them ``gymnasium.Env``.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from regularized.mechanisms.ranges import allowed, between, count, positive, share
from regularized.robustness.robust_policy.model import LinearMDP
from regularized.robustness.robust_policy.uncertainty import NoUncertainty, Uncertainty, robust_expectation

__all__ = ["AmericanPut", "LinearMDPEnvironment", "simulated_linear_mdp", "tabular_features"]


class LinearMDPEnvironment:
    """A :class:`LinearMDP` to play in: observations are numbers of states.

    Args:
        model: the problem.

    Examples:
        >>> env = LinearMDPEnvironment(simulated_linear_mdp())
        >>> env.reset(seed=0)
        (0, {})
        >>> observation, reward, terminated, truncated, info = env.step(15)
        >>> observation, reward, terminated, truncated
        (4, 0.0, False, False)
    """

    def __init__(self, model: LinearMDP) -> None:
        self.model = model
        self._generator = torch.Generator()
        self._state = model.start
        self._step = 0

    @property
    def num_actions(self) -> int:
        """A."""
        return self.model.num_actions

    @property
    def num_states(self) -> int:
        """How many observations there are, counted from 0."""
        return len(self.model.features)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        """Begin an episode.

        Args:
            seed: of the draws from here on; default None, they go on.
            options: not used.
        """
        if seed is not None:
            self._generator.manual_seed(seed)
        self._state, self._step = self.model.start, 0
        return self._state, {}

    def step(self, action: int) -> tuple[int, float, bool, bool, dict[str, Any]]:
        """Take an action; the episode ends in a terminal state, or is truncated at the horizon."""
        features = self.model.features[self._state, action]
        reward = float(features @ self.model.theta[self._step])
        chances = features @ self.model.factors[self._step]
        self._state = int(torch.multinomial(chances, 1, generator=self._generator))
        self._step += 1
        terminated = bool(self.model.terminal[self._state])
        return self._state, reward, terminated, self._step == self.model.horizon, {}


@allowed(
    shift=share("of the good outcomes that the shifted dynamics turn into failure").or_none("the nominal dynamics"),
    base=between(0.0, 1.0, "()", "delta, the chance of the good outcome without influence"),
)
def simulated_linear_mdp(
    *, shift: float | None = None, base: float = 0.3, influence: tuple[float, ...] = (0.05,) * 4
) -> LinearMDP:
    """The simulated linear problem of the paper's group: three steps, five states, a bet that shifted dynamics spoil.

    From x1 an action with good features leads to x5, which earns 1 at each of the two steps that follow; otherwise to
    x2, where there is a second chance. Under the shift a part of what led to x5 leads to x4 instead, the fail state.

    Args:
        shift: q in [0, 1], at the first step; default None, the nominal dynamics (which lead from x1 and x2 to the fail
            state once in a thousand times, where the shifted first step does not).
        base: delta; default 0.3 (the sibling's code).
        influence: xi, what each component of an action, -1 or 1, adds to the chance; default four times 0.05: in all
            0.2, of the sibling's 0.1, 0.2 and 0.3.

    Returns:
        The problem, with ``2 ** len(influence)`` actions: all signs, (-1, ..., -1) first.

    Raises:
        ValueError: the shift is no share, or some action would have a chance outside [0, 1].

    Examples:
        >>> cautious = torch.zeros(3, 5, 16, dtype=torch.float64)
        >>> cautious[:, :, 0] = 1.0  # the action with the smallest chance
        >>> [round(simulated_linear_mdp(shift=shift).value(cautious), 2) for shift in (0.0, 1.0)]
        [0.46, 0.26]
    """
    actions = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=len(influence))), dtype=torch.float64)
    chance = base + actions @ torch.tensor(influence, dtype=torch.float64)
    if not bool(((chance >= 0) & (chance <= 1)).all()):
        raise ValueError(
            f"base +- the sum of influence must stay in [0, 1], got {chance.min():g} to {chance.max():g}; make "
            "influence smaller"
        )
    features = torch.zeros(5, len(actions), 4, dtype=torch.float64)
    for state in range(3):
        features[state, :, state], features[state, :, 3] = 1.0 - chance, chance
    features[3, :, 2], features[4, :, 3] = 1.0, 1.0
    second, third, failed, good = 1, 2, 3, 4
    factors = torch.zeros(3, 4, 5, dtype=torch.float64)
    factors[:, 2, failed] = factors[:, 3, good] = 1.0
    slip = 0.001
    factors[0, 0, second], factors[0, 0, failed] = 1.0 - slip, slip
    factors[1, 1, third], factors[1, 1, failed] = 1.0 - slip, slip
    # Not reached: x2 and x3 at the first step, x1 later on.
    factors[0, 1, third] = factors[1, 0, third] = factors[2, 0, third] = factors[2, 1, third] = 1.0
    if shift is not None:
        factors[0, 0, second], factors[0, 0, failed] = 1.0, 0.0
        factors[0, 3, failed], factors[0, 3, good] = shift, 1.0 - shift
    theta = torch.zeros(3, 4, dtype=torch.float64)
    theta[1:, 3] = 1.0
    terminal = torch.arange(5) == failed
    return LinearMDP(features, factors, theta, terminal)


class AmericanPut:
    """An American put option: at each step hold it (action 0), or sell at the strike and be done (action 1).

    The price goes up or down by 2 %. What is earned is ``max(0, 1 - price / strike)``, once; rewards are shares of the
    strike. At deployment the price may go up more often than it did in the simulator.

    Args:
        start: first price; default 100.
        up_probability: default 0.5.
        horizon: steps; default 20.
        strike: default 100.
        up: factor of a step up; default 1.02.
        down: factor of a step down; default 0.98.

    Raises:
        ValueError: an option is out of range.

    Examples:
        >>> put = AmericanPut(up_probability=0.0)
        >>> put.reset(seed=0)
        (100.0, {})
        >>> put.step(0)
        (98.0, 0.0, False, False, {})
        >>> observation, reward, terminated, truncated, info = put.step(1)
        >>> round(reward, 2), terminated
        (0.02, True)
    """

    num_actions: int = 2

    @allowed(
        start=positive("a price"),
        up_probability=share(),
        horizon=count(1),
        strike=positive("a price"),
        up=positive("the factor of a step up"),
        down=positive("the factor of a step down"),
    )
    def __init__(
        self,
        *,
        start: float = 100.0,
        up_probability: float = 0.5,
        horizon: int = 20,
        strike: float = 100.0,
        up: float = 1.02,
        down: float = 0.98,
    ) -> None:
        self.start = start
        self.up_probability = up_probability
        self.horizon = horizon
        self.strike = strike
        self.up = up
        self.down = down
        self._generator = torch.Generator()
        self._price = start
        self._step = 0

    @property
    def lowest(self) -> float:
        """The lowest price that can be reached."""
        return self.start * self.down**self.horizon

    @property
    def highest(self) -> float:
        """The highest price that can be reached."""
        return self.start * self.up**self.horizon

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[float, dict[str, Any]]:
        """Begin an episode.

        Args:
            seed: of the draws from here on; default None, they go on.
            options: not used.
        """
        if seed is not None:
            self._generator.manual_seed(seed)
        self._price, self._step = self.start, 0
        return self._price, {}

    def step(self, action: int) -> tuple[float, float, bool, bool, dict[str, Any]]:
        """Hold or sell; selling terminates the episode, and the horizon truncates it."""
        self._step += 1
        ends = self._step == self.horizon
        if action == 1:
            return self._price, float(self.payoff(torch.tensor(self._price))), True, ends, {}
        goes_up = bool(torch.rand((), generator=self._generator) < self.up_probability)
        self._price *= self.up if goes_up else self.down
        return self._price, 0.0, False, ends, {}

    def payoff(self, prices: Tensor) -> Tensor:
        """What selling earns at these prices, as a share of the strike."""
        return (1.0 - prices / self.strike).clamp(min=0.0)

    def rewards(self, step: int, prices: Tensor) -> Tensor:
        """(n, 2) known rewards of both actions at (n,) or (n, 1) prices: what an agent takes as ``rewards``."""
        payoff = self.payoff(prices.flatten())
        return torch.stack([torch.zeros_like(payoff), payoff], dim=1)

    def features(self, anchors: int = 30, *, low: float = 60.0, high: float = 160.0) -> Callable[[Tensor], Tensor]:
        """A feature map: holding is a mixture of the two anchors beside the price, selling a feature of its own.

        The sibling's code has hat functions on 30 anchors, too, which do not sum to 1 beyond its first anchor. Ours
        take the first or last anchor there, as d-rectangular problems need points of the simplex.

        Args:
            anchors: default 30.
            low: price of the first anchor; default 60.
            high: price of the last anchor; default 160.

        Returns:
            (n,) or (n, 1) prices to (n, 2, anchors + 1) features.

        Examples:
            >>> AmericanPut().features(3, low=80.0, high=120.0)(torch.tensor([90.0]))
            tensor([[[0.5000, 0.5000, 0.0000, 0.0000],
                     [0.0000, 0.0000, 0.0000, 1.0000]]], dtype=torch.float64)
        """
        spacing = (high - low) / (anchors - 1)

        def feature_map(prices: Tensor) -> Tensor:
            place = ((prices.double().flatten() - low) / spacing).clamp(0.0, anchors - 1.0)
            distance = (place[:, None] - torch.arange(anchors, dtype=torch.float64)).abs()
            features = torch.zeros(len(prices), 2, anchors + 1, dtype=torch.float64)
            features[:, 0, :anchors] = (1.0 - distance).clamp(min=0.0)
            features[:, 1, anchors] = 1.0
            return features

        return feature_map

    def expected_return(
        self,
        policy: Callable[[int, Tensor], Tensor],
        *,
        up_probability: float | None = None,
        uncertainty: Uncertainty | None = None,
    ) -> float:
        """What a policy earns on average, exactly, by going through the tree of prices.

        Args:
            policy: ``(step, prices) -> (n, 2)`` probabilities.
            up_probability: that of deployment; default that of this environment.
            uncertainty: what an adversary may do to each step of each price; default none.
        """

        def value(step: int, prices: Tensor, held: Tensor) -> Tensor:
            sells = policy(step, prices)[:, 1]
            return sells * self.payoff(prices) + (1.0 - sells) * held

        return self._backwards(value, up_probability, uncertainty)

    def best_return(self, *, up_probability: float | None = None, uncertainty: Uncertainty | None = None) -> float:
        """What the best policy for these dynamics earns on average.

        Args:
            up_probability: of the dynamics; default that of this environment.
            uncertainty: what an adversary may do to each step of each price; default none.
        """
        return self._backwards(
            lambda step, prices, held: torch.maximum(self.payoff(prices), held), up_probability, uncertainty
        )

    def _backwards(
        self,
        value_of: Callable[[int, Tensor, Tensor], Tensor],
        up_probability: float | None,
        uncertainty: Uncertainty | None,
    ) -> float:
        """Value of the first price, from ``value_of(step, prices, value of holding)``."""
        p = self.up_probability if up_probability is None else up_probability
        value = torch.zeros(self.horizon + 1, dtype=torch.float64)
        for step in reversed(range(self.horizon)):
            chances = torch.zeros(step + 1, step + 2, dtype=torch.float64)
            chances.diagonal().fill_(1.0 - p)
            chances.diagonal(1).fill_(p)
            held = robust_expectation(chances, value, uncertainty or NoUncertainty(), cap=1.0)
            value = value_of(step, self._prices(step), held)
        return float(value[0])

    def _prices(self, step: int) -> Tensor:
        """(step + 1,) prices that can be reached, by the number of steps up."""
        ups = torch.arange(step + 1, dtype=torch.float64)
        return self.start * torch.exp(ups * math.log(self.up) + (step - ups) * math.log(self.down))


def tabular_features(
    num_states: int, num_actions: int, *, dtype: torch.dtype = torch.float64
) -> Callable[[Tensor], Tensor]:
    """A feature map for few states: one feature for each pair of state and action, so each has its own adversary.

    Args:
        num_states: observations are 0 ... num_states - 1.
        num_actions: A.
        dtype: of the features; default float64.

    Returns:
        (n,) states to (n, A, num_states * A) features.

    Examples:
        >>> tabular_features(2, 2)(torch.tensor([1]))
        tensor([[[0., 0., 1., 0.],
                 [0., 0., 0., 1.]]], dtype=torch.float64)
    """
    table = torch.eye(num_states * num_actions, dtype=dtype).view(num_states, num_actions, -1)
    return lambda states: table[states.long()]
