"""The loss on rewards: clipped ratios on normalised advantages, an entropy bonus, and a value function."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from regularized.alignment.amft.loss import log_probs_and_entropy, masked_mean, policy_loss, until_end, value_loss
from regularized.alignment.amft.rollouts import Critic, Rollouts, advantages_of, completion_logits
from regularized.mechanisms.ranges import at_least, check_fields, positive, share
from regularized.mechanisms.taps import Taps

__all__ = ["PPO", "PPOLosses", "ppo_losses"]


@dataclass(frozen=True, slots=True)
class PPO:
    """Settings of the loss on rewards.

    Args:
        clip: eps of the clipping of ratios and values; default 0.2 (paper).
        entropy_bonus: coefficient of the entropy in L_RL; default 0.01 (code).
        value_weight: coefficient of the loss of the value function; default 0.1 (code).
        gamma: discount; default 1 (code).
        gae_lambda: of the advantages; default 0.95 (code).

    Raises:
        ValueError: a setting is outside its range.

    Examples:
        >>> PPO(entropy_bonus=0.0).clip
        0.2
    """

    clip: float = 0.2
    entropy_bonus: float = 0.01
    value_weight: float = 0.1
    gamma: float = 1.0
    gae_lambda: float = 0.95

    def __post_init__(self) -> None:
        check_fields(
            self,
            clip=positive(),
            entropy_bonus=at_least(0.0),
            value_weight=at_least(0.0),
            gamma=share(),
            gae_lambda=share(),
        )


class PPOLosses(NamedTuple):
    """Losses of some answers.

    Attributes:
        policy: scalar, L_RL with its graph, the entropy bonus in it.
        values: scalar, the weighted loss of the value function with a graph of its own; None without one.
        entropy: scalar, mean entropy of the policy on the tokens that it drew, detached.
    """

    policy: Tensor
    values: Tensor | None
    entropy: Tensor


def ppo_losses(
    policy: nn.Module,
    drawn: Rollouts,
    rewards: Tensor,
    *,
    end: int,
    per_prompt: int,
    critic: Critic | None = None,
    settings: PPO | None = None,
) -> PPOLosses:
    """L_RL of answers and their rewards, in one forward pass of the policy.

    Args:
        policy: from tokens to logits.
        drawn: (B, L) prompts and (B, T) answers.
        rewards: (B,).
        end: token that ends an answer; what stands behind it does not count.
        per_prompt: answers to each prompt, one after the other; compared with each other where there is no critic.
        critic: the value function; default None.
        settings: of the loss; default :class:`PPO` with its defaults.

    Raises:
        ValueError: the policy has no submodule that the critic looks at.

    Examples:
        >>> import torch
        >>> from regularized.alignment.amft.rollouts import sample
        >>> policy = nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 5))
        >>> drawn = sample(policy, torch.zeros(3, 2, dtype=torch.int64), length=4, end=4, per_prompt=2)
        >>> losses = ppo_losses(policy, drawn, torch.ones(6), end=4, per_prompt=2, settings=PPO(entropy_bonus=0.0))
        >>> losses.policy.item() == 0.0, losses.values  # equal rewards teach nothing
        (True, None)
    """
    ppo = PPO() if settings is None else settings
    mask = until_end(drawn.completions, end)
    with Taps(policy, [critic.features] if critic else []) as taps:
        logits = completion_logits(policy, drawn.prompts, drawn.completions)
        hidden = taps.states[critic.features] if critic else None
    values = critic(hidden[:, drawn.prompts.shape[1] - 1 :]) if critic and hidden is not None else None
    advantages, returns = advantages_of(
        rewards,
        mask,
        None if values is None else values.detach(),
        per_prompt=per_prompt,
        gamma=ppo.gamma,
        gae_lambda=ppo.gae_lambda,
    )
    log_probs, entropies = log_probs_and_entropy(logits, drawn.completions)
    old = log_probs.detach() if drawn.log_probs is None else drawn.log_probs
    entropy = masked_mean(entropies, mask)
    loss = policy_loss(log_probs, old, advantages, mask, clip=ppo.clip) - ppo.entropy_bonus * entropy
    if values is None or returns is None:
        return PPOLosses(loss, None, entropy.detach())
    apart = value_loss(values, values.detach(), returns, mask, clip=ppo.clip)
    return PPOLosses(loss, ppo.value_weight * apart, entropy.detach())
