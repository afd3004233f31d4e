"""What may be skipped: in CI, only what needs a GPU or does not apply; elsewhere also what needs a missing program."""

import os
from collections.abc import Iterator

import pytest

# How the reason of a skip begins that no installation would mend.
_ALLOWED = ("needs a GPU", "not applicable: ")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Iterator[None]:
    return _judged((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Iterator[None]:
    return _judged((yield))


def _judged(report: pytest.TestReport | pytest.CollectReport) -> pytest.TestReport | pytest.CollectReport:
    """In CI a skip for something that could be installed is a failure: nobody reads the summary of a green run."""
    if os.environ.get("CI") == "true" and report.skipped and not hasattr(report, "wasxfail"):
        file, line, message = report.longrepr
        reason = message.removeprefix("Skipped: ")
        if not reason.startswith(_ALLOWED):
            report.outcome = "failed"
            report.longrepr = f"{file}:{line}: in CI this must not be skipped: {reason}"
    return report
