"""The helper of the tests of bad input must be able to fail, and no paper goes without such tests."""

from pathlib import Path

import pytest
from tests.bad_input import assert_refused

from regularized.papers.catalogue import load_catalogue


def test_helper():
    """Fails when another error, silence, or a message without the promised words passes."""
    assert_refused(lambda: 1 / 0, ZeroDivisionError, ("division",))
    with pytest.raises(AssertionError, match="lacks"):
        assert_refused(lambda: 1 / 0, ZeroDivisionError, ("remedy",))
    with pytest.raises(AssertionError, match="no ValueError"):
        assert_refused(lambda: None, ValueError, ())
    with pytest.raises(AssertionError, match="no UserWarning"):
        assert_refused(lambda: None, UserWarning, ())


@pytest.mark.parametrize("entry", [e for e in load_catalogue() if e.implemented], ids=lambda entry: entry.slug)
def test_every_paper_has_rows(entry):
    """Fails for a paper whose tests never try a bad input."""
    family = Path(__file__).parent / entry.card.families[0]
    files = [*family.glob(f"{entry.slug}/test_*.py"), *family.glob(f"test_{entry.slug}*.py")]
    assert any("refused(" in path.read_text(encoding="utf-8") for path in files)
