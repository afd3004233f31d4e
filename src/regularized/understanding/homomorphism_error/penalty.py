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

import torch
from torch import Tensor, nn

__all__ = ["CompositionOperators", "composition_loss", "find_pairs"]

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
        self.dim = dim
        self.modifiers: tuple[int, ...] = tuple(modifiers)
        self.ops: nn.ModuleDict = nn.ModuleDict(
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
        errors = squared_errors(operators, a, m, target.detach() if detach_target else target, which)
        by_modifier = torch.zeros_like(counted).index_add(0, which, errors) / counted.clamp(min=1)
        total = total + by_modifier.sum() / present
    return total / len(hidden)


def squared_errors(operators: CompositionOperators, a: Tensor, m: Tensor, target: Tensor, which: Tensor) -> Tensor:
    """(n,) mean squared error of each pair."""
    return (operators(torch.cat([a, m], dim=-1), which) - target).square().mean(dim=-1)  # type: ignore[no-any-return]
