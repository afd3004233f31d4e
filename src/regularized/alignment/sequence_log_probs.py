"""Log-probabilities of responses under a causal language model, with the prompt and the padding left out.

Sequences are (B, T) token ids, a prompt and then a response, each from position 0 on and padded on the right: a causal
model needs no attention mask then. A (B, T) mask says which tokens are scored. It is given, and never guessed from the
ids: a padding id that equals the id of the end would otherwise hide the end of every response.
"""

from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Reduction", "next_token_logits", "sequence_log_probs", "token_log_probs"]

Reduction: TypeAlias = Literal["sum", "mean"]

_IGNORED = -100


def token_log_probs(logits: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """Log-probability of each scored token, given those before it.

    Args:
        logits: (B, K, V) of the last K <= T positions, what models of transformers give with ``logits_to_keep=K``;
            usually K = T. ``logits[:, -2]`` predict the last token.
        tokens: (B, T) ids; what stands at masked places does not matter.
        mask: (B, T) bool or 0 and 1: the tokens to be scored. The first token, and those before the kept logits, have
            no prediction.

    Returns:
        (B, K - 1) log-probabilities in nats, 0 where the mask is; in float32 at least, whatever the logits are.

    Raises:
        ValueError: the shapes do not fit; or, on the CPU, a token without a prediction is to be scored.

    Examples:
        >>> logits = torch.zeros(1, 3, 4)
        >>> token_log_probs(logits, torch.tensor([[3, 1, 2]]), torch.tensor([[False, False, True]]))
        tensor([[-0.0000, -1.3863]])
    """
    length, kept = tokens.shape[-1], logits.shape[1] if logits.dim() == 3 else 0
    if tokens.dim() != 2 or mask.shape != tokens.shape or len(logits) != len(tokens) or not 2 <= kept <= length:
        raise ValueError(
            "logits must be (B, K, V) with 2 <= K <= T, tokens and mask (B, T); got "
            f"{tuple(logits.shape)}, {tuple(tokens.shape)} and {tuple(mask.shape)}"
        )
    scored = mask.bool()
    if scored.device.type == "cpu" and bool(scored[:, : length - kept + 1].any()):
        raise ValueError(
            f"the mask scores one of the first {length - kept + 1} tokens, for which there is no prediction; "
            "begin every sequence with a token that is not scored, and keep the logits from the one before the response"
        )
    at = slice(length - kept + 1, None)
    targets = tokens[:, at].masked_fill(~scored[:, at], _IGNORED)
    predictions = logits[:, :-1]
    if predictions.dtype in (torch.float16, torch.bfloat16):
        predictions = predictions.float()
    nats = F.cross_entropy(predictions.flatten(0, 1), targets.flatten().long(), reduction="none", ignore_index=_IGNORED)
    return -nats.view(targets.shape)


def sequence_log_probs(logits: Tensor, tokens: Tensor, mask: Tensor, *, reduction: Reduction = "sum") -> Tensor:
    """Log-probability of each response: the sum over its tokens, or their mean.

    Preference losses want the sum. The mean does not grow with the length; it ranks responses by how likely a model
    finds their tokens.

    Args:
        logits: (B, K, V), see :func:`token_log_probs`.
        tokens: (B, T).
        mask: (B, T).
        reduction: ``"sum"`` (default) or ``"mean"``.

    Returns:
        (B,), in nats, or nats a token.

    Raises:
        ValueError: as :func:`token_log_probs`; an unknown reduction; or, on the CPU, the mean of no token is asked for.

    Examples:
        >>> logits, tokens = torch.zeros(1, 4, 10), torch.tensor([[5, 1, 2, 0]])
        >>> response = torch.tensor([[False, True, True, False]])
        >>> sequence_log_probs(logits, tokens, response)
        tensor([-4.6052])
        >>> sequence_log_probs(logits, tokens, response, reduction="mean")
        tensor([-2.3026])
    """
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction must be 'sum' or 'mean', got {reduction!r}")
    sums = token_log_probs(logits, tokens, mask).sum(dim=1)
    if reduction == "sum":
        return sums
    lengths = mask.sum(dim=1)
    if lengths.device.type == "cpu" and not bool(lengths.all()):
        empty = int((lengths == 0).nonzero()[0])
        raise ValueError(f"sequence {empty} has no token to be scored, so there is no mean; leave it out")
    return sums / lengths


def next_token_logits(model: nn.Module, tokens: Tensor) -> Tensor:
    """What a model says about each next token, (B, T, V): its output, or the ``logits`` of it as in transformers.

    Args:
        model: called with the token ids alone; causal, so that padding on the right changes nothing before it.
        tokens: (B, T) ids.

    Examples:
        >>> next_token_logits(nn.Embedding(4, 4), torch.zeros(1, 3, dtype=torch.int64)).shape
        torch.Size([1, 3, 4])
    """
    out: Any = model(tokens)
    logits: Tensor = getattr(out, "logits", out)
    return logits
