"""What holds for every test and example: random numbers, tried examples, a read-only disk, what may be skipped.

In CI that is only what needs a GPU or does not apply, elsewhere also what needs a missing program.
"""

import gc
import os
import random
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis.internal.conjecture import providers

# The same examples on every machine and in every run, however slow it is. Hypothesis would also draw from the constants
# of all our modules that happen to be loaded: of other ones in each process, and reading them takes seconds.
settings.load_profile("ci")
providers._get_local_constants = lambda: providers._local_constants

# How the reason of a skip begins that no installation would mend; the last is pytest's of an example that says so.
_ALLOWED = ("needs a GPU", "not applicable: ", "all tests skipped by +SKIP option")


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    """What a test draws without a seed does not depend on which ones ran before it in the same process."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 -- what scikit-learn and others draw from
    # Where no device is, torch.manual_seed keeps a seed for each kind with the stack of its call: milliseconds a test.
    (torch.manual_seed if torch.accelerator.is_available() else torch.default_generator.manual_seed)(0)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """What is loaded by collecting stays for the whole session: no collection of garbage need go through it again."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


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


@pytest.fixture
def read_only():
    """Runs a command for which a folder lies on a read-only disk."""

    def run(folder: Path, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        mount = f'mount --bind {folder} {folder} && mount -o remount,ro,bind {folder} && exec "$@"'
        inside = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
        if shutil.which("unshare") is None or subprocess.run([*inside, mount, "sh", "true"], check=False).returncode:
            pytest.skip(
                "not applicable: a read-only disk is made by mount namespaces, which this system does not allow"
            )
        return subprocess.run([*inside, mount, "sh", *command], capture_output=True, text=True, check=False)

    return run
