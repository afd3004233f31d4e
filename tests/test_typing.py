"""The types that a user's checker sees: ours checks function bodies, theirs reads what the package says outside."""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import regularized

# What remains: loggers of modules that runs are keyed by, and what Accelerate and PEFT leave untyped.
SHARE = 0.98


@pytest.mark.slow
def test_a_users_type_checker_knows_the_public_names():
    """Fails when constructors leave the types of their attributes to be guessed, and each checker guesses its own."""
    pytest.importorskip("pyright", reason="needs pyright")
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "--verifytypes", "regularized"]
    # No look for a newer pyright in the network; editable and other installations are found by the path alone.
    paths = os.pathsep.join([str(Path(regularized.__file__).parents[1]), sysconfig.get_paths()["purelib"]])
    quiet = os.environ | {"PYRIGHT_PYTHON_IGNORE_WARNINGS": "1", "PYTHONPATH": paths}
    # Room for what is new: with the little that node leaves to it, a fifth of the time goes into collecting garbage.
    quiet["NODE_OPTIONS"] = "--max-semi-space-size=128"
    done = subprocess.run(
        [*command, "--ignoreexternal", "--outputjson"], capture_output=True, text=True, env=quiet, check=False
    )
    assert done.stdout, done.stderr
    report = json.loads(done.stdout)["typeCompleteness"]
    unknown = [symbol["name"] for symbol in report["symbols"] if symbol["isExported"] and not symbol["isTypeKnown"]]
    assert report["completenessScore"] >= SHARE, unknown
