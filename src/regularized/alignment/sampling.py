"""Responses of a causal language model: several for each prompt, as one padded block, and how they are drawn.

:func:`sample_responses` works with any module that maps token ids to logits. It reads the whole sequence again for
each new token, which is fine for small models and short answers; for models of transformers, which keep what they have
read, there is :func:`regularized.alignment.huggingface.generate_responses`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from regularized.alignment.sequence_log_probs import next_token_logits
from regularized.mechanisms.ranges import allowed, at_least, count, share

__all__ = ["Responses", "Sampler", "pack_responses", "sample_responses"]


@dataclass(frozen=True, slots=True, eq=False)
class Responses:
    """N responses to each of P prompts, as sequences of T tokens: prompt, response, padding.

    Args:
        tokens: (P, N, T) ids.
        mask: (P, N, T) bool, the tokens of the response, with the one that ends it.

    Raises:
        ValueError: the shapes differ, or a response has no token.

    Examples:
        >>> tokens = torch.tensor([[[7, 1, 2, 0], [7, 3, 0, 0]]])
        >>> responses = Responses(tokens, torch.tensor([[[0, 1, 1, 0], [0, 1, 0, 0]]]).bool())
        >>> responses.lengths
        tensor([[2, 1]])
    """

    tokens: Tensor
    mask: Tensor

    def __post_init__(self) -> None:
        if self.tokens.dim() != 3 or self.mask.shape != self.tokens.shape:
            raise ValueError(
                f"tokens and mask must both be (P, N, T), got {tuple(self.tokens.shape)} and {tuple(self.mask.shape)}"
            )
        if not bool(self.lengths.all()):
            prompt, response = (int(place) for place in (self.lengths == 0).nonzero()[0])
            raise ValueError(
                f"response {response} to prompt {prompt} has no token; let the token that ends a response count as one"
            )

    @property
    def lengths(self) -> Tensor:
        """(P, N) tokens of each response."""
        return self.mask.sum(dim=2)

    def __len__(self) -> int:
        """P."""
        return len(self.tokens)

    def first_identical(self) -> Tensor:
        """(P, N) number of the first response to the same prompt with the same tokens: its own, where it is new."""
        same = self.tokens.masked_fill(~self.mask, -1)
        equal = (same[:, :, None] == same[:, None, :]).all(dim=3)  # the prompts are alike, so the places are, too
        return equal.int().argmax(dim=2)

    def texts(self) -> list[list[list[int]]]:
        """Ids of each response, by prompt."""
        return [
            [row[scored].tolist() for row, scored in zip(rows, masks, strict=True)]
            for rows, masks in zip(self.tokens.cpu(), self.mask.cpu(), strict=True)
        ]


class Sampler(Protocol):
    """What draws responses; it takes what it draws from torch's global generator."""

    def __call__(self, model: nn.Module, prompts: Sequence[Tensor], /) -> Responses:
        """Equally many responses to each prompt, a (n,) tensor of ids."""
        ...


def pack_responses(prompts: Sequence[Tensor], responses: Sequence[Sequence[Tensor]], *, pad: int = 0) -> Responses:
    """Put given prompts and responses into one padded block.

    Args:
        prompts: P tensors (n,) of ids.
        responses: for each prompt N tensors (m,) of ids.
        pad: what to fill up with; default 0. It may be any id: the mask decides.

    Raises:
        ValueError: not equally many responses to each prompt, or none.

    Examples:
        >>> packed = pack_responses([torch.tensor([7])], [[torch.tensor([1, 2]), torch.tensor([3])]])
        >>> packed.tokens
        tensor([[[7, 1, 2],
                 [7, 3, 0]]])
    """
    counts = {len(own) for own in responses}
    if len(counts) != 1 or 0 in counts or len(prompts) != len(responses):
        raise ValueError(
            "every prompt needs equally many responses, at least one; got "
            f"{[len(own) for own in responses][:8]} for {len(prompts)} prompts"
        )
    rows = [torch.cat([prompt, own]) for prompt, several in zip(prompts, responses, strict=True) for own in several]
    starts = torch.tensor([len(prompt) for prompt in prompts for _ in range(*counts)])
    ends = torch.tensor([len(row) for row in rows])
    tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=float(pad)).long()
    place = torch.arange(tokens.shape[1])
    mask = (place >= starts[:, None]) & (place < ends[:, None])
    shape = (len(prompts), *counts, -1)
    return Responses(tokens.view(shape), mask.to(tokens.device).view(shape))


@torch.no_grad()
@allowed(
    count=count(1),
    max_new_tokens=count(1),
    temperature=at_least(0.0, "0 takes the likeliest token"),
    top_p=share("of the probability that the candidates have together"),
)
def sample_responses(
    model: nn.Module,
    prompts: Sequence[Tensor],
    *,
    max_new_tokens: int,
    count: int = 5,
    temperature: float = 0.8,
    top_p: float = 0.95,
    end: int | None = None,
    pad: int = 0,
) -> Responses:
    """Draw responses, in evaluation mode and without gradient, from torch's global generator.

    Args:
        model: from token ids (B, T) to logits (B, T, V), or an object with such ``logits``; causal. Left in its mode.
        prompts: P tensors (n,) of ids, at least one token each.
        max_new_tokens: where a response ends in any case.
        count: N, responses to each prompt; default 5 (CREAM's code).
        temperature: default 0.8 (the same).
        top_p: tokens are drawn from the likeliest ones that have this probability together; default 0.95 (the same).
        end: id of the token that ends a response, and is its last one; default None, all have ``max_new_tokens``.
        pad: id to fill up with; default 0.

    Returns:
        The responses.

    Raises:
        ValueError: an option is out of range, or there is no prompt, or an empty one.

    Examples:
        A model of two tokens that says what it has just read:

        >>> echo = nn.Embedding.from_pretrained(torch.eye(2) * 50)
        >>> drawn = sample_responses(echo, [torch.tensor([1]), torch.tensor([1, 0])], count=1, max_new_tokens=2)
        >>> drawn.texts()
        [[[1, 1]], [[0, 0]]]
    """
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise ValueError("give at least one prompt, and at least one token in each")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device).repeat_interleave(count)
    rows = torch.arange(len(lengths), device=device)
    width = int(lengths.max()) + max_new_tokens
    tokens = torch.full((len(lengths), width), pad, device=device)
    for number, prompt in enumerate(prompts):
        tokens[number * count : (number + 1) * count, : len(prompt)] = prompt.to(device)
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    training = model.training
    model.eval()
    for _ in range(max_new_tokens):
        longest = int(lengths.max())
        logits = next_token_logits(model, tokens[rows, :longest])
        last = logits[torch.arange(len(rows), device=device), lengths[rows] - 1].float()
        drawn = _draw(last, temperature, top_p)
        tokens[rows, lengths[rows]] = drawn
        mask[rows, lengths[rows]] = True
        lengths[rows] += 1
        if end is not None:
            rows = rows[drawn != end]
            if not len(rows):
                break
    model.train(training)
    width = int(lengths.max())
    return Responses(*(block[:, :width].unflatten(0, (len(prompts), count)) for block in (tokens, mask)))


def _draw(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """(B,) tokens from (B, V) logits."""
    if temperature == 0.0:
        return logits.argmax(dim=1)
    probabilities, order = (logits / temperature).softmax(dim=1).sort(dim=1, descending=True)
    before = probabilities.cumsum(dim=1) - probabilities
    kept = probabilities.masked_fill(before >= top_p, 0.0)
    kept[:, 0] = probabilities[:, 0]  # with top_p = 0 the likeliest one is left
    return order.gather(1, torch.multinomial(kept, 1)).squeeze(1)
