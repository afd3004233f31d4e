"""The environments as ``gymnasium.Env``, for its wrappers and for agents of other libraries."""

from typing import TYPE_CHECKING, Any

import torch

from regularized.robustness.robust_policy.environments import AmericanPut, LinearMDPEnvironment

if TYPE_CHECKING:
    import gymnasium

__all__ = ["as_gymnasium"]


def _price(price: float) -> Any:
    """As an array of one float64, which is what spaces of gymnasium hold."""
    return torch.tensor([price], dtype=torch.float64).numpy()


def as_gymnasium(env: AmericanPut | LinearMDPEnvironment) -> "gymnasium.Env[Any, Any]":
    """An environment with gymnasium's spaces and base class.

    Args:
        env: one of ours. Its draws are seeded by ``reset(seed=...)``; without a seed they go on.

    Returns:
        It plays in ``env`` itself. A price is an array of one float64, a state a whole number.

    Raises:
        ModuleNotFoundError: gymnasium is not installed.

    Examples:
        >>> env = as_gymnasium(AmericanPut())
        >>> env.action_space, env.observation_space.shape
        (Discrete(2), (1,))
    """
    try:
        import gymnasium
    except ModuleNotFoundError as missing:
        raise ModuleNotFoundError("this needs gymnasium: pip install 'regularized[environments]'") from missing

    put = isinstance(env, AmericanPut)

    class Adapted(gymnasium.Env[Any, Any]):
        """The environment behind gymnasium's interface."""

        def __init__(self) -> None:
            self.action_space = gymnasium.spaces.Discrete(env.num_actions)
            if isinstance(env, AmericanPut):
                double = _price(env.start).dtype.type
                self.observation_space = gymnasium.spaces.Box(env.lowest, env.highest, (1,), double)
            else:
                self.observation_space = gymnasium.spaces.Discrete(env.num_states)

        def reset(
            self, *, seed: int | None = None, options: dict[str, Any] | None = None
        ) -> tuple[Any, dict[str, Any]]:
            super().reset(seed=seed)
            observation, info = env.reset(seed=seed)
            return self._seen(observation), info

        def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
            observation, reward, terminated, truncated, info = env.step(int(action))
            return self._seen(observation), reward, terminated, truncated, info

        def _seen(self, observation: float) -> Any:
            return _price(observation) if put else int(observation)

    return Adapted()
