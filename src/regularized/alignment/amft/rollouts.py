"""What a policy is asked and answers, and what its answers are worth: sampling, rewards, and the value function."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regularized.alignment.amft.loss import (
    generalised_advantages,
    masked_mean,
    normalised,
    token_entropy,
    until_end,
)
from regularized.alignment.sampling import sample_responses
from regularized.alignment.sequence_log_probs import next_token_logits
from regularized.training.step import Batch

__all__ = [
    "Advantages",
    "Critic",
    "Pair",
    "Reward",
    "Rollouts",
    "Sampler",
    "advantages_of",
    "completion_logits",
    "evaluating",
    "mean_entropy",
    "pair_of",
    "rewards_of",
    "sample",
]

Reward: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""From prompts (B, L) and completions (B, T) to rewards (B,), computed without gradient."""

Pair: TypeAlias = tuple[Tensor, Tensor]
"""Prompts (B, L) and answers (B, T)."""


class Rollouts(NamedTuple):
    """Answers of a policy.

    Attributes:
        prompts: (B, L) int64, each as often as it was answered, one after the other.
        completions: (B, T) int64; behind the end token anything may stand.
        log_probs: (B, T) of the policy that drew them; None where that is the one that is trained.
    """

    prompts: Tensor
    completions: Tensor
    log_probs: Tensor | None = None


class Sampler(Protocol):
    """Draws answers: :func:`sample`, or the generation of another library."""

    def __call__(self, policy: nn.Module, prompts: Tensor, /) -> Rollouts:
        """Answer each of the prompts (P, L) as often as the training has ``rollouts``, without gradient."""
        ...


def pair_of(batch: Any, device: torch.device) -> Pair:
    """Prompts and answers of a batch, on a device.

    Args:
        batch: in any form of :meth:`regularized.training.step.Batch.of`.
        device: where to.

    Raises:
        ValueError: they are not two matrices of equally many rows.

    Examples:
        >>> prompts, answers = pair_of((torch.zeros(3, 2), torch.zeros(3, 4)), torch.device("cpu"))
        >>> prompts.shape, answers.shape
        (torch.Size([3, 2]), torch.Size([3, 4]))
    """
    given = Batch.of(batch).map(lambda t: t.to(device, non_blocking=True))
    prompts, answers = given.inputs, given.targets
    if not (_is_matrix(prompts) and answers is not None and _is_matrix(answers) and len(prompts) == len(answers)):
        shapes = [tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__ for t in (prompts, answers)]
        raise ValueError(
            f"a batch must be prompts (B, L) and answers (B, T), token ids of equally many rows, got {shapes}"
        )
    return prompts, answers


def _is_matrix(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 2


def rewards_of(reward: Reward, prompts: Tensor, completions: Tensor) -> Tensor:
    """(B,) float32, what a reward gives for answers, on their device.

    Args:
        reward: the function.
        prompts: (B, L).
        completions: (B, T).

    Raises:
        ValueError: it does not give one number for each answer.

    Examples:
        >>> rewards_of(lambda asked, given: given[:, 0] == 1, torch.zeros(2, 1), torch.tensor([[1], [0]]))
        tensor([1., 0.])
    """
    rewards, number = reward(prompts, completions), len(completions)
    if not isinstance(rewards, Tensor) or rewards.shape != (number,):
        shape = tuple(rewards.shape) if isinstance(rewards, Tensor) else type(rewards).__name__
        raise ValueError(f"reward must give one number for each of {number} answers, a tensor ({number},), got {shape}")
    return rewards.to(completions.device, torch.float32)


def completion_logits(policy: nn.Module, prompts: Tensor, completions: Tensor) -> Tensor:
    """Logits (B, T, V) that each token of the completions is drawn from: one forward pass, shifted by one.

    Args:
        policy: from tokens (B, L + T - 1) to logits.
        prompts: (B, L), L at least 1.
        completions: (B, T).
    """
    tokens = torch.cat([prompts, completions[:, :-1]], dim=1)
    return next_token_logits(policy, tokens)[:, prompts.shape[1] - 1 :]


def sample(
    policy: nn.Module, prompts: Tensor, *, length: int, end: int, per_prompt: int = 1, greedy: bool = False
) -> Rollouts:
    """Answers of a policy to prompts of one length, by :func:`~regularized.alignment.sampling.sample_responses`.

    Args:
        policy: from tokens (B, t) to logits (B, t, V), or to an object that has them.
        prompts: (P, L) int64.
        length: T, the longest answer.
        end: the token that ends an answer; it fills what comes behind it.
        per_prompt: answers to each; default 1.
        greedy: take the most probable token; default False draws from the policy itself, at temperature 1, from torch's
            global generator.

    Examples:
        >>> policy = nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 5))
        >>> sample(policy, torch.zeros(3, 2, dtype=torch.int64), length=4, end=4, per_prompt=2).completions.shape
        torch.Size([6, 4])
    """
    drawn = sample_responses(
        policy,
        list(prompts),
        max_new_tokens=length,
        count=per_prompt,
        temperature=0.0 if greedy else 1.0,
        top_p=1.0,
        end=end,
        pad=end,
    )
    answers = drawn.tokens.flatten(0, 1)[:, prompts.shape[1] :]
    return Rollouts(
        prompts.repeat_interleave(per_prompt, dim=0), F.pad(answers, (0, length - answers.shape[1]), value=end)
    )


@torch.no_grad()
def mean_entropy(policy: nn.Module, batches: Iterable[Any], *, end: int, most: int = 20) -> Tensor:
    """H*: mean entropy of a policy on the tokens of demonstrated answers, in evaluation mode.

    The authors' code counts the prompt's tokens as well; a policy does not draw them.

    Args:
        policy: from tokens to logits.
        batches: pairs of prompts (B, L) and answers (B, T).
        end: the token that ends an answer.
        most: batches that are looked at; default 20 (code).

    Returns:
        Scalar, the mean of the batches' means.

    Raises:
        ValueError: there is no batch.

    Examples:
        >>> policy = nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 5))
        >>> tokens = torch.zeros(3, 2, dtype=torch.int64)
        >>> 0.0 < mean_entropy(policy, [(tokens, tokens)], end=4).item() < 1.61  # ln 5
        True
    """
    device = next(policy.parameters()).device
    found = []
    with evaluating(policy):
        for raw in islice(batches, most):
            batch = Batch.of(raw)
            if batch.targets is None:
                raise ValueError("each batch must be a pair of prompts and answers")
            prompts, answers = batch.inputs.to(device), batch.targets.to(device)
            entropy = token_entropy(completion_logits(policy, prompts, answers))
            found.append(masked_mean(entropy, until_end(answers, end)))
    if not found:
        raise ValueError("there is no batch to measure the entropy of; give at least one pair of prompts and answers")
    return torch.stack(found).mean()


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, the mode that it was in behind."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


class Critic(nn.Module):
    """A value function: one linear layer on the hidden states of the policy, which it does not train.

    Args:
        width: of the hidden states.
        features: the submodule of the policy whose output (B, t, width) they are; default ``"norm"``, the last
            normalisation of :class:`~regularized.evidence.language_models.LanguageModel`; ``"model.norm"`` in a Llama
            of Hugging Face.

    Raises:
        ValueError: when the training looks for it: the policy has no such submodule.

    Examples:
        >>> Critic(8)(torch.zeros(2, 3, 8)).shape
        torch.Size([2, 3])
    """

    def __init__(self, width: int, *, features: str = "norm") -> None:
        super().__init__()
        self.features = features
        self.head: nn.Linear = nn.Linear(width, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, t, width) to the expected reward (B, t) from each position on."""
        values: Tensor = self.head(hidden.detach().to(self.head.weight.dtype)).squeeze(-1)
        return values


class Advantages(NamedTuple):
    """Advantages of the tokens of some answers.

    Attributes:
        advantages: (B, T), normalised.
        returns: (B, T), what a value function should have said; None without one.
    """

    advantages: Tensor
    returns: Tensor | None


@torch.no_grad()
def advantages_of(
    rewards: Tensor,
    mask: Tensor,
    values: Tensor | None,
    *,
    per_prompt: int,
    gamma: float = 1.0,
    gae_lambda: float = 0.95,
) -> Advantages:
    """Advantages of answers whose reward comes at their end.

    With a value function by :func:`~regularized.alignment.amft.generalised_advantages`; without one the reward less the
    mean reward of the answers to the same prompt (Shao et al. 2024, GRPO). Normalised over the tokens that count.

    Args:
        rewards: (B,).
        mask: (B, T), see :func:`~regularized.alignment.amft.until_end`.
        values: (B, T) of a value function, or None.
        per_prompt: answers to each prompt, one after the other.
        gamma: discount; default 1 (code).
        gae_lambda: default 0.95 (code).

    Examples:
        >>> mask = torch.ones(2, 1)
        >>> advantages_of(torch.tensor([0.0, 1.0]), mask, None, per_prompt=2).advantages.flatten()
        tensor([-0.7071,  0.7071])
    """
    weights = mask.to(rewards.dtype)
    if values is None:
        better = (rewards.view(-1, per_prompt) - rewards.view(-1, per_prompt).mean(dim=1, keepdim=True)).view(-1, 1)
        return Advantages(normalised(better * torch.ones_like(weights), weights) * weights, None)
    last = weights * (1.0 - F.pad(weights[:, 1:], (0, 1)))
    found = generalised_advantages(last * rewards[:, None], values, weights, gamma=gamma, gae_lambda=gae_lambda)
    return Advantages(normalised(found, weights) * weights, found + values * weights)
