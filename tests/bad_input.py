"""What tests of bad input share: a row for each, and how it is looked at."""

import warnings

import pytest


def refused(line, call, error, says):
    """One row: what is wrong, a function that does it, the exception or warning, and words that must be in it."""
    return pytest.param(call, error, says, id=line)


def assert_refused(call, error, says):
    """The call raises or warns as promised, in words that help."""
    message = None
    if issubclass(error, Warning):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
        message = next((str(w.message) for w in caught if issubclass(w.category, error)), None)
    else:
        try:
            call()
        except error as raised:
            message = str(raised)
    assert message is not None, f"no {error.__name__} came"
    absent = [word for word in says if word not in message]
    assert not absent, f"the message lacks {absent}: {message}"
