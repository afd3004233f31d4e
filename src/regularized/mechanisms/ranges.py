"""Allowed ranges of options, declared where the options are: name, value, range and remedy of a message from one place.

A constructor says what it takes, and what it is given is looked at before it runs::

    @allowed(momentum=share(), sigma=positive("in pixels"), credit=Choice("batch", "sample"))
    def __init__(self, *, momentum: float = 0.9, sigma: float = 6.0, credit: str = "batch") -> None: ...

A range that depends on another option is checked by hand, with the same words: ``between(1, num_classes - 1)("k", k)``.
Nothing here belongs into a step.
"""

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any, Literal, ParamSpec, Protocol, TypeAlias, TypeVar

__all__ = [
    "Choice",
    "Interval",
    "Range",
    "above",
    "allowed",
    "at_least",
    "between",
    "check_fields",
    "count",
    "finite",
    "positive",
    "ranges_of",
    "share",
]

P = ParamSpec("P")
R = TypeVar("R")


class Range(Protocol):
    """What an option may be: an object that refuses what it may not."""

    def __call__(self, name: str, value: Any, /) -> None:
        """Refuse a value of the option ``name``.

        Raises:
            TypeError: it is of another kind.
            ValueError: it is outside the range.
        """
        ...


Ends: TypeAlias = Literal["[]", "[)", "(]", "()"]


@dataclass(frozen=True, slots=True)
class Interval:
    """Numbers between two ends; NaN lies in none.

    It is made by :func:`between`, :func:`at_least`, :func:`positive`, :func:`finite`, :func:`share` or :func:`count`.

    Args:
        low: the lower end.
        high: the upper end.
        ends: which of the ends belong to it: ``"[]"`` both, ``"()"`` none.
        meaning: what the number is, for the message: ``"the length of the data set"``.
        remedy: what to do instead, the end of the message: ``"the paper uses 0.8"``.
        whole: whole numbers only.
        none: what None stands for, where it is allowed; see :meth:`or_none`.
        schedule: whether it may be a function; see :meth:`or_schedule`.
        words: the range in words, behind "must be"; default as an inequality or an interval.

    Examples:
        >>> Interval(0.0, 1.0, "[)", meaning="a share of the samples")("rate", 1.0)
        Traceback (most recent call last):
        ...
        ValueError: rate must be in [0, 1), a share of the samples; got 1.0
    """

    low: float
    high: float
    ends: Ends = "[]"
    meaning: str = ""
    remedy: str = ""
    whole: bool = False
    none: str | None = None
    schedule: bool = False
    words: str = ""

    def __call__(self, name: str, value: Any, /) -> None:
        """Refuse a value of the option ``name`` that is no number, or lies outside."""
        if (value is None and self.none is not None) or (self.schedule and callable(value)):
            return
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(self._message(name, value, kind=True))
        if self.whole and not isinstance(value, Integral):
            raise ValueError(self._message(name, value, kind=True))
        number = float(value)
        above = self.low <= number if self.ends[0] == "[" else self.low < number
        below = number <= self.high if self.ends[1] == "]" else number < self.high
        if not (above and below):
            raise ValueError(self._message(name, value))

    def or_none(self, meaning: str = "") -> "Interval":
        """The same, or None, which stands for ``meaning``."""
        return replace(self, none=meaning)

    def or_schedule(self) -> "Interval":
        """The same, or a function (of :class:`~regularized.training.progress.Progress`), of which nothing is known."""
        return replace(self, schedule=True)

    def __str__(self) -> str:
        """The range in words, behind "must be"."""
        if self.words:
            return self.words
        if self.high == math.inf:
            return f"{'>=' if self.ends[0] == '[' else '>'} {self.low:g}"
        return f"in {self.ends[0]}{self.low:g}, {self.high:g}{self.ends[1]}"

    def _message(self, name: str, value: Any, *, kind: bool = False) -> str:
        kinds = "a whole number" if self.whole else "a number"
        if self.schedule:
            kinds += " or a function of Progress"
        words = f"{kinds}, {self}" if kind else str(self)
        if not kind and value == math.inf and self.ends[1] == ")" and self.low != -math.inf:
            words += " and finite"
        if self.none is not None:
            words += f", or None{f' for {self.none}' if self.none else ''}"
        if self.meaning:
            words += f", {self.meaning}"
        got = f"{'; ' if self.meaning or self.none is not None else ', '}got {value!r}"
        return f"{name} must be {words}{got}{f'; {self.remedy}' if self.remedy else ''}"


@dataclass(frozen=True, slots=True, init=False)
class Choice:
    """One of some words.

    Examples:
        >>> Choice("svd", "newton_schulz")("method", "qr")
        Traceback (most recent call last):
        ...
        ValueError: method must be 'svd' or 'newton_schulz', got 'qr'
    """

    words: tuple[str, ...]
    meaning: str
    remedy: str

    def __init__(self, *words: str, meaning: str = "", remedy: str = "") -> None:
        for name, value in (("words", words), ("meaning", meaning), ("remedy", remedy)):
            object.__setattr__(self, name, value)

    def __call__(self, name: str, value: Any, /) -> None:
        """Refuse a value of the option ``name`` that is none of the words."""
        if not isinstance(value, str) or value not in self.words:
            got = f"{f', {self.meaning};' if self.meaning else ','} got {value!r}"
            raise ValueError(f"{name} must be {self}{got}{f'; {self.remedy}' if self.remedy else ''}")

    def __str__(self) -> str:
        """The words, behind "must be"."""
        *first, last = map(repr, self.words)
        return f"{', '.join(first)} or {last}" if first else last


def between(
    low: float, high: float, ends: Ends = "[]", meaning: str = "", remedy: str = "", *, whole: bool = False
) -> Interval:
    """Numbers between two ends, see :class:`Interval`.

    Examples:
        >>> between(0.0, 1.0, "(]")("keep", 0)
        Traceback (most recent call last):
        ...
        ValueError: keep must be in (0, 1], got 0
    """
    return Interval(low, high, ends, meaning, remedy, whole)


def at_least(low: float, meaning: str = "", remedy: str = "") -> Interval:
    """Finite numbers from ``low`` on.

    Examples:
        >>> at_least(0.0, remedy="0 switches it off")("strength", -1.0)
        Traceback (most recent call last):
        ...
        ValueError: strength must be >= 0, got -1.0; 0 switches it off
    """
    return Interval(low, math.inf, "[)", meaning, remedy)


def above(low: float, meaning: str = "", remedy: str = "") -> Interval:
    """Finite numbers above ``low``; above 0 it reads ``> 0``, see also :func:`positive`.

    Examples:
        >>> above(0.0)("mu", 0.0)
        Traceback (most recent call last):
        ...
        ValueError: mu must be > 0, got 0.0
    """
    return Interval(low, math.inf, "()", meaning, remedy)


def positive(meaning: str = "", remedy: str = "", *, infinity: bool = False) -> Interval:
    """Numbers above 0, without or with infinity.

    Examples:
        >>> positive().or_none("no clipping")("clip_norm", 0.0)
        Traceback (most recent call last):
        ...
        ValueError: clip_norm must be positive, or None for no clipping; got 0.0
    """
    return Interval(0.0, math.inf, "(]" if infinity else "()", meaning, remedy, words="positive")


def finite(meaning: str = "", remedy: str = "") -> Interval:
    """All numbers but NaN and the infinite ones.

    Examples:
        >>> finite()("mu", math.inf)
        Traceback (most recent call last):
        ...
        ValueError: mu must be finite, got inf
    """
    return Interval(-math.inf, math.inf, "()", meaning, remedy, words="finite")


def share(meaning: str = "", remedy: str = "") -> Interval:
    """Numbers from 0 to 1, both included.

    Examples:
        >>> share(remedy="the paper uses 0.8")("alpha", 8)
        Traceback (most recent call last):
        ...
        ValueError: alpha must be in [0, 1], got 8; the paper uses 0.8
    """
    return Interval(0.0, 1.0, "[]", meaning, remedy)


def count(low: int, meaning: str = "", remedy: str = "") -> Interval:
    """Whole numbers from ``low`` on.

    Examples:
        >>> count(1, "the length of the data set")("num_samples", 0)
        Traceback (most recent call last):
        ...
        ValueError: num_samples must be at least 1, the length of the data set; got 0
    """
    return Interval(low, math.inf, "[)", meaning, remedy, whole=True, words=f"at least {low}")


def allowed(**ranges: Range) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Check the options of a constructor or function before it runs.

    Args:
        ranges: what each option may be, by its name. What is left out is not looked at.

    Raises:
        TypeError: when decorating: it has no option of such a name.

    Examples:
        >>> @allowed(momentum=share())
        ... def average(momentum=0.9):
        ...     return momentum
        >>> average(0.5)
        0.5
        >>> average(momentum=1.5)
        Traceback (most recent call last):
        ...
        ValueError: momentum must be in [0, 1], got 1.5
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)
        if unknown := sorted(ranges.keys() - signature.parameters.keys()):
            raise TypeError(f"{function.__qualname__} has no option {unknown}; it has {list(signature.parameters)}")

        @functools.wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                given = signature.bind(*args, **kwargs).arguments
            except TypeError:
                given = {}  # the call itself says it better
            for name, range_ in ranges.items():
                if name in given:
                    range_(name, given[name])
            return function(*args, **kwargs)

        checked.__allowed__ = ranges  # type: ignore[attr-defined]
        return checked

    return decorate


def check_fields(owner: object, **ranges: Range) -> None:
    """Check fields of a dataclass, in its ``__post_init__``; messages name the class, too.

    Examples:
        >>> from types import SimpleNamespace
        >>> check_fields(SimpleNamespace(every=0), every=count(1))
        Traceback (most recent call last):
        ...
        ValueError: SimpleNamespace.every must be at least 1, got 0
    """
    for name, range_ in ranges.items():
        range_(f"{type(owner).__name__}.{name}", getattr(owner, name))


def ranges_of(function: Callable[..., Any]) -> Mapping[str, Range]:
    """The ranges that a constructor or function was declared with, by option; of a class those of its constructor.

    Examples:
        >>> @allowed(sigma=positive())
        ... def blur(sigma): ...
        >>> str(ranges_of(blur)["sigma"])
        'positive'
    """
    owner = inspect.getattr_static(function, "__init__") if isinstance(function, type) else function
    found: Mapping[str, Range] = getattr(owner, "__allowed__", {})
    return found
