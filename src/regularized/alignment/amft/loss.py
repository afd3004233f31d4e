"""The two losses that are mixed: imitation of demonstrations, and PPO on rewards that can be checked.

He, Feng and Li 2025, *AMFT: Aligning LLM Reasoners by Meta-Learning the Optimal Imitation-Exploration Balance*
(arXiv 2508.06944). The authors have asked to withdraw the paper; its card has what is known about that.

==========  ==================================================================  =================================
paper       meaning                                                             here
==========  ==================================================================  =================================
theta       weights of the policy                                               ``params``
mu          share of imitation in the mixture, in [mu_min, mu_max]              ``MetaWeightController.mu``
L_SFT       cross-entropy on demonstrations                                     :func:`imitation_loss`
L_RL        clipped PPO loss, minus a bonus on entropy                          :func:`policy_loss`
eps         width of the clipping, 0.2                                          ``clip``
A           advantages, normalised over the batch                               ``advantages``
U           utility of a held-out batch; in the code -L_SFT of it               minus ``val_loss``
g_mu        dU/dmu after one step of gradient descent                           :func:`..meta_gradient`
H, H*       entropy of the policy; after the warm-up                            ``entropy``, ``target_entropy``
g_H         H* - H                                                              ``Moved.entropy``
eta         learning rate of the policy                                         ``lr``
eta_mu      step size of g_mu                                                   ``meta_lr``
eta_H       step size of g_H                                                    ``entropy_lr``
k           steps from one g_mu to the next, 20                                 ``every``
W           steps of imitation alone at the start, 50                           ``warmup``
==========  ==================================================================  =================================

``L = (1 - mu) L_RL + mu L_SFT`` (Eq. 3) and ``mu <- clip(mu + eta_mu g_mu + eta_H g_H)`` (Eq. 6): an entropy below its
target raises mu. The paper's prose says the opposite; its equation and its code agree, and are followed here.

Shapes: B sequences of T tokens over a vocabulary of V. ``mask`` (B, T) is 1 where a token counts. Logits at position
t are those that token t was drawn from: whoever has the output of a decoder shifts it by one. (The authors' code does
not, for its imitation loss.) Log-probabilities and entropies are computed in float32, or in float64 where given.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "Drift",
    "drift",
    "generalised_advantages",
    "imitation_loss",
    "log_probs_and_entropy",
    "masked_mean",
    "normalised",
    "policy_loss",
    "token_entropy",
    "until_end",
    "value_loss",
]


def _log_softmax(logits: Tensor) -> Tensor:
    return F.log_softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def token_entropy(logits: Tensor) -> Tensor:
    """Entropy of the distribution that each token is drawn from, in nats; differentiable.

    Args:
        logits: (B, T, V); an entry of minus infinity, a token that is ruled out, has no part in it.

    Returns:
        (B, T), from 0 to ln V.

    Examples:
        >>> token_entropy(torch.tensor([[[0.0, 0.0, -torch.inf, -torch.inf]]])).exp()
        tensor([[2.]])
    """
    return _entropy(_log_softmax(logits))


def _entropy(log_probs: Tensor) -> Tensor:
    return -(log_probs.exp() * log_probs.masked_fill(log_probs == -torch.inf, 0.0)).sum(dim=-1)


def log_probs_and_entropy(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of each token, and :func:`token_entropy`, of one softmax: the dear part where V is large.

    Args:
        logits: (B, T, V).
        tokens: (B, T) int64.

    Returns:
        Twice (B, T).

    Examples:
        >>> log_probs, entropy = log_probs_and_entropy(torch.zeros(1, 1, 4), torch.tensor([[2]]))
        >>> log_probs.exp().item(), entropy.exp().item()
        (0.25, 4.0)
    """
    log_probs = _log_softmax(logits)
    return log_probs.gather(-1, tokens[..., None]).squeeze(-1), _entropy(log_probs)


def until_end(tokens: Tensor, end: int) -> Tensor:
    """Which tokens of a completion count: all up to its first end token, and that one.

    Args:
        tokens: (B, T).
        end: the token that ends a completion.

    Returns:
        (B, T) bool.

    Examples:
        >>> until_end(torch.tensor([[5, 9, 9, 1], [5, 6, 7, 8]]), end=9).int()
        tensor([[1, 1, 0, 0],
                [1, 1, 1, 1]], dtype=torch.int32)
    """
    ends = tokens == end
    return ends.cumsum(dim=1) - ends.long() == 0


def masked_mean(values: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over all tokens that count, of all sequences together, as in the authors' code; longer ones weigh more.

    Args:
        values: (B, T).
        mask: (B, T); None counts all.

    Examples:
        >>> masked_mean(torch.tensor([[1.0, 3.0, 9.0]]), torch.tensor([[1, 1, 0]])).item()
        2.0
    """
    if mask is None:
        return values.mean()
    mask = mask.to(values.dtype)
    return (values * mask).sum() / mask.sum()


def imitation_loss(logits: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """L_SFT: mean cross-entropy of demonstrated tokens.

    Args:
        logits: (B, T, V).
        tokens: (B, T) int64.
        mask: (B, T); None counts all.

    Examples:
        >>> round(imitation_loss(torch.zeros(1, 3, 4), torch.tensor([[0, 1, 2]])).exp().item(), 3)
        4.0
    """
    return -masked_mean(_log_softmax(logits).gather(-1, tokens[..., None]).squeeze(-1), mask)


def normalised(advantages: Tensor, mask: Tensor | None = None) -> Tensor:
    """Advantages with mean 0 and deviation 1 over the batch.

    Args:
        advantages: (B, T).
        mask: (B, T), what mean and deviation are of; None is all of it, as in the authors' code.

    Returns:
        (B, T); zeros where all of them are equal.

    Examples:
        >>> normalised(torch.tensor([[1.0, 3.0]]))
        tensor([[-0.7071,  0.7071]])
    """
    mask = torch.ones_like(advantages) if mask is None else mask.to(advantages.dtype)
    count = mask.sum()
    centred = advantages - (advantages * mask).sum() / count
    deviation = ((centred.square() * mask).sum() / (count - 1.0).clamp_min(1.0)).sqrt()
    return centred / (deviation + 1e-8)


def policy_loss(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor | None = None, *, clip: float = 0.2
) -> Tensor:
    """PPO's clipped loss: mean of ``-min(r A, clip(r, 1 - eps, 1 + eps) A)`` with the ratio r of probabilities.

    L_RL is this minus 0.01 times the mean of :func:`token_entropy`.

    Args:
        log_probs: (B, T), of the policy that is trained.
        old_log_probs: (B, T), of the policy that drew the tokens; without gradient.
        advantages: (B, T), see :func:`normalised`; without gradient.
        mask: (B, T); None counts all.
        clip: eps; default 0.2 (paper).

    Examples:
        >>> old = torch.zeros(1, 1)
        >>> [policy_loss(old + ratio.log(), old, torch.ones(1, 1)).item() for ratio in torch.tensor([1.0, 2.0])]
        [-1.0, -1.2000000476837158]
    """
    ratio = (log_probs - old_log_probs).exp()
    gain = torch.minimum(ratio * advantages, ratio.clamp(1.0 - clip, 1.0 + clip) * advantages)
    return -masked_mean(gain, mask)


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor | None = None, *, clip: float = 0.2
) -> Tensor:
    """PPO's clipped loss of a value function: half the mean of the larger of two squared errors.

    Args:
        values: any shape, predicted returns.
        old_values: of the same shape, when the tokens were drawn; without gradient.
        returns: of the same shape; without gradient.
        mask: of the same shape; None counts all.
        clip: how far a value may move from the old one before it gains nothing; default 0.2 (code).

    Examples:
        >>> value_loss(torch.tensor([0.0]), torch.tensor([1.0]), torch.tensor([2.0])).item()
        2.0
        >>> value_loss(torch.tensor([2.0]), torch.tensor([0.0]), torch.tensor([2.0])).item()  # it moved too far
        1.619999885559082
    """
    near = torch.clamp(values, old_values - clip, old_values + clip)
    return 0.5 * masked_mean(torch.maximum((values - returns).square(), (near - returns).square()), mask)


def generalised_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float = 1.0, gae_lambda: float = 0.95
) -> Tensor:
    """Generalised advantage estimation (Schulman et al. 2016) over the tokens of each sequence.

    ``A_t = sum_l (gamma lambda)^l delta_(t+l)``, ``delta_t = r_t + gamma V_(t+1) - V_t``, with value 0 behind the end.
    The returns that a value function learns are ``A + V``.

    Args:
        rewards: (B, T), of each token; a reward of the whole answer stands at its last token.
        values: (B, T), expected return before each token is drawn.
        mask: (B, T), 1 up to the end of the answer.
        gamma: discount in [0, 1]; default 1 (code).
        gae_lambda: lambda in [0, 1]; default 0.95 (code). 1 is reward minus value, 0 one step ahead.

    Returns:
        (B, T); 0 where the mask is.

    Examples:
        >>> rewards, values = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.75]])
        >>> generalised_advantages(rewards, values, torch.ones(1, 2), gae_lambda=1.0)
        tensor([[0.5000, 0.2500]])
        >>> generalised_advantages(rewards, values, torch.ones(1, 2), gae_lambda=0.0)
        tensor([[0.2500, 0.2500]])
    """
    mask = mask.to(values.dtype)
    values, rewards = values * mask, rewards * mask
    delta = rewards + gamma * F.pad(values[:, 1:], (0, 1)) - values
    step = torch.arange(values.shape[1], device=values.device)
    ahead = step[None, :] - step[:, None]  # of token u, seen from token t
    decay = torch.pow(gamma * gae_lambda, ahead.clamp_min(0).to(values.dtype)).masked_fill(ahead < 0, 0.0)
    return (delta @ decay.T) * mask


class Drift(NamedTuple):
    """How far the policy has gone from the one that drew the tokens.

    Attributes:
        kl: estimate of the divergence, mean of ``r - 1 - log r``.
        clipped: share of the tokens whose ratio lies outside of ``[1 - eps, 1 + eps]``.
    """

    kl: Tensor
    clipped: Tensor


@torch.no_grad()
def drift(log_probs: Tensor, old_log_probs: Tensor, mask: Tensor | None = None, *, clip: float = 0.2) -> Drift:
    """Divergence from the old policy, and the share of tokens that are clipped.

    Args:
        log_probs: (B, T).
        old_log_probs: (B, T).
        mask: (B, T); None counts all, as in the authors' code.
        clip: eps; default 0.2 (paper).

    Examples:
        >>> [x.item() for x in drift(torch.zeros(1, 2), torch.zeros(1, 2))]
        [0.0, 0.0]
    """
    change = log_probs - old_log_probs
    ratio = change.exp()
    outside = ((ratio - 1.0).abs() > clip).to(change.dtype)
    return Drift(masked_mean(ratio - 1.0 - change, mask), masked_mean(outside, mask))
