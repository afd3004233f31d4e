"""Expressions of a few cards: their forms, and their values for many hands at once."""

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["LETTERS", "OPERATIONS", "evaluate", "forms", "with_signs"]

LETTERS = "abcd"
"""What stands for the cards in a form."""

OPERATIONS = "+-*/"


def forms(cards: int) -> list[str]:
    """All ways to set brackets, with a plus for any sign; no brackets around the whole.

    Args:
        cards: 1 to 4.

    Examples:
        >>> forms(3)
        ['(a+b)+c', 'a+(b+c)', 'a+b+c']
        >>> len(forms(4))
        11
    """
    return sorted(_forms(LETTERS[:cards]))


def _forms(letters: str) -> set[str]:
    if len(letters) == 1:
        return {letters}
    found = set()
    for split in range(1, len(letters)):
        left, right = (_with_brackets(part) for part in (letters[:split], letters[split:]))
        found |= {f"{one}+{other}" for one in left for other in right}
    return found


def _with_brackets(letters: str) -> set[str]:
    plain = _forms(letters)
    return plain if len(letters) == 1 else plain | {f"({form})" for form in plain}


def with_signs(form: str, signs: tuple[str, ...]) -> str:
    """A form with these signs, one after the other.

    Examples:
        >>> with_signs("(a+b)+c", ("-", "*"))
        '(a-b)*c'
    """
    left = iter(signs)
    return "".join(next(left) if letter == "+" else letter for letter in form)


def evaluate(expression: str, numbers: Mapping[str, Tensor]) -> Tensor:
    """The value for each hand; NaN where it divides by 0.

    Args:
        expression: letters of ``numbers``, signs and brackets; ``*`` and ``/`` bind more strongly.
        numbers: by letter, tensors of one shape.

    Examples:
        >>> evaluate("a-b*(a+b)", {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0, 0.0])})
        tensor([-11.,   2.])
    """
    rest = list(reversed(expression))

    def atom() -> Tensor:
        letter = rest.pop()
        if letter != "(":
            return numbers[letter]
        inside = total()
        rest.pop()
        return inside

    def product() -> Tensor:
        value = atom()
        while rest and rest[-1] in "*/":
            sign, other = rest.pop(), atom()
            value = value * other if sign == "*" else value / other.masked_fill(other == 0.0, torch.nan)
        return value

    def total() -> Tensor:
        value = product()
        while rest and rest[-1] in "+-":
            sign, other = rest.pop(), product()
            value = value + other if sign == "+" else value - other
        return value

    return total()
