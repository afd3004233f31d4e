"""Text drawn from a language model, for a student to learn from."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from regularized.mechanisms.ranges import allowed, count, positive

__all__ = ["sample_text"]


@torch.no_grad()
@allowed(length=count(1), temperature=positive(), context=count(1).or_none("all that there is"))
def sample_text(
    model: Callable[[Tensor], Tensor],
    start: Tensor,
    length: int,
    *,
    temperature: float = 1.0,
    context: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Continue beginnings token by token.

    Every new token is a forward pass over the text so far, so that any model can be asked, an ensemble included.

    Args:
        model: from tokens (n, T) to logits (n, T, V); a module is in evaluation mode meanwhile.
        start: (n, P) int64, P >= 1: a token that begins a text, or prompts of one length.
        length: tokens to draw.
        temperature: divides the logits; default 1, the paper's.
        context: last tokens that the model is shown; default all.
        generator: of the model's device; default the global one.

    Returns:
        (n, P + length) tokens, the beginnings first.

    Raises:
        ValueError: ``start`` is not (n, P) with P >= 1, or a number is outside its range.

    Examples:
        >>> def successor(tokens):  # surely the next number, modulo 5
        ...     return 1e4 * torch.nn.functional.one_hot((tokens + 1) % 5, 5).float()
        >>> sample_text(successor, torch.tensor([[3], [0]]), 4)
        tensor([[3, 4, 0, 1, 2],
                [0, 1, 2, 3, 4]])
    """
    if start.ndim != 2 or start.shape[1] < 1:
        raise ValueError(
            f"start must be (n, P) tokens with P >= 1, got {tuple(start.shape)}; give each text a first token"
        )
    modes = {module: module.training for module in model.modules()} if isinstance(model, nn.Module) else {}
    if isinstance(model, nn.Module):
        model.eval()
    try:
        text = start
        for _ in range(length):
            shown = text if context is None else text[:, -context:]
            probabilities = (model(shown)[:, -1] / temperature).softmax(dim=-1)
            text = torch.cat([text, torch.multinomial(probabilities, 1, generator=generator)], dim=1)
        return text
    finally:
        for module, mode in modes.items():
            module.training = mode
