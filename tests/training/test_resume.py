"""Interrupted anywhere, resumed, and bit for bit the same: weights, terms, order, dropout, early stopping."""

import json
import random
import signal
from functools import cache

import pytest
import torch
from safetensors.torch import load_file
from torch.multiprocessing import ProcessExitedException

from regularized.evidence.processes import run_in_processes

STEPS = 5 * 4  # 30 samples, batches of 4, two to a step


def _equal(a, b):
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), f"{name} differs by {(tensor - b[name]).abs().max()}"


@cache
def _whole(scenarios, kind):
    """State and history of a run that nothing interrupts."""
    model, trainer, data = scenarios.resumable(kind, None)
    history = trainer.fit(data, epochs=5)
    return scenarios.final_state(model, trainer), history


@pytest.mark.parametrize("kind", ["tensors", "loader", "workers", "weighted", "learned", "shuffled", "iterable"])
def test_restarted_three_times_in_later_epochs(kind, scenarios, tmp_path):
    """Fails if order, random state or position of a later epoch is lost at a restart (accelerate#4071): steps 6, 11 and
    14 of 4 an epoch are in the middle of epochs 1, 2 and 3."""
    expected, history = _whole(scenarios, kind)
    for stop in (6, 11, 14):
        torch.manual_seed(stop)  # whatever the process drew before must not matter
        _, trainer, data = scenarios.resumable(kind, tmp_path)
        trainer.fit(data, epochs=5, resume=True, max_steps=stop)
    model, trainer, data = scenarios.resumable(kind, tmp_path)
    resumed = trainer.fit(data, epochs=5, resume=True)
    _equal(expected, scenarios.final_state(model, trainer))
    assert resumed == history


@pytest.mark.parametrize("stop", range(1, STEPS + 1))
def test_stopped_at_every_step(stop, scenarios, tmp_path):
    """Fails if some position (first step, end of an epoch, last step) is written down wrongly."""
    expected, history = _whole(scenarios, "tensors")
    _, trainer, data = scenarios.resumable("tensors", tmp_path)
    trainer.fit(data, epochs=5, max_steps=stop)
    model, trainer, data = scenarios.resumable("tensors", tmp_path)
    assert trainer.fit(data, epochs=5, resume=True) == history
    _equal(expected, scenarios.final_state(model, trainer))


def _alone(rank, main, arguments):
    torch.set_num_threads(1)
    main(*arguments)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "seed"), [("tensors", 11), ("loader", 12)])
def test_killed_and_resumed(kind, seed, scenarios, tmp_path):
    """Fails if a process that is killed with SIGKILL, three times at random steps and once while it writes a
    checkpoint, leaves something behind that changes the result."""
    expected, _ = _whole(scenarios, kind)
    folder, out = tmp_path / "checkpoints", tmp_path / "weights.safetensors"
    steps = sorted(random.Random(seed).sample(range(2, STEPS), 4))
    arguments = (kind, out, "--folder", folder)
    for number, step in enumerate(steps):
        how = "--kill-in-save" if number == 1 else "--kill-at"
        with pytest.raises(ProcessExitedException) as died:
            run_in_processes(_alone, scenarios.main, (*arguments, how, step), count=1)
        assert died.value.exit_code == -signal.SIGKILL
        assert not out.exists()
    run_in_processes(_alone, scenarios.main, arguments, count=1)
    _equal(expected, load_file(out))
    assert not list(folder.glob(".partial*"))
    # The log has each record once, in order, although the killed processes had written beyond their checkpoints.
    lines = [json.loads(line) for line in (folder / "log" / "log.jsonl").read_text().splitlines()]
    records = [line["step"] for line in lines if "task" in line]
    assert records == sorted(set(records))
    assert records[-1] == STEPS


def test_finished_run_is_loaded_and_not_trained_again(scenarios, tmp_path):
    """Fails if resuming a complete run trains on, or loses the best weights."""
    expected, history = _whole(scenarios, "tensors")
    _, trainer, data = scenarios.resumable("tensors", tmp_path)
    trainer.fit(data, epochs=5)
    model, trainer, data = scenarios.resumable("tensors", tmp_path)
    assert trainer.fit(data, epochs=5, resume=True) == history
    _equal(expected, scenarios.final_state(model, trainer))
