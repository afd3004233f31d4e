"""Numbers, effects and intervals in words, the same on the terminal, in reports and on the site."""

import math
from collections.abc import Callable, Sequence

from regularized.evidence.claims import Claim, Outcome

__all__ = ["aligned", "effect_text", "interval_text", "number"]


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


def effect_text(claim: Claim, effect: float | None) -> str:
    """An effect with sign and unit; a relative one in percent of the baseline.

    Examples:
        >>> claim = Claim("c", "s", "m", "higher", "a", "b", unit="points", relative=True)
        >>> effect_text(claim, 0.125)
        '+12.5 %'
    """
    if effect is None:
        return "–"
    value, unit = (100 * effect, "%") if claim.relative else (effect, claim.unit)
    return f"{'+' if value > 0 else ''}{number(value, 3)} {unit}".rstrip()


def interval_text(claim: Claim, outcome: Outcome) -> str:
    """The interval in the unit of :func:`effect_text`."""
    if outcome.interval is None:
        return "–"
    factor = 100 if claim.relative else 1
    low, high = (number(factor * end, 3) for end in outcome.interval)
    return f"[{low}, {high}]"
