"""The term for the loop, on the pairs of the task's own batch.

:mod:`regularized.understanding.homomorphism_error.penalty` has the paper and its symbols.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from regularized.training.progress import Coefficient
from regularized.training.step import Batch, Step
from regularized.training.terms import Term
from regularized.understanding.homomorphism_error.penalty import CompositionOperators, find_pairs, squared_errors

__all__ = ["Compositionality"]

# Shapes: B sequences, T positions, d width, W modifiers, n pairs.


class Compositionality(Term):
    """The term for the loop, on pairs of the task's own batch: no second forward pass.

    A pair is a word directly followed by a modifier. Summed over pairs, averaged over layers; counted are the pairs, so
    that micro-batches and processes give the whole batch's mean (over pairs, where the official loss averages modifiers
    first). Its operators are parameters of the term: the optimizer holds them, and the model that is left is unchanged.

    *Not* for pretrained language models, and not where a sure gain in accuracy is expected: watch the error divided by
    the variance of the states, see :func:`~regularized.understanding.homomorphism_error.homomorphism_error`.

    Args:
        dim: d, width of the states.
        words: tokens that can be modified.
        modifiers: tokens of the modifiers.
        layers: dotted names of submodules whose outputs are the states (B, T, d).
        hidden: width of the operators; default 256 (official).
        detach_target: as in :func:`composition_loss`; default False (official).
        weight: lambda; default 0.2 (official).

    Raises:
        ValueError: no layer is named, tokens overlap, or the batch's inputs are not (B, T) integers.

    Examples:
        >>> term = Compositionality(8, words=[1, 2], modifiers=[3], layers=["blocks.1", "blocks.3"])
        >>> term.taps, len(list(term.parameters()))
        (('blocks.1', 'blocks.3'), 4)
    """

    sharding = "forward"
    words: Tensor
    modifiers: Tensor

    def __init__(
        self,
        dim: int,
        *,
        words: Sequence[int],
        modifiers: Sequence[int],
        layers: Sequence[str],
        hidden: int = 256,
        detach_target: bool = False,
        weight: Coefficient = 0.2,
    ) -> None:
        super().__init__(weight=weight)
        if not layers:
            raise ValueError("name the layers whose outputs are the hidden states, such as layers=['blocks.3']")
        if not words or set(words) & set(modifiers):
            raise ValueError(
                f"words must be one or more tokens that are no modifiers, got {list(words)} and {list(modifiers)}"
            )
        self.detach_target = detach_target
        self.operators: CompositionOperators = CompositionOperators(dim, modifiers, hidden=hidden)
        # On the device with the rest, so that no step copies them there; part of no state.
        self.register_buffer("words", torch.tensor(list(words)), persistent=False)
        self.register_buffer("modifiers", torch.tensor(list(modifiers)), persistent=False)
        self.taps: tuple[str, ...] = tuple(layers)

    def count(self, batch: Batch) -> int | Tensor:
        """Number of pairs in the batch."""
        return self._pairs(batch)[0].sum()

    def forward(self, step: Step) -> Tensor:
        """Sum over the pairs of the batch."""
        found, which = self._pairs(step.batch)
        rows, last = found.shape
        # Position of each candidate among all (B T); the one that follows is its neighbour in the same sequence.
        first = torch.arange(rows * (last + 1), device=found.device).view(rows, last + 1)[:, :-1]
        if found.device.type == "cpu" and not torch.compiler.is_compiling():
            # Few candidates are pairs. On a GPU their number would have to be waited for: there the others stay.
            first, which, found = first[found], which[found], found[found]
        first, which, found = first.flatten(), which.flatten(), found.flatten()
        dtype = next(self.operators.parameters()).dtype  # states may be half as wide: autocast ends with the model
        total = torch.zeros((), dtype=dtype, device=found.device)
        for name in self.taps:
            states = step.hidden(name).flatten(0, 1)
            states = states.to(torch.promote_types(states.dtype, dtype))
            a, m = states.index_select(0, first), states.index_select(0, first + 1)
            target = (a + m) / 2
            errors = squared_errors(self.operators, a, m, target.detach() if self.detach_target else target, which)
            # Where no pair begins the error is that of nothing; a choice, not a product, so that it stays harmless.
            total = total + torch.where(found, errors, 0.0).sum()
        return total / len(self.taps)

    def _pairs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        tokens: Any = batch.inputs
        if not isinstance(tokens, Tensor) and "input_ids" in tokens:
            tokens = tokens["input_ids"]
        if not isinstance(tokens, Tensor) or tokens.ndim != 2 or tokens.is_floating_point():
            shape = tuple(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
            raise ValueError(f"the model's input must be (B, T) integer tokens, got {shape}")
        return find_pairs(tokens, self.words, self.modifiers)
