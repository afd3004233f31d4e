"""Two real gloo processes: the weights of one process with the whole batch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file
from tests.processes import run_two
from torch import nn

from regularized.evidence.processes import run_in_processes
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
    run_two(
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
    run_two(scenarios.main, "tables", tmp_path, "--batch-size", 5, "--samples", 26)
    for number in range(2):
        state = load_file(tmp_path / f"{number}.safetensors")
        for name, tensor in expected.items():
            assert torch.allclose(state[name], tensor, rtol=0, atol=1e-5), f"{name} of process {number}"


@pytest.mark.slow
def test_all_processes_stop_together(scenarios, tmp_path):
    """Fails if only the process with the NaN raises (the other would wait for it), another term is named, a weight is
    spoilt, or a table keeps a NaN."""
    run_two(scenarios.main, "spoilt", tmp_path)
    named = {"loss": "step 3: term 'spoil'", "gradient": "step 3: the gradient of term 'spoil'", "data": "term 'elr'"}
    for number in range(2):
        for spoil, says in named.items():
            with safe_open(tmp_path / f"{spoil}-{number}.safetensors", "pt") as file:
                assert says in file.metadata()["end"]
                assert all(file.get_tensor(name).isfinite().all() for name in file.keys())  # noqa: SIM118


@pytest.mark.slow
def test_two_processes_resume_exactly(scenarios, tmp_path):
    """Fails if the random state of the second process is lost, or it picks another checkpoint."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    run_two(scenarios.main, "resumable", whole, "--folder", tmp_path / "a")
    for stop in (5, 99):
        run_two(scenarios.main, "resumable", parts, "--folder", tmp_path / "b", "--max-steps", stop)
    for number in range(2):
        expected, got = (load_file(folder / f"{number}.safetensors") for folder in (whole, parts))
        for name, tensor in expected.items():
            assert torch.equal(got[name], tensor), f"{name} of process {number}"
    first, second = (load_file(whole / f"{n}.safetensors") for n in range(2))
    assert not torch.equal(first["drawn"], second["drawn"])  # dropout differs between processes
    assert torch.equal(first["model.0.weight"], second["model.0.weight"])


@pytest.mark.slow
def test_torchrun(tmp_path):
    """Fails if the usual launcher's environment is not enough."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", SCRIPT]
    done = subprocess.run([*command, "distributed", tmp_path], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert torch.equal(*(load_file(tmp_path / f"{n}.safetensors")["model.0.weight"] for n in range(2)))


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
