"""A term for models that must recombine what they know: the state of a phrase as a simple map of its parts' states.

Zhiyu An, Wan Du: Representational Homomorphism Predicts and Improves Compositional Generalization In Transformer
Language Model, 2026, arXiv 2601.18858. Official code:
ryeii/Representational-Homomorphism-for-Transformer-Language-Models at 3dec32c, without a licence: read, not copied.

A word (``jump``) directly followed by a modifier (``twice``) is a pair. For each modifier a small network, trained
along, predicts the state of the phrase from the states of the two words:

    paper            here               shape, range
    h_l              hidden             (B, T, d), outputs of the chosen layers
    a, m             a, m               (n, d), states of word and modifier
    c                target             (n, d), state of the phrase
    f_w              operators          Linear(2d, 256), ReLU, Linear(256, d) for each modifier w, shared by all layers
    lambda           weight             0.2
    L_HE             composition_loss   mean over layers of the mean over modifiers of MSE(f_w([a; m]), c)

Paper and code differ: the paper speaks of predicting the phrase from its parts, the code *defines* the phrase's state
as the mean of the two, so that the error measures scale and conditioning of the states. ``target="mean"`` is the code
(default), ``target="composed"`` the state that the model itself has at the modifier, after both words.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from regularized.mechanisms.taps import Taps
from regularized.training.progress import Coefficient
from regularized.training.step import Batch, Step
from regularized.training.terms import Term

__all__ = ["CompositionOperators", "Compositionality", "PairPool", "composition_loss", "find_pairs"]

Target: TypeAlias = Literal["mean", "composed"]
# Shapes: B sequences, T positions, d width, W modifiers, n pairs.


class CompositionOperators(nn.Module):
    """One small network for each modifier: from the states of word and modifier to that of the phrase.

    Args:
        dim: d, width of the states.
        modifiers: token of each modifier.
        hidden: width of the hidden layer; default 256 (official).

    Raises:
        ValueError: no modifier, or one given twice.

    Examples:
        >>> operators = CompositionOperators(4, [7, 9], hidden=8)
        >>> operators(torch.randn(5, 8), torch.tensor([0, 1, 1, 0, 1])).shape
        torch.Size([5, 4])
    """

    def __init__(self, dim: int, modifiers: Sequence[int], *, hidden: int = 256) -> None:
        super().__init__()
        if not modifiers or len(set(modifiers)) != len(modifiers):
            raise ValueError(f"modifiers must be one or more different tokens, got {list(modifiers)}")
        self.dim, self.modifiers = dim, tuple(modifiers)
        self.ops = nn.ModuleDict(
            {
                str(modifier): nn.Sequential(nn.Linear(2 * dim, hidden), nn.ReLU(), nn.Linear(hidden, dim))
                for modifier in modifiers
            }
        )

    def forward(self, pairs: Tensor, which: Tensor) -> Tensor:
        """Predict phrases.

        Args:
            pairs: (n, 2d), [a; m].
            which: (n,) the modifier of each, as a position in ``modifiers``.

        Returns:
            (n, d).
        """
        # All operators on all pairs, then a choice: there are few operators, and nothing waits for the device.
        every = torch.stack([self.ops[str(modifier)](pairs) for modifier in self.modifiers])
        return every.gather(0, which.view(1, -1, 1).expand(1, -1, every.shape[-1]))[0]


def find_pairs(
    tokens: Tensor, words: Sequence[int] | Tensor, modifiers: Sequence[int] | Tensor
) -> tuple[Tensor, Tensor]:
    """Where a word is directly followed by a modifier.

    Args:
        tokens: (B, T) integers.
        words: tokens that can be modified; as a tensor on the device, nothing is copied there.
        modifiers: tokens of the modifiers, likewise.

    Returns:
        ``(found, which)``, both (B, T - 1): whether a pair begins at a position, and the modifier that follows as a
        position in ``modifiers`` (0 where none does). On the device, without waiting for it.

    Examples:
        >>> found, which = find_pairs(torch.tensor([[5, 9, 3, 5, 3]]), words=[5], modifiers=[8, 9])
        >>> found.tolist(), which.tolist()
        ([[True, False, False, False]], [[1, 0, 0, 0]])
    """
    word, modifier = (torch.as_tensor(those, device=tokens.device) for those in (words, modifiers))
    following = tokens[:, 1:, None] == modifier
    found = (tokens[:, :-1, None] == word).any(dim=-1) & following.any(dim=-1)
    return found, following.int().argmax(dim=-1) * found


def composition_loss(
    hidden: Sequence[Tensor],
    position: tuple[Tensor, Tensor, Tensor],
    which: Tensor,
    operators: CompositionOperators,
    *,
    detach_target: bool = False,
    targets: Sequence[Tensor] | None = None,
) -> Tensor:
    """The official loss on a batch of pairs: layers, then modifiers, then pairs and dimensions are averaged.

    Args:
        hidden: (B, T, d) states, one tensor a layer.
        position: (row, first, second), (n,) each: sequence, position of the word, position of the modifier.
        which: (n,) the modifier as a position in ``operators.modifiers``. Modifiers that do not occur do not count.
        operators: what predicts.
        detach_target: keep gradients from the target, so that states cannot be drawn together through it; default
            False (official).
        targets: (n, d) a layer, what is predicted; default the mean of the two states (official).

    Returns:
        Scalar.

    Raises:
        ValueError: no layer, or shapes do not fit.

    Examples:
        >>> hidden, operators = torch.randn(2, 6, 4), CompositionOperators(4, [7], hidden=8)
        >>> at = torch.tensor([0, 1]), torch.tensor([2, 0]), torch.tensor([3, 1])
        >>> composition_loss([hidden], at, torch.tensor([0, 0]), operators).ndim
        0
    """
    if not hidden:
        raise ValueError("no hidden states are given: name the layers, or tap them with mechanisms.taps.Taps")
    row, first, second = position
    if not row.shape == first.shape == second.shape == which.shape:
        raise ValueError(
            f"rows, positions and modifiers must all be (n,), got {[tuple(p.shape) for p in (*position, which)]}"
        )
    total = hidden[0].new_zeros(())
    counted = torch.zeros(len(operators.modifiers), dtype=hidden[0].dtype, device=which.device)
    counted = counted.index_add(0, which, torch.ones_like(which, dtype=counted.dtype))
    present = (counted > 0).sum().clamp(min=1)
    for layer, states in enumerate(hidden):
        a, m = states[row, first], states[row, second]
        target = (a + m) / 2 if targets is None else targets[layer]
        errors = _squared_errors(operators, a, m, target.detach() if detach_target else target, which)
        by_modifier = torch.zeros_like(counted).index_add(0, which, errors) / counted.clamp(min=1)
        total = total + by_modifier.sum() / present
    return total / len(hidden)


def _squared_errors(operators: CompositionOperators, a: Tensor, m: Tensor, target: Tensor, which: Tensor) -> Tensor:
    """(n,) mean squared error of each pair."""
    return (operators(torch.cat([a, m], dim=-1), which) - target).square().mean(dim=-1)  # type: ignore[no-any-return]


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
        self.operators = CompositionOperators(dim, modifiers, hidden=hidden)
        # On the device with the rest, so that no step copies them there; part of no state.
        self.register_buffer("words", torch.tensor(list(words)), persistent=False)
        self.register_buffer("modifiers", torch.tensor(list(modifiers)), persistent=False)
        self.taps = tuple(layers)

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
        total = step.hidden(self.taps[0]).new_zeros(())
        for name in self.taps:
            states = step.hidden(name).flatten(0, 1)
            a, m = states.index_select(0, first), states.index_select(0, first + 1)
            target = (a + m) / 2
            errors = _squared_errors(self.operators, a, m, target.detach() if self.detach_target else target, which)
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
