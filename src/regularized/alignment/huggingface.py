"""Responses of models of transformers, which keep what they have read while they write."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from regularized.alignment.sampling import Responses, pack_responses
from regularized.mechanisms.ranges import allowed, at_least, count, share

__all__ = ["chat_prompts", "generate_responses"]


@torch.no_grad()
@allowed(
    count=count(1),
    max_new_tokens=count(1),
    temperature=at_least(0.0, "0 takes the likeliest token"),
    top_p=share("of the probability that the candidates have together"),
)
def generate_responses(
    model: nn.Module,
    prompts: Sequence[Tensor],
    *,
    max_new_tokens: int,
    count: int = 5,
    temperature: float = 0.8,
    top_p: float = 0.95,
    end: int | Sequence[int] | None = None,
    pad: int = 0,
) -> Responses:
    """As :func:`~regularized.alignment.sampling.sample_responses`, by the model's own ``generate``.

    Prompts are padded on the left for that, with an attention mask; what comes back is padded on the right. Settings of
    the model's generation config that are not named here, such as ``top_k``, are switched off.

    Args:
        model: a model of transformers that generates; left in its mode.
        prompts: P tensors (n,) of ids, at least one token each; see :func:`chat_prompts`.
        max_new_tokens: where a response ends in any case; the paper's code has 768.
        count: N, responses to each prompt; default 5.
        temperature: default 0.8.
        top_p: default 0.95.
        end: id or ids of the token that ends a response; default that of the model's generation config.
        pad: id to fill up with; default 0.

    Raises:
        ValueError: an option is out of range, or there is no prompt, or an empty one.

    Examples:
        >>> from regularized.evidence.pretrained import byte_tokens, tiny_llama
        >>> prompts = [byte_tokens("2+2="), byte_tokens("1+")]
        >>> generate_responses(tiny_llama(0), prompts, count=3, max_new_tokens=4).lengths
        tensor([[4, 4, 4],
                [4, 4, 4]])
    """
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise ValueError("give at least one prompt, and at least one token in each")
    generator: Any = model
    if end is None:
        end = generator.generation_config.eos_token_id
    ends = [] if end is None else [end] if isinstance(end, int) else list(end)
    width = max(len(prompt) for prompt in prompts)
    device = next(model.parameters()).device
    tokens = torch.full((len(prompts), width), pad)
    attended = torch.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt) :] = prompt
        attended[row, width - len(prompt) :] = 1
    sampled = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    training = model.training
    model.eval()
    written = generator.generate(
        input_ids=tokens.to(device),
        attention_mask=attended.to(device),
        num_return_sequences=count,
        max_new_tokens=max_new_tokens,
        eos_token_id=ends or None,
        pad_token_id=pad,
        **(sampled if temperature > 0.0 else {"do_sample": False}),
    )[:, width:].cpu()
    model.train(training)
    over = torch.isin(written, torch.tensor(ends, dtype=written.dtype)).int()
    lengths = ((over.cumsum(1) - over) == 0).sum(dim=1)  # up to the first end, and with it
    rows = [row[:length] for row, length in zip(written, lengths.tolist(), strict=True)]
    packed = pack_responses(
        [prompt.cpu() for prompt in prompts],
        [rows[first : first + count] for first in range(0, len(rows), count)],
        pad=pad,
    )
    return Responses(packed.tokens.to(device), packed.mask.to(device))


def chat_prompts(tokenizer: Any, questions: Sequence[str], *, system: str | None = None) -> list[Tensor]:
    """Questions in a tokenizer's chat template, up to where the answer begins.

    Args:
        tokenizer: of transformers, with a chat template.
        questions: what the user says.
        system: what stands before it; default that of the template.

    Returns:
        A tensor (n,) of ids for each question.

    Examples:
        With a stand-in for a tokenizer:

        >>> class Words:
        ...     def apply_chat_template(self, messages, **options):
        ...         return " ".join(f"{m['role']} {m['content']}" for m in messages) + " assistant"
        ...     def __call__(self, text, **options):
        ...         return {"input_ids": [["system", "user", "hello", "assistant"].index(w) for w in text.split()]}
        >>> chat_prompts(Words(), ["hello"])
        [tensor([1, 2, 3])]
    """
    before = [] if system is None else [{"role": "system", "content": system}]
    texts = [
        tokenizer.apply_chat_template(
            [*before, {"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        for question in questions
    ]
    return [torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
