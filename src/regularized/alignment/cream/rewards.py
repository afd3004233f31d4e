"""What a response is worth: by the model's own likelihoods, or by a judge whose bias is known.

The implicit reward of DPO is ``beta (log pi - log pi_0)`` plus what depends on the prompt alone, so ``log pi - log
pi_0`` ranks as it does. It needs a model that has learned something since ``pi_0``.
"""

from typing import Protocol

import torch
from torch import Tensor, nn

from regularized.alignment.sampling import Responses
from regularized.mechanisms.ranges import allowed, at_least

__all__ = ["Judge", "SyntheticJudge", "length_normalised", "likelihood_ratio"]


class Judge(Protocol):
    """Rewards from elsewhere, in place of the model's own."""

    def __call__(self, model: nn.Module, responses: Responses, /, *, round: int) -> Tensor:
        """(P, N) rewards by the judge of a round; what is drawn comes from torch's global generator.

        Args:
            model: the model that the round began with (of round 0: the base).
            responses: what is judged.
            round: the present one, or the one before.
        """
        ...


def likelihood_ratio(log_probs: Tensor, base_log_probs: Tensor) -> Tensor:
    """r: log-probability of each response under a model, less that under the base.

    Args:
        log_probs: (P, N) sums over the tokens.
        base_log_probs: (P, N) of the same responses under the base.

    Returns:
        (P, N).

    Raises:
        ValueError: shapes differ; or all rewards are 0, since the model is the base.

    Examples:
        >>> likelihood_ratio(torch.tensor([[-1.0, -5.0]]), torch.tensor([[-2.0, -2.0]]))
        tensor([[ 1., -3.]])
    """
    if log_probs.shape != base_log_probs.shape:
        raise ValueError(
            f"log-probabilities of one set of responses are needed, got shapes {tuple(log_probs.shape)} and "
            f"{tuple(base_log_probs.shape)}"
        )
    rewards = log_probs - base_log_probs
    if not bool(rewards.any()):
        raise ValueError(
            "the model is the base, so all its rewards are 0: fine-tune it first. In the first round the model before "
            "it is the base, too: rank by length_normalised(log_probs, lengths) there, as the authors do"
        )
    return rewards


def length_normalised(log_probs: Tensor, lengths: Tensor) -> Tensor:
    """Mean log-probability of a token: how the base ranks in the first round, where its likelihood ratio is 0.

    Args:
        log_probs: (P, N) sums over the tokens.
        lengths: (P, N) tokens of each response, at least 1.

    Returns:
        (P, N).

    Raises:
        ValueError: a response has no token.

    Examples:
        >>> length_normalised(torch.tensor([[-4.0, -3.0]]), torch.tensor([[4, 1]]))
        tensor([[-1., -3.]])
    """
    if not bool((lengths > 0).all()):
        raise ValueError("a response has no token, so it has no mean; let the token that ends a response count as one")
    return log_probs / lengths


class SyntheticJudge:
    """A judge whose faults are known: the truth, a fixed bias, and noise that is new in each round.

    ``reward = quality + bias * feature + noise * e`` with e standard normal. Two rounds disagree by the noise alone, so
    consistency sees the noise, and cannot see the bias: with it one can find out how much of either a training bears.

    Args:
        quality: gives (P, N) qualities of :class:`~regularized.alignment.sampling.Responses`, such as 1 where an answer
            is right and 0 where it is wrong.
        feature: what the judge is biased towards, (P, N) of responses; default None.
        bias: its coefficient; default 0.
        noise: deviation of the noise; default 0.

    Raises:
        ValueError: the noise is negative, or a bias has no feature.

    Examples:
        >>> from regularized.alignment.sampling import pack_responses
        >>> answers = pack_responses([torch.tensor([1])], [[torch.tensor([2]), torch.tensor([3, 3, 3])]])
        >>> wordy = SyntheticJudge(lambda r: (r.lengths == 1).float(), feature=lambda r: r.lengths.float(), bias=1.0)
        >>> wordy(nn.Identity(), answers, round=1)
        tensor([[2., 3.]])
    """

    @allowed(noise=at_least(0.0, "the deviation of the noise"))
    def __init__(
        self, quality: "Feature", *, feature: "Feature | None" = None, bias: float = 0.0, noise: float = 0.0
    ) -> None:
        if bias and feature is None:
            raise ValueError(f"bias={bias} needs the feature that the judge is biased towards")
        self.quality = quality
        self.feature = feature
        self.bias = bias
        self.noise = noise

    def __call__(self, model: nn.Module, responses: Responses, /, *, round: int) -> Tensor:
        """(P, N) rewards; the model and the round do not matter."""
        rewards = self.quality(responses)
        if self.feature is not None:
            rewards = rewards + self.bias * self.feature(responses)
        return rewards + self.noise * torch.randn_like(rewards)


class Feature(Protocol):
    """(P, N) numbers of responses."""

    def __call__(self, responses: Responses, /) -> Tensor:
        """One number for each response."""
        ...
