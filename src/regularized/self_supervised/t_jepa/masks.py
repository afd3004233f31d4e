"""Which tokens are seen and which are predicted: as many in each row of a batch, so that rows stay a tensor.

Sizes are drawn once a batch, ``n = least + round((most - least) u)``, again until context and target fit into a row.
Positions are drawn for each row: a context, then K targets out of what is left, which may share tokens with each other
but none with the context.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from regularized.mechanisms.ranges import allowed, count

__all__ = ["MaskSizes", "draw_masks"]

# Shapes: B rows, D tokens that can be hidden, n_c of a context, n_t of a target, K targets.


@dataclass(frozen=True, slots=True)
class MaskSizes:
    """How many of D tokens are context, and how many target: least and most, both included.

    Args:
        tokens: D.
        min_context: at least 1.
        max_context: at least ``min_context``.
        min_target: at least 1.
        max_target: at least ``min_target``.

    Raises:
        ValueError: the numbers are out of order, or the smallest context and target together exceed D.

    Examples:
        >>> MaskSizes.of_shares(54)
        MaskSizes(tokens=54, min_context=7, max_context=20, min_target=8, max_target=34)
    """

    tokens: int
    min_context: int
    max_context: int
    min_target: int
    max_target: int

    def __post_init__(self) -> None:
        for name, least, most in (
            ("context", self.min_context, self.max_context),
            ("target", self.min_target, self.max_target),
        ):
            if not 1 <= least <= most:
                raise ValueError(f"1 <= min_{name} <= max_{name} must hold, got {least} and {most}")
        if self.min_context + self.min_target > self.tokens:
            raise ValueError(
                f"the smallest context ({self.min_context}) and target ({self.min_target}) need "
                f"{self.min_context + self.min_target} tokens, a row has {self.tokens}; lower min_context or min_target"
            )

    @classmethod
    def of_shares(
        cls, tokens: int, context: tuple[float, float] = (0.136, 0.368), target: tuple[float, float] = (0.156, 0.622)
    ) -> "MaskSizes":
        """Sizes as shares of D, rounded.

        Args:
            tokens: D, the number of columns.
            context: least and most; default that of the authors' run on Jannis.
            target: the same.

        Raises:
            ValueError: a share is outside [0, 1] or out of order, rounds to 0, or leaves no range; with the shares to
                change and the smallest D that they suit.

        Examples:
            >>> MaskSizes.of_shares(4)  # doctest: +ELLIPSIS
            Traceback (most recent call last):
            ...
            ValueError: context=(0.136, 0.368) of 4 columns is 1 to 1, ...
        """
        sizes: list[int] = []
        for name, shares in (("context", context), ("target", target)):
            if not 0 <= shares[0] <= shares[1] <= 1:
                raise ValueError(f"{name} must be two shares in [0, 1], the smaller one first; got {shares}")
            least, most = (round(tokens * share) for share in shares)
            if not 1 <= least < most:
                smallest = _smallest(tokens, lambda n, s=shares: 1 <= round(n * s[0]) < round(n * s[1]))  # type: ignore[misc]
                raise ValueError(
                    f"{name}={shares} of {tokens} columns is {least} to {most}, and must be a range that begins at 1 "
                    f"or more; change {name}{_suits(smallest)}"
                )
            sizes += [least, most]
        if sizes[0] + sizes[2] > tokens:
            raise ValueError(
                f"the smallest context ({sizes[0]} of {tokens} columns) and the smallest target ({sizes[2]}) never fit "
                f"into a row together; lower context[0]={context[0]} or target[0]={target[0]}"
                + _suits(_smallest(tokens, lambda n: round(n * context[0]) + round(n * target[0]) <= n))
            )
        return cls(tokens, *sizes)

    @classmethod
    def any_table(cls, tokens: int) -> "MaskSizes":
        """Sizes of :meth:`of_shares` where they suit, and the nearest that can be drawn for a narrower table.

        Raises:
            ValueError: there is one column only.

        Examples:
            >>> MaskSizes.any_table(3)
            MaskSizes(tokens=3, min_context=1, max_context=1, min_target=1, max_target=2)
        """
        if tokens < 2:
            raise ValueError(
                f"one column must be seen and another predicted, so 2 are needed; got n_features = {tokens}"
            )
        if tokens >= 5:
            return cls.of_shares(tokens)
        return cls(tokens, 1, max(1, tokens // 3), 1, max(1, tokens - 1))

    def draw(self, generator: torch.Generator) -> tuple[int, int]:
        """n_c and n_t of a batch, from the stream of the official collator.

        Args:
            generator: on the CPU.
        """
        while True:
            context, target = (
                least + int(torch.round((most - least) * torch.rand(1, generator=generator)))
                for least, most in ((self.min_context, self.max_context), (self.min_target, self.max_target))
            )
            if context + target <= self.tokens:
                return context, target


def _smallest(tokens: int, suits: Callable[[int], bool]) -> int:
    """The least number of columns above ``tokens`` that suits, 0 where none below 1,000 does."""
    return next((n for n in range(tokens + 1, 1000) if suits(n)), 0)


def _suits(smallest: int) -> str:
    return f", which suits tables of {smallest} columns and more" if smallest else ""


@allowed(rows=count(1), num_targets=count(1))
def draw_masks(
    rows: int,
    tokens: int,
    sizes: tuple[int, int],
    *,
    num_targets: int,
    generator: torch.Generator,
    repeat_targets: bool = False,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Context and targets of each row.

    The noise comes from a generator on the CPU, one stream whatever the device; it is sorted on the device.

    Args:
        rows: B.
        tokens: D.
        sizes: n_c and n_t, of :meth:`MaskSizes.draw`.
        num_targets: K.
        generator: on the CPU.
        repeat_targets: all K targets of a row are the same, as in the authors' released runs (views of one array that
            is shuffled in place); default False, the paper.
        device: of the result; default the CPU.

    Returns:
        (B, n_c) and (K, B, n_t) positions 0 ... D - 1, in random order.

    Raises:
        ValueError: context and target exceed D.

    Examples:
        >>> draws = torch.Generator().manual_seed(0)
        >>> context, targets = draw_masks(2, 6, (2, 3), num_targets=4, generator=draws)
        >>> context.shape, targets.shape
        (torch.Size([2, 2]), torch.Size([4, 2, 3]))
    """
    seen, hidden = sizes
    if seen < 1 or hidden < 1 or seen + hidden > tokens:
        raise ValueError(f"context and target must be at least 1 and fit into {tokens} tokens, got {seen} and {hidden}")
    left = tokens - seen
    sets = 1 if repeat_targets else num_targets
    noise = torch.rand(rows * (tokens + (sets - 1) * left), generator=generator).to(device, non_blocking=True)
    order = noise[: rows * tokens].view(rows, tokens).argsort(dim=1)
    context, rest = order[:, :seen], order[:, seen:]
    first = rest[:, :hidden]  # already in random order: one target needs no second sort
    if sets == 1:
        return context, first.expand(num_targets, rows, hidden)
    choice = noise[rows * tokens :].view(sets - 1, rows, left).argsort(dim=2)[:, :, :hidden]
    others = rest.expand(sets - 1, rows, left).gather(2, choice)
    return context, torch.cat([first[None], others])
