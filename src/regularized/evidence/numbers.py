"""Numbers in words, the same on the terminal, in reports and on the site."""

import math
from collections.abc import Callable, Sequence

__all__ = ["NARROW", "aligned", "number"]

NARROW = 90
"""Columns of a terminal below which what is a table otherwise stands one below the other."""


def number(value: float | None, digits: int = 4) -> str:
    """A number to about four digits, a dash where there is none.

    Examples:
        >>> number(0.000123456), number(92.3456), number(12345.6), number(None), number(3.0)
        ('0.0001235', '92.35', '12346', '–', '3')
    """
    if value is None:
        return "–"
    if not math.isfinite(value):
        return str(value)
    if value and not 1e-4 <= abs(value) < 1e6:
        return f"{value:.{digits - 1}e}"
    text = f"{value:.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"
    return "0" if text == "-0" else text


def aligned(values: Sequence[float | None]) -> Callable[[float | None], str]:
    """A way to write numbers of one column: as many decimals for all as four digits of the largest need.

    Examples:
        >>> show = aligned([70.125, 9.5, None])
        >>> show(70.125), show(9.5), show(None)
        ('70.12', '9.50', '–')
    """
    largest = max((abs(value) for value in values if value is not None and math.isfinite(value)), default=0.0)
    if largest and not 1e-4 <= largest < 1e6:
        return number
    decimals = max(0, 3 - math.floor(math.log10(largest))) if largest else 0

    def show(value: float | None) -> str:
        return f"{value:.{decimals}f}" if value is not None and math.isfinite(value) else number(value)

    return show
