"""Declared ranges of options: what is let through, what a message says, and that every declaration holds."""

import importlib
import inspect
import math
import pkgutil

import numpy as np
import pytest

import regularized
from regularized.mechanisms.ranges import Choice, allowed, at_least, between, count, finite, positive, ranges_of, share


@pytest.mark.parametrize(
    ("range_", "inside", "outside"),
    [
        (share(), [0, 0.5, 1, np.float32(0.5)], [-1e-9, 1.0000001, math.nan, math.inf]),
        (between(0.0, 1.0, "[)"), [0, 0.999], [1, -0.1, math.nan]),
        (between(0.0, 1.0, "(]"), [1e-9, 1], [0, 1.1, math.nan]),
        (between(0.0, 1.0, "()"), [0.5], [0, 1, math.nan]),
        (positive(infinity=True), [1e-9, math.inf], [0.0, -1.0, math.nan]),
        (positive(), [1e-9, 5], [0, -1, math.inf, math.nan]),
        (at_least(0.0), [0, 3.5], [-0.1, math.inf, math.nan]),
        (finite(), [-1e300, 0], [math.inf, -math.inf, math.nan]),
        (count(1), [1, 10**9, np.int64(3)], [0, -1, 2.5]),
        (Choice("mean", "sum"), ["mean", "sum"], ["max", None, 1, ["mean"]]),
    ],
)
def test_what_is_let_through(range_, inside, outside):
    """Fails when an end is open that is closed, or NaN, infinity or half a number slips through."""
    for value in inside:
        range_("option", value)
    for value in outside:
        with pytest.raises(ValueError, match=r"^option must be .*got"):
            range_("option", value)


@pytest.mark.parametrize("range_", [share(), count(1), positive().or_none("no clipping")])
@pytest.mark.parametrize("value", ["1", True, [1], 1j])
def test_what_is_no_number(range_, value):
    """Fails when a word, a truth value or a list is compared with a number, or taken for one."""
    with pytest.raises(TypeError, match=r"option must be a (whole )?number, "):
        range_("option", value)


@pytest.mark.parametrize(
    ("range_", "value", "message"),
    [
        (share(), 1.1, "x must be in [0, 1], got 1.1"),
        (share("of the batch", remedy="try 0.8"), 8, "x must be in [0, 1], of the batch; got 8; try 0.8"),
        (between(1, 8, whole=True), 9, "x must be in [1, 8], got 9"),
        (between(1.0, math.inf, "(]"), 1, "x must be > 1, got 1"),
        (positive(), 0.0, "x must be positive, got 0.0"),
        (at_least(0.0), math.inf, "x must be >= 0 and finite, got inf"),
        (count(2, "classes"), 2.5, "x must be a whole number, at least 2, classes; got 2.5"),
        (positive().or_none("no clipping"), -1, "x must be positive, or None for no clipping; got -1"),
        (at_least(0.0).or_schedule(), "a", "x must be a number or a function of Progress, >= 0, got 'a'"),
        (Choice("a", "b", "c"), "d", "x must be 'a', 'b' or 'c', got 'd'"),
        (Choice("a", "b", meaning="over the width"), None, "x must be 'a' or 'b', over the width; got None"),
    ],
)
def test_messages(range_, value, message):
    """Fails when name, range, value or remedy is missing from a message."""
    with pytest.raises((TypeError, ValueError)) as caught:
        range_("x", value)
    assert str(caught.value) == message


def test_none_and_schedules_pass_where_they_are_allowed():
    """Fails when None or a function is refused where it may be, or passes where it may not."""
    positive().or_none()("x", None)
    share().or_schedule()("x", lambda progress: 5.0)
    for value in (None, len):
        with pytest.raises(TypeError):
            positive()("x", value)


class Base:
    @allowed(rate=share(), size=count(1))
    def __init__(self, size, *, rate=0.5, **rest):
        self.size, self.rate = size, rate


class Derived(Base):
    def __init__(self, rate):
        super().__init__(3, rate=rate)


def test_options_are_looked_at_however_they_are_given():
    """Fails when an option by position or by name, or one passed on by a subclass, is not looked at."""
    assert Base(2, rate=0.25).rate == 0.25
    for call in (lambda: Base(0), lambda: Base(size=0), lambda: Base(1, rate=2), lambda: Derived(2.0)):
        with pytest.raises(ValueError, match="must be"):
            call()
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'size'"):
        Base()
    assert list(inspect.signature(Base).parameters) == ["size", "rate", "rest"]
    with pytest.raises(TypeError, match=r"no option \['rates'\]"):
        allowed(rates=share())(Base.__init__)


def declared():
    """All classes and functions of the package whose options have ranges."""
    found = {}
    for module in pkgutil.walk_packages(regularized.__path__, "regularized."):
        if module.name.split(".")[1] in ("cli", "site", "papers", "evidence"):
            continue
        try:
            loaded = importlib.import_module(module.name)
        except ImportError:  # an extra that is not installed here
            continue
        for name, value in vars(loaded).items():
            if callable(value) and getattr(value, "__module__", None) == module.name and ranges_of(value):
                found[f"{module.name}.{name}"] = value
    return found


def test_defaults_lie_in_their_ranges():
    """Fails when a default is refused as soon as a user gives it, or the search finds no declaration."""
    found = declared()
    assert len(found) >= 10
    for name, owner in found.items():
        parameters = inspect.signature(owner).parameters
        for option, range_ in ranges_of(owner).items():
            if option in parameters and (default := parameters[option].default) is not inspect.Parameter.empty:
                range_(f"{option} of {name}", default)
