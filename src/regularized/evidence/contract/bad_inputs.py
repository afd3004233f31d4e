"""Bad inputs of a technique, and the errors that answer them."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["BadInput", "check_bad_input"]


@dataclass(frozen=True, slots=True)
class BadInput:
    """One line of a sheet's "bad input", and the error or warning that answers it.

    Args:
        line: the line, shortened.
        call: does the wrong thing.
        error: exception or warning class.
        says: words that its message must contain.
    """

    line: str
    call: Callable[[], Any]
    error: type[Exception]
    says: tuple[str, ...]


def check_bad_input(bad: BadInput) -> None:
    """The call raises or warns as promised, in words that help."""
    message: str | None = None
    if issubclass(bad.error, Warning):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            bad.call()
        message = next((str(w.message) for w in caught if issubclass(w.category, bad.error)), None)
    else:
        try:
            bad.call()
        except bad.error as error:
            message = str(error)
    assert message is not None, f"{bad.line}: no {bad.error.__name__} came"
    absent = [word for word in bad.says if word not in message]
    assert not absent, f"{bad.line}: the message lacks {absent}: {message}"
