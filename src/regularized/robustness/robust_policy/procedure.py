"""The agent: it plays an episode, learns from all episodes so far, and is best under the worst dynamics nearby."""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

import torch
from torch import Tensor

from regularized.mechanisms.ranges import Choice, allowed, at_least, count, positive
from regularized.robustness.robust_policy.log import StepLog
from regularized.robustness.robust_policy.planning import (
    ActionValues,
    LinearPolicy,
    Observed,
    backward_pass,
    remembered,
)
from regularized.robustness.robust_policy.policy import Greedy, PolicyStep, Softmax
from regularized.robustness.robust_policy.regression import BONUSES, Bonus
from regularized.robustness.robust_policy.uncertainty import TVBall, Uncertainty
from regularized.training.randomness import mix

__all__ = ["DRRPO", "Environment", "Episode"]

Update: TypeAlias = Literal["closed_form", "mirror", "greedy"]
Refit: TypeAlias = Literal["every", "doubling"]

_ROUNDING = 1e-5


class Environment(Protocol):
    """What gymnasium's environments with discrete actions offer, of which a ``gymnasium.Env`` is one."""

    def reset(self, *, seed: int | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode: its first observation, and information that is not used."""
        ...

    def step(self, action: Any, /) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Observation, reward, whether nothing can be earned any more, whether time is up, information."""
        ...


@dataclass(frozen=True, slots=True)
class Episode:
    """What came of one episode.

    Args:
        earned: sum of rewards.
        length: steps until it ended.
        terminated: whether it ended before or at the horizon because nothing could be earned any more.
    """

    earned: float
    length: int
    terminated: bool


class DRRPO:
    """Online policy optimization that is robust to its simulator, around a reference policy (DR-RPO).

    It learns from episodes of H steps in the simulator. What it maximises is the return under the worst dynamics in an
    uncertainty set around the simulator's, less ``eta`` times the divergence of its policy from a reference policy. Of
    the environment it needs features of all actions at a state that are a point of the simplex: transitions are
    mixtures of d factors, and the adversary changes each factor alone.

    What the environment draws, and what the agent draws, is a function of the seed and the number of the episode. So
    training that goes on from a saved state is bit for bit that which was never stopped.

    Args:
        feature_map: observations (n, ...) to features (n, A, d) of all A actions, each >= 0 with sum 1.
        num_actions: A; actions are 0 ... A - 1.
        horizon: H, steps of an episode.
        uncertainty: what the adversary may do to each factor, one for all steps or one for each.
        rewards: what is known of the rewards, which lie in [0, 1]: weights theta of the features, (d,) or (H, d); or a
            function ``(step, observations) -> (n, A)``; default None, estimated by ridge regression.
        eta: price of a nat of divergence from the reference policy, in the unit of returns. Default 0.05, of our
            pilot: 0.01 is nearly greedy on returns of about 1, with 0.2 the reference decides.
        beta: factor of the exploration bonus. Default 0.2, to be tuned between 0.1 and 1; that of the theory,
            c d H sqrt(log), explores for ever.
        ridge: lambda; default 1, that of the theory.
        update: ``"closed_form"`` (default) the regularized policy itself; ``"mirror"`` a step of size ``step_size``
            from the last policy towards it; ``"greedy"`` the best action: value iteration, with or without an
            adversary. Which of the first two the paper takes could not be read.
        step_size: of a mirror step; needed for ``"mirror"`` and for nothing else.
        reference_policy: probabilities of the actions, (A,), or a function ``(step, observations) -> (n, A)``. Default
            None, uniform. An action of probability 0 is never taken.
        bonus: kind of the exploration bonus, see :func:`~regularized.robustness.robust_policy.exploration_bonus`.
        fail_state: whether the adversary can lead into a state that is worth nothing (default True, as the theory
            assumes). With False the least value that was seen stands for it.
        refit: ``"every"`` (default) before each episode; ``"doubling"`` only once the determinant of some Lambda has
            doubled, about d log K times in K episodes.
        seed: of the environment's and the agent's draws.

    Attributes:
        episodes: how many it has played.
        refits: how often it has learned from them.

    Raises:
        ValueError: an option is out of range, there is not one uncertainty for each step, or theta, the reference or
            ``step_size`` does not fit.

    Warns:
        UserWarning: total variation without a fail state: the least value is estimated from the sample.

    Examples:
        >>> import torch
        >>> from regularized.robustness.robust_policy import DRRPO, LinearMDPEnvironment, TVBall, simulated_linear_mdp
        >>> world = simulated_linear_mdp()
        >>> uncertainty = [TVBall((0.0, 0.0, 0.0, 0.5)), TVBall(0.0), TVBall(0.0)]
        >>> agent = DRRPO(world.feature_map, num_actions=16, horizon=3, rewards=world.theta, uncertainty=uncertainty)
        >>> episodes = agent.fit(LinearMDPEnvironment(world), episodes=5)
        >>> agent.policy(0, torch.tensor([0])).shape
        torch.Size([1, 16])
    """

    @allowed(
        num_actions=count(1),
        horizon=count(1),
        beta=at_least(0.0, remedy="0 does not explore"),
        ridge=positive("what is added to the diagonal of Lambda"),
        update=Choice("closed_form", "mirror", "greedy"),
        bonus=BONUSES,
        refit=Choice("every", "doubling"),
    )
    def __init__(
        self,
        feature_map: Callable[[Tensor], Tensor],
        *,
        num_actions: int,
        horizon: int,
        uncertainty: Uncertainty | Sequence[Uncertainty],
        rewards: Tensor | Observed | None = None,
        eta: float = 0.05,
        beta: float = 0.2,
        ridge: float = 1.0,
        update: Update = "closed_form",
        step_size: float | None = None,
        reference_policy: Tensor | Observed | None = None,
        bonus: Bonus = "sum_diag",
        fail_state: bool = True,
        refit: Refit = "every",
        seed: int = 0,
    ) -> None:
        if (update == "mirror") != (step_size is not None):
            raise ValueError(f"update='mirror' and step_size belong together, got update={update!r}, {step_size=}")
        sets = list(uncertainty) if isinstance(uncertainty, Sequence) else [uncertainty] * horizon
        if len(sets) != horizon:
            raise ValueError(
                f"there are {horizon} steps and {len(sets)} uncertainties; give one for each, or one for all"
            )
        if not fail_state and any(isinstance(one, TVBall) and one.radius for one in sets):
            warnings.warn(
                "total variation without a fail state: the least value that the adversary can reach is estimated by "
                "the least that was seen, which is too large for a small sample",
                stacklevel=3,
            )
        self.feature_map = feature_map
        self.num_actions = num_actions
        self.horizon = horizon
        self.uncertainty = sets
        self.policy_step: PolicyStep = Greedy() if update == "greedy" else Softmax(eta, step_size or math.inf)
        self.beta = beta
        self.ridge = ridge
        self.bonus = bonus
        self.lowest = 0.0 if fail_state else None
        self.refit = refit
        self.seed = seed
        self.episodes = 0
        self.refits = 0
        self._theta: Tensor | None = None
        self._known: Observed | None = None
        if isinstance(rewards, Tensor):
            self._theta = _reward_weights(rewards, horizon)
        else:
            self._known = rewards
        self._reference = _reference(reference_policy, num_actions)
        self._logs: list[StepLog] = []
        self._past: list[ActionValues] = []
        self._log_determinants: Tensor | None = None
        self._stale = False

    # -- playing ----------------------------------------------------------------------------

    def run_episode(self, env: Environment) -> Episode:
        """Learn from all episodes so far, then play one.

        Args:
            env: the simulator, an environment by gymnasium's interface with an episode of H steps: ``terminated`` says
                that nothing can be earned from here on, ``truncated`` that time is up, at step H and not before.

        Returns:
            What came of it.

        Raises:
            ValueError: features are no point of the simplex, a reward is outside [0, 1], or the episode is shorter or
                longer than the horizon. Nothing of the episode is kept then.
        """
        self._learn(self.beta)
        generator = torch.Generator().manual_seed(mix(self.seed, self.episodes, 1))
        observation, _ = env.reset(seed=mix(self.seed, self.episodes) % 2**31)
        seen, actions, rewards = [_tensor(observation)], [], []
        terminated = False
        policy = self._policy()
        for step in range(self.horizon):
            chances = policy(step, seen[-1][None])[0]
            actions.append(int(torch.multinomial(chances, 1, generator=generator)))
            observation, reward, terminated, truncated, _ = env.step(actions[-1])
            rewards.append(self._reward(float(reward), step))
            seen.append(_tensor(observation))
            if terminated:
                break
            if truncated != (step == self.horizon - 1):
                raise ValueError(self._wrong_horizon(step, truncated=truncated))
        self._remember(torch.stack(seen), torch.tensor(actions), rewards, terminated=terminated, policy=policy)
        self.episodes += 1
        return Episode(math.fsum(rewards), len(rewards), terminated)

    def fit(self, env: Environment, *, episodes: int) -> list[Episode]:
        """Play so many further episodes.

        Args:
            env: as for :meth:`run_episode`.
            episodes: how many.
        """
        return [self.run_episode(env) for _ in range(episodes)]

    def policy(self, step: int, observations: Tensor) -> Tensor:
        """The policy of the next episode, optimistic about what is not known.

        Args:
            step: counted from 0.
            observations: (n, ...).

        Returns:
            (n, A) probabilities.
        """
        self._learn(self.beta)
        return self._policy()(step, observations)

    def export(self) -> LinearPolicy:
        """The policy to deploy: of all episodes, in closed form, without the exploration bonus.

        Returns:
            It depends on the agent no more.
        """
        step = self.policy_step
        closed = Softmax(step.eta) if isinstance(step, Softmax) else step
        values = [self._plan(beta=0.0, policy_step=closed)] if self._logs else []
        return LinearPolicy(self.feature_map, closed, self._reference, values, rewards=self._known)

    # -- learning ---------------------------------------------------------------------------

    def _learn(self, beta: float) -> None:
        if not self._stale or (self.refit == "doubling" and not self._doubled()):
            return
        self._past.append(self._plan(beta=beta, policy_step=self.policy_step))
        del self._past[: -remembered(self.policy_step)]
        self.refits += 1
        self._stale = False

    def _plan(self, *, beta: float, policy_step: PolicyStep) -> ActionValues:
        return backward_pass(
            self._logs,
            uncertainty=self.uncertainty,
            policy_step=policy_step,
            theta=self._fixed_theta(),
            ridge=self.ridge,
            beta=beta,
            bonus=self.bonus,
            lowest=self.lowest,
        )

    def _fixed_theta(self) -> Tensor | None:
        """(H, d) reward weights; zeros where rewards are known beside the features, None where they are estimated."""
        features = self._logs[0].features
        if self._known is not None:
            return features.new_zeros(self.horizon, features.shape[1])
        return None if self._theta is None else self._theta.to(features)

    def _policy(self) -> LinearPolicy:
        return LinearPolicy(self.feature_map, self.policy_step, self._reference, self._past, rewards=self._known)

    def _doubled(self) -> bool:
        """Whether the determinant of Lambda of some step has doubled since this was last answered by yes."""
        grams = torch.stack([log.features.T @ log.features for log in self._logs])
        grams.diagonal(dim1=1, dim2=2).add_(self.ridge)
        now = torch.linalg.slogdet(grams).logabsdet
        if self._log_determinants is not None and bool((now < self._log_determinants + math.log(2.0)).all()):
            return False
        self._log_determinants = now
        return True

    # -- remembering ------------------------------------------------------------------------

    def _remember(
        self, seen: Tensor, actions: Tensor, rewards: Sequence[float], *, terminated: bool, policy: LinearPolicy
    ) -> None:
        features = self.feature_map(seen)
        self._check_features(features, seen)
        if not self._logs:
            about: dict[str, Any] = {
                "num_actions": self.num_actions,
                "width": features.shape[-1],
                "dtype": features.dtype,
            }
            self._logs = [StepLog(**about) for _ in range(self.horizon)]
        if self._theta is not None and self._theta.shape[1] != features.shape[-1]:
            raise ValueError(f"theta has {self._theta.shape[1]} weights and there are {features.shape[-1]} features")
        for step, row in enumerate(self._rows(seen, features, policy)):
            last = step == len(actions) - 1
            self._logs[step].append(
                features=features[step, actions[step]][None],
                rewards=features.new_tensor([rewards[step]]),
                alive=torch.tensor([not (last and terminated)]),
                **row,
            )
        self._stale = True

    def _rows(self, seen: Tensor, features: Tensor, policy: LinearPolicy) -> Iterator[dict[str, Tensor]]:
        """For each step what the log keeps of the next state; behind the horizon there is nothing to know."""
        for step in range(1, len(seen)):
            row = {"next_features": features[step][None]}
            if step < self.horizon:
                state = seen[step][None]
                row["next_reference"] = self._reference(step, state).to(features)
                if self._known is not None:
                    row["next_rewards"] = self._checked_rewards(self._known(step, state)).to(features)
                if self.policy_step.keep and self._past:
                    row["next_total"] = policy.total(step, state)
            yield row

    def _check_features(self, features: Tensor, seen: Tensor) -> None:
        if features.dim() != 3 or features.shape[:2] != (len(seen), self.num_actions):
            raise ValueError(
                f"the feature map gave {tuple(features.shape)} for {len(seen)} observations; it must give features (n, "
                f"{self.num_actions}, d) of all actions"
            )
        wrong = (features < -_ROUNDING).any(dim=-1) | ((features.sum(dim=-1) - 1.0).abs() > _ROUNDING)
        wrong |= ~features.isfinite().all(dim=-1)
        if bool(wrong.any()):
            state, action = map(int, wrong.nonzero()[0])
            raise ValueError(
                "features must be >= 0 and sum to 1: transitions are mixtures of factors, each with an adversary of "
                f"its own. At observation {seen[state].tolist()}, action {action}, they are "
                f"{features[state, action].tolist()}; divide them by their sum, or add one more feature with what is "
                "missing"
            )

    def _reward(self, reward: float, step: int) -> float:
        if not -_ROUNDING <= reward <= 1.0 + _ROUNDING:
            raise ValueError(
                f"rewards must be in [0, 1], got {reward} at step {step}: values are clipped to the steps that are "
                "left. Shift and scale them (gymnasium.wrappers.TransformReward)"
            )
        return reward

    def _checked_rewards(self, rewards: Tensor) -> Tensor:
        if bool(((rewards < -_ROUNDING) | (rewards > 1.0 + _ROUNDING)).any()):
            raise ValueError(f"known rewards must be in [0, 1], got {rewards.tolist()}; shift and scale them")
        return rewards

    def _wrong_horizon(self, step: int, *, truncated: bool) -> str:
        what = "was truncated" if truncated else "goes on"
        return (
            f"the agent has horizon={self.horizon} and the episode {what} after {step + 1} steps; give both the same "
            "(gymnasium.wrappers.TimeLimit cuts episodes off; a state in which nothing can be earned is terminated)"
        )

    # -- state ------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All that was logged and learned; ``torch.load(..., weights_only=True)`` reads it."""
        return {
            "seed": self.seed,
            "horizon": self.horizon,
            "episodes": self.episodes,
            "refits": self.refits,
            "stale": self._stale,
            "log_determinants": self._log_determinants,
            "logs": [log.state_dict() for log in self._logs],
            "past": [{"weights": q.weights.clone(), "inverses": q.inverses.clone()} for q in self._past],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state of :meth:`state_dict`.

        Raises:
            ValueError: it is the state of an agent with another horizon, seed, or number of actions.
        """
        for name in ("horizon", "seed"):
            if state[name] != getattr(self, name):
                raise ValueError(
                    f"the state is of an agent with {name}={state[name]}, this one has {name}={getattr(self, name)}; "
                    "build it with the same"
                )
        logs = [_loaded(columns, self.num_actions) for columns in state["logs"]]
        self.episodes = int(state["episodes"])
        self.refits = int(state["refits"])
        self._stale = bool(state["stale"])
        self._log_determinants = state["log_determinants"]
        self._logs = logs
        self._past = [ActionValues(**past, beta=self.beta, bonus=self.bonus) for past in state["past"]]


def _loaded(columns: Mapping[str, Tensor], num_actions: int) -> StepLog:
    features = columns["features"]
    log = StepLog(num_actions=num_actions, width=features.shape[1], dtype=features.dtype)
    log.load_state_dict(columns)
    return log


def _tensor(observation: Any) -> Tensor:
    return observation if isinstance(observation, Tensor) else torch.as_tensor(observation)


def _reward_weights(theta: Tensor, horizon: int) -> Tensor:
    """(H, d), checked."""
    if theta.dim() not in (1, 2) or (theta.dim() == 2 and len(theta) != horizon):
        raise ValueError(f"reward weights are (d,) or ({horizon}, d), one row a step, got {tuple(theta.shape)}")
    if not bool(((theta >= 0) & (theta <= 1)).all()):
        raise ValueError(
            f"reward weights must be in [0, 1], as rewards are, got {theta.min():g} to {theta.max():g}; shift and "
            "scale rewards, or leave rewards=None to estimate them"
        )
    return theta.expand(horizon, -1) if theta.dim() == 1 else theta


def _reference(policy: Tensor | Observed | None, num_actions: int) -> Observed:
    """As a function, whose values are checked."""
    if policy is None:
        policy = torch.full((num_actions,), 1.0 / num_actions, dtype=torch.float64)
    if isinstance(policy, Tensor):
        fixed = policy
        policy = lambda step, observations: fixed.expand(len(observations), -1)  # noqa: E731
        _check_probabilities(fixed[None], num_actions)
        return policy
    given = policy

    def checked(step: int, observations: Tensor) -> Tensor:
        probabilities = given(step, observations)
        _check_probabilities(probabilities, num_actions)
        return probabilities

    return checked


def _check_probabilities(policy: Tensor, num_actions: int) -> None:
    if policy.dim() != 2 or policy.shape[1] != num_actions:
        raise ValueError(f"a reference policy has {num_actions} probabilities a state, got shape {tuple(policy.shape)}")
    wrong = (policy < 0).any(dim=1) | ((policy.sum(dim=1) - 1.0).abs() > _ROUNDING)
    if bool(wrong.any()):
        row = policy[wrong][0].tolist()
        raise ValueError(f"rows of a reference policy must be >= 0 and sum to 1, got {row}; divide them by their sum")
