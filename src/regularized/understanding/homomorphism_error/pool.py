"""Pairs mined once from the training set, in the official manner: a batch of their own beside the task's.

:mod:`regularized.understanding.homomorphism_error.penalty` has the paper and its symbols.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from regularized.mechanisms.taps import Taps
from regularized.understanding.homomorphism_error.penalty import CompositionOperators, composition_loss, find_pairs

__all__ = ["PairPool"]

# Shapes: B sequences, T positions, d width, W modifiers, n pairs.

Target: TypeAlias = Literal["mean", "composed"]


@dataclass(frozen=True, slots=True)
class PairPool:
    """Pairs mined once from the training set, as the official code has them; draw from it at every step.

    Args:
        tokens: (P, T) sequence of each pair, padded.
        first: (P,) position of the word; the modifier stands behind it.
        which: (P,) the modifier, as a position in ``modifiers``.

    Raises:
        ValueError: (from :meth:`mine`) there is no pair in the data.

    Examples:
        >>> pool = PairPool.mine(torch.tensor([[5, 9, 3], [3, 5, 8]]), words=[5], modifiers=[8, 9])
        >>> pool.first.tolist(), pool.which.tolist()
        ([0, 1], [1, 0])
    """

    tokens: Tensor
    first: Tensor
    which: Tensor

    @classmethod
    def mine(cls, tokens: Tensor, words: Sequence[int], modifiers: Sequence[int], *, largest: int = 2048) -> "PairPool":
        """All pairs of a data set in order, at most ``largest`` (2048, official).

        Raises:
            ValueError: there is none.
        """
        found, which = find_pairs(tokens, words, modifiers)
        rows, first = found.nonzero(as_tuple=True)
        if not len(rows):
            raise ValueError(
                f"no token of {list(words)} is directly followed by one of {list(modifiers)} in the data: nothing to "
                "compose. Check the tokens, or whether something (noise, a space) always stands between them"
            )
        rows, first = rows[:largest], first[:largest]
        return cls(tokens[rows], first, which[rows, first])

    def sample(self, size: int, generator: torch.Generator) -> "PairPool":
        """``size`` pairs, drawn with replacement."""
        drawn = torch.randint(len(self.first), (size,), generator=generator).to(self.first.device)
        return PairPool(self.tokens[drawn], self.first[drawn], self.which[drawn])

    def loss(
        self,
        model: nn.Module,
        layers: Sequence[str],
        operators: CompositionOperators,
        *,
        target: Target = "mean",
        detach_target: bool = False,
    ) -> Tensor:
        """:func:`composition_loss` of these pairs: one forward pass of the model on their sequences.

        Args:
            model: called as ``model(tokens)``.
            layers: dotted names of submodules whose outputs are the states (B, T, d).
            operators: what predicts.
            target: ``"mean"`` or ``"composed"``; the latter encodes word and modifier apart, each as a sequence of its
                own, and predicts the state at the modifier in the phrase.
            detach_target: as in :func:`composition_loss`.
        """
        rows = torch.arange(len(self.first), device=self.tokens.device)
        position = (rows, self.first, self.first + 1)
        with Taps(model, layers) as taps:
            model(self.tokens)
            hidden = [taps.states[name] for name in layers]
            if target == "mean":
                return composition_loss(hidden, position, self.which, operators, detach_target=detach_target)
            alone = self.tokens.gather(1, torch.stack(position[1:], dim=1))
            model(alone.reshape(-1, 1))
            parts = [taps.states[name].reshape(len(rows), 2, -1) for name in layers]
        phrases = [states[rows, self.first + 1] for states in hidden]
        apart = (rows, torch.zeros_like(rows), torch.ones_like(rows))
        return composition_loss(parts, apart, self.which, operators, detach_target=detach_target, targets=phrases)
