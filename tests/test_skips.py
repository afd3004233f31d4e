"""In CI nothing is skipped that could run."""

from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

TESTS = """
import pytest

def test_package():
    pytest.importorskip("no_such_package", reason="needs no_such_package")

@pytest.mark.skipif(True, reason="Chromium is not installed")
def test_program(): ...

@pytest.mark.skipif(True, reason="needs a GPU")
def test_gpu(): ...

def test_that_does_not_apply():
    pytest.skip("not applicable: it has no coefficient")
"""
MODULE = """
import pytest
pytest.importorskip("no_such_package", reason="needs no_such_package")
"""


@pytest.mark.parametrize(("ci", "outcomes"), [("true", {"failed": 1, "errors": 2, "skipped": 2}), ("", {"skipped": 5})])
def test_a_missing_program_fails_in_ci_and_nowhere_else(pytester, monkeypatch, ci, outcomes):
    """Fails when a test, or a whole module, can be left out of CI unnoticed, or a GPU is asked for."""
    monkeypatch.setenv("CI", ci)
    pytester.makeconftest(Path(__file__).parents[1].joinpath("conftest.py").read_text(encoding="utf-8"))
    pytester.makepyfile(test_items=TESTS, test_module=MODULE)
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider", "--continue-on-collection-errors", "-rs")
    result.assert_outcomes(**outcomes)
