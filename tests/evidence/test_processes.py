"""Functions in several processes: each is called, in the caller's environment, and an error comes back."""

import os

import pytest
from torch.multiprocessing import ProcessRaisedException

from regularized.evidence.processes import run_in_processes


def write(rank, folder):
    words = [os.environ.get(name, "") for name in ("BEFORE", "GIVEN")]
    (folder / str(rank)).write_text(" ".join(words))


def fail(rank):
    if rank == 1:
        raise KeyError("the second one")


def test_each_sees_the_environment_of_the_caller(tmp_path, monkeypatch):
    """Fails if the environment is the one in which the server happened to start, or a process is left out."""
    run_in_processes(write, tmp_path)
    monkeypatch.setenv("BEFORE", "now")
    run_in_processes(write, tmp_path, count=3, environment={"GIVEN": "too"})
    assert [(tmp_path / str(rank)).read_text() for rank in range(3)] == ["now too"] * 3


def test_an_error_comes_back():
    """Fails if a check passes whose processes did not."""
    with pytest.raises(ProcessRaisedException, match="the second one"):
        run_in_processes(fail)
