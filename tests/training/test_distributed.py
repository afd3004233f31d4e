"""Two real gloo processes: the weights of one process with the whole batch."""

import json
import multiprocessing as mp
import os
import socket
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from regularized.evidence.processes import run_in_processes, run_launched, start_method
from regularized.mechanisms.distributed import leave_process_group
from regularized.training import CrossEntropy, Trainer

SCRIPT = Path(__file__).parent / "scenarios.py"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("batch_size", "accumulate", "samples", "loader"),
    [
        (8, 1, 30, False),
        (5, 2, 26, False),  # odd parts; the last batch has one sample, so one process has none
        (5, 1, 26, True),
    ],
)
def test_two_processes_end_where_one_does(batch_size, accumulate, samples, loader, scenarios, tmp_path):
    """Fails if gradients are averaged over unequal parts, a term's own parameters are not exchanged, ignored labels
    counted for each process, clipping done on a part, initial weights not shared, or the samples split otherwise."""
    expected, history = scenarios.distributed(batch_size, accumulate, samples, loader=loader, log=tmp_path / "one")
    options = ["--batch-size", batch_size, "--accumulate", accumulate, "--samples", samples]
    run_launched(
        scenarios.main,
        "distributed",
        tmp_path,
        "--folder",
        tmp_path / "two",
        *options,
        *(["--loader"] if loader else []),
    )
    for number in range(2):
        state = load_file(tmp_path / f"{number}.safetensors")
        assert state.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.allclose(state[name], tensor, rtol=0, atol=1e-5), f"{name} of process {number}"
    one, two = (
        [json.loads(line) for line in (tmp_path / n / "log.jsonl").read_text().splitlines()] for n in ("one", "two")
    )
    assert (one[0]["config"]["processes"], two[0]["config"]["processes"]) == (1, 2)
    for ours, theirs in zip(two[1:], one[1:], strict=True):  # the first process writes, of all processes' means
        ours.pop("steps_per_second", None)
        theirs.pop("steps_per_second", None)
        assert ours == pytest.approx(theirs, abs=1e-4)
    assert history


@pytest.mark.slow
def test_tables_of_two_processes_are_those_of_one(scenarios, tmp_path):
    """Fails if a table cannot be sent (int16 on gloo), a process without samples cannot take part (the last of 26 by 5
    is one sample), or the rows of one process are missing in another's table."""
    expected, end = scenarios.tables(5, 26)
    assert end == "finished"
    run_launched(scenarios.main, "tables", tmp_path, "--batch-size", 5, "--samples", 26)
    for number in range(2):
        state = load_file(tmp_path / f"{number}.safetensors")
        for name, tensor in expected.items():
            assert torch.allclose(state[name], tensor, rtol=0, atol=1e-5), f"{name} of process {number}"


@pytest.mark.slow
def test_all_processes_stop_together(scenarios, tmp_path):
    """Fails if only the process with the NaN raises (the other would wait for it), another term is named, a weight is
    spoilt, or a table keeps a NaN."""
    run_launched(scenarios.main, "spoilt", tmp_path)
    named = {"loss": "step 3: term 'spoil'", "gradient": "step 3: the gradient of term 'spoil'", "data": "term 'elr'"}
    for number in range(2):
        for spoil, says in named.items():
            with safe_open(tmp_path / f"{spoil}-{number}.safetensors", "pt") as file:
                assert says in file.metadata()["end"]
                assert all(file.get_tensor(name).isfinite().all() for name in file.keys())  # noqa: SIM118


@pytest.mark.slow
def test_a_rest_that_one_process_cannot_compute_is_refused_by_all(scenarios, tmp_path):
    """Fails if one process refuses an empty or single sample and the others wait for it until they are killed."""
    run_launched(scenarios.main, "refused", tmp_path)
    for number in range(2):
        empty, norm, whole = (tmp_path / f"{number}.txt").read_text().splitlines()
        for end, says in ((empty, "the state is empty"), (norm, "Expected more than 1 value per channel")):
            assert says in end
            if number == 0:  # the other raises the model's own error
                assert "batch of" in end
                assert "process 1 failed (ValueError" in end
                assert "drop_last=True" in end
        assert whole == "finished"


def troubled(number, group, *words):
    """One of two processes as a launcher starts them, of which one gets into trouble."""
    os.environ.update(group, RANK=str(number), LOCAL_RANK=str(number))
    import_module("tests.training.scenarios").main("troubled", *words)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trouble", "rank", "says"),
    [
        ("stop", 0, "process 0 does not answer"),  # which holds the store by which the processes found each other
        ("fail", 1, "process 1 failed (ZeroDivisionError: of one process alone)"),
    ],
)
def test_who_waits_in_vain_stops_and_says_for_whom(trouble, rank, says, tmp_path):
    """Fails if a peer that was stopped, or went elsewhere, is waited for without end, or is not named."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    words = (tmp_path, "--trouble", trouble, "--rank", rank)
    start = mp.get_context(start_method()).Process
    workers = [start(target=troubled, args=(number, group, *words)) for number in range(2)]
    for worker in workers:
        worker.start()
    end = tmp_path / f"{1 - rank}.txt"
    until = time.monotonic() + 120
    try:
        while not (end.is_file() and end.read_text()):
            assert time.monotonic() < until, "still waiting"
            time.sleep(0.1)
    finally:
        for worker in workers:
            worker.kill()
            worker.join()
    assert end.read_text().startswith("PeerError: process")
    assert says in end.read_text()


@pytest.fixture(scope="module")
def undisturbed(scenarios, tmp_path_factory):
    """Where the two processes of a training that nothing interrupted wrote their ends."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run_launched(scenarios.main, "resumable", folder, "--folder", folder / "checkpoints")
    return folder


def assert_the_same_end(folder, undisturbed):
    for number in range(2):
        expected, got = (load_file(each / f"{number}.safetensors") for each in (undisturbed, folder))
        assert got.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(got[name], tensor), f"{name} of process {number}"


@pytest.mark.slow
def test_two_processes_resume_exactly(undisturbed, scenarios, tmp_path):
    """Fails if the random state of the second process is lost, or it picks another checkpoint."""
    for stop in (5, 99):
        run_launched(scenarios.main, "resumable", tmp_path, "--folder", tmp_path / "b", "--max-steps", stop)
    assert_the_same_end(tmp_path, undisturbed)
    first, second = (load_file(undisturbed / f"{n}.safetensors") for n in range(2))
    assert not torch.equal(first["drawn"], second["drawn"])  # dropout differs between processes
    assert torch.equal(first["model.0.weight"], second["model.0.weight"])


@pytest.mark.slow
def test_torchrun_goes_on_after_a_process_was_killed(undisturbed, tmp_path):
    """Fails if the usual launcher's environment is not enough; if the process that is left holds the folder of
    checkpoints, or does not end; if the second attempt begins anew, or ends elsewhere than a run without accident."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    scenario = [SCRIPT, "resumable", tmp_path, "--folder", tmp_path / "checkpoints", "--kill-at", "6", "--rank", "1"]
    command = [*torchrun, "--max-restarts", "1", *scenario]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert_the_same_end(tmp_path, undisturbed)
    for number in range(2):
        whole, rest = (_about(folder / f"{number}.safetensors") for folder in (undisturbed, tmp_path))
        assert rest["restarts"] == "1"
        # Process 1 dies after its step 6, before the checkpoint of it, for which both are needed.
        assert int(rest["steps"]) == int(whole["steps"]) - 5


def test_restarts_on_several_machines_ask_for_a_store_of_each_attempt(monkeypatch):
    """Fails if a launch is begun whose second attempt would wait for processes of the first."""
    launched = {"MAX_RESTARTS": "1", "USE_AGENT_STORE": "True", "RESTART_COUNT": "0"}
    for name, value in launched.items():
        monkeypatch.setenv(f"TORCHELASTIC_{name}", value)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        Trainer(nn.Linear(2, 2), terms={"task": CrossEntropy()}, optimizer=torch.optim.SGD)


def _about(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def unseen(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    with pytest.raises(ValueError, match="the process group has 2 processes"):
        Trainer(nn.Linear(2, 2), terms={"task": CrossEntropy()}, optimizer=torch.optim.SGD)
    leave_process_group()


def test_group_that_accelerate_does_not_see_is_refused(tmp_path, monkeypatch):
    """Fails if two processes train as if each were alone."""
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(variable, raising=False)
    run_in_processes(unseen, tmp_path)
