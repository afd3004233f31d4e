import sys
from pathlib import Path

import pytest

from regularized.evidence import pool, worker_process
from regularized.evidence.pool import Job, Pool

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="kills and forks")


@pytest.fixture
def deaths(tmp_path, monkeypatch):
    """Makes the next processes die while they start; without it the pool is that of the real worker."""
    monkeypatch.setattr(worker_process, "PROGRAM", Path(__file__).with_name("fake_worker.py"))
    monkeypatch.setattr(pool, "PAUSE_SECONDS", 0.0)
    monkeypatch.setenv("FAKE_DEATHS", str(tmp_path))

    def set_number(number: int) -> None:
        for death in range(number):
            (tmp_path / str(death)).touch()

    return set_number


def answers(*arms, workers=1, **options):
    """Arm, status and error of each last answer."""
    jobs = [Job(arm, 0, "smoke") for arm in arms]
    with Pool("experiment", jobs, workers=workers, code_key="key", **options) as under_way:
        last = [(job.arm, answer) for job, answer in under_way.answers() if answer["status"] != "started"]
    return [(arm, answer["status"], answer.get("error", "")) for arm, answer in last]


def test_a_run_has_a_limit_of_time_if_asked(deaths):
    """Fails when a run that hangs holds up the comparison for ever, or takes the runs after it along."""
    hung, done = answers("hangs", "a", time_limit=3.0)
    assert hung == ("hangs", "failed", "the run took longer than 3 s and was ended")
    assert done == ("a", "done", "")
    with pytest.raises(ValueError, match="time_limit must be"):
        answers("a", time_limit=0.0)


def test_a_run_that_dies_is_seen_although_a_child_of_it_lives(deaths):
    """Fails when a process that a run forked holds the pipe open, and its death is waited for in vain."""
    (_, status, error), done = answers("leaves a child", "a")
    assert status == "failed"
    assert "killed (signal 9)" in error
    assert done == ("a", "done", "")


@pytest.mark.parametrize(("number", "status"), [(1, "done"), (2, "done"), (3, "fatal")])
def test_a_worker_that_is_killed_while_it_starts_is_started_again(deaths, number, status):
    """Fails when one kill at the wrong moment ends the whole comparison, or a start is tried without end."""
    deaths(number)
    assert answers("a")[0][:2] == ("a", status)


def test_where_others_started_a_worker_that_cannot_costs_its_run_alone(deaths):
    """Fails when a lack of memory in the middle of a comparison ends it."""
    jobs = [Job(arm, 0, "smoke") for arm in ("dies", "a", "b")]
    found = []
    with Pool("experiment", jobs, workers=1, code_key="key") as under_way:
        for job, answer in under_way.answers():
            if (job.arm, answer["status"]) == ("dies", "started"):
                deaths(3)  # of the processes that come after this one
            if answer["status"] != "started":
                found.append((job.arm, answer["status"]))
    assert found == [("dies", "failed"), ("a", "failed"), ("b", "done")]


def test_an_experiment_that_ends_its_process_is_not_started_again(deaths, monkeypatch):
    """Fails when what is wrong with the experiment is taken for bad luck, or its last words are lost."""
    monkeypatch.setenv("FAKE_EXIT", "1")
    ((_, status, error),) = answers("a")
    assert (status, error) == ("fatal", "the process of the run exited with code 1")


def test_a_system_that_starts_no_process_is_told(deaths, monkeypatch):
    """Fails when the thread that cannot start a process dies, and the caller waits for its answer for ever."""

    def refuse():
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(pool, "WorkerProcess", refuse)
    ((_, status, error),) = answers("a")
    assert status == "fatal"
    assert error == "no process can be started: [Errno 11] Resource temporarily unavailable"


def test_a_defect_of_the_pool_reaches_the_caller(deaths, monkeypatch):
    """Fails when a thread that dies of our own mistake leaves the caller waiting."""
    monkeypatch.setattr(pool.Pool, "start", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        answers("a")
