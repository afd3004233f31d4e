import json
import logging
import math
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from regularized.training import CheckpointError
from regularized.training.checkpoint import (
    checkpoints,
    flatten,
    latest,
    load,
    load_optimizer,
    publish,
    unflatten,
    write_part,
)

leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
trees = st.recursive(
    leaves,
    lambda below: (
        st.lists(below, max_size=3)
        | st.tuples(below, below)
        | st.dictionaries(st.integers() | st.text(max_size=5), below, max_size=3)
    ),
    max_leaves=12,
)


@given(trees)
def test_structure_goes_round_through_json(tree):
    """Fails if tuples become lists, keys strings, or infinities something that JSON cannot hold."""
    spec, tensors = flatten(tree)
    back = unflatten(json.loads(json.dumps(spec, allow_nan=False)), tensors)
    assert back == tree
    assert repr(back) == repr(tree)  # == takes 1 for 1.0 and for True


def test_tensors_go_round(tmp_path):
    """Fails for a type, a view, an empty or a complex tensor that the file format does not take as it is."""
    base = torch.arange(12.0).view(3, 4)
    tree = {
        "types": [torch.tensor([1, 2], dtype=d) for d in (torch.uint8, torch.int64, torch.bool, torch.bfloat16)],
        "views": (base, base[1], base.t(), base[:, ::2], base[2]),
        "empty": [torch.zeros(0), torch.zeros(0, 3), torch.zeros(())],
        "complex": torch.tensor([1 + 2j], dtype=torch.complex128),
        1: torch.ones(1),
        "1": torch.zeros(1),
        "nan": math.nan,
    }
    write_part(tmp_path, "part", tree)
    back = load(tmp_path, "part")
    flat, expected = (flatten(t)[1] for t in (back, tree))
    assert flat.keys() == expected.keys()
    for name, tensor in expected.items():
        assert flat[name].dtype == tensor.dtype
        assert flat[name].shape == tensor.shape
        assert torch.equal(flat[name], tensor)
    assert math.isnan(back["nan"])
    assert back["complex"] == 1 + 2j


def test_tied_tensors_are_stored_once(tmp_path):
    """Fails if tied weights are written twice, or refused."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model[1].weight = model[0].weight
    write_part(tmp_path, "model", model.state_dict())
    assert (tmp_path / "model.safetensors").stat().st_size < 1.2 * 64 * 64 * 4
    assert torch.equal(load(tmp_path, "model")["1.weight"], model[0].weight)


def test_what_cannot_be_stored_is_named():
    """Fails if an object is dropped, or pickled."""
    with pytest.raises(TypeError, match=r"optimizer.0 is a set"):
        flatten({"optimizer": [{1}]})


def _write(folder, step, keep=3):
    partial = folder / ".partial"
    partial.mkdir(parents=True)
    write_part(partial, "model", {"w": torch.full((100,), float(step))})
    publish(partial, folder / f"step-{step:08d}", keep=keep)


def test_the_last_ones_are_kept(tmp_path):
    """Fails if the oldest stay, or too many go."""
    for step in (1, 2, 10, 20):
        _write(tmp_path, step, keep=2)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-00000010", "step-00000020"]


def _flip(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "truncated": lambda p: (p / "model.safetensors").write_bytes((p / "model.safetensors").read_bytes()[:-9]),
    "one bit": lambda p: _flip(p / "model.safetensors"),
    "missing file": lambda p: (p / "model.json").unlink(),
    "missing manifest": lambda p: (p / "manifest.json").unlink(),
    "half a manifest": lambda p: (p / "manifest.json").write_text('{"format": 1, "fi'),
    "other format": lambda p: (p / "manifest.json").write_text('{"format": 99, "files": {}}'),
    "no dictionary": lambda p: (p / "manifest.json").write_text("[]"),
    "empty folder": lambda p: (shutil.rmtree(p), p.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_newest_is_passed_over_with_a_warning(damage, tmp_path, caplog):
    """Fails if damage is not seen, stops the run although an intact checkpoint is there, or anything is deleted."""
    for step in (1, 2, 3):
        _write(tmp_path, step)
    DAMAGE[damage](tmp_path / "step-00000003")
    with caplog.at_level(logging.WARNING):
        assert latest(tmp_path).name == "step-00000002"
    assert "step-00000003" in caplog.text
    assert len(checkpoints(tmp_path)) == 3


def test_all_damaged_is_an_error_and_none_is_none(tmp_path):
    """Fails if a run silently starts anew over damaged checkpoints."""
    assert latest(tmp_path / "nowhere") is None
    _write(tmp_path, 1)
    DAMAGE["one bit"](tmp_path / "step-00000001")
    with pytest.raises(CheckpointError, match=r"all 1 .*damaged"):
        latest(tmp_path)


def test_damaged_later_one_does_not_push_out_intact_ones(tmp_path):
    """Fails if cleaning up counts a damaged checkpoint that a resumed run has not reached again."""
    _write(tmp_path, 5)
    _write(tmp_path, 9)
    DAMAGE["truncated"](tmp_path / "step-00000009")
    _write(tmp_path, 6, keep=1)
    assert latest(tmp_path).name == "step-00000006"
    _write(tmp_path, 9, keep=1)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-00000009"]
    assert load(latest(tmp_path), "model")["w"][0] == 9


def test_unreadable_part(tmp_path):
    """Fails if a missing part or tensor gives an error of the file format instead of ours."""
    _write(tmp_path, 1)
    path = tmp_path / "step-00000001"
    with pytest.raises(CheckpointError, match="'terms'"):
        load(path, "terms")
    with pytest.raises(CheckpointError, match="lacks the tensor"):
        unflatten({"tensor": "w"}, {})
    with pytest.raises(CheckpointError, match="unknown kind"):
        unflatten({"set": []}, {})


def test_optimizer_state_keeps_its_type():
    """Fails if float32 moments of a bfloat16 parameter are rounded on loading, as torch does."""

    class Precise(torch.optim.SGD):
        def step(self, closure=None):
            for p in self.param_groups[0]["params"]:
                self.state[p].setdefault("sum", torch.zeros_like(p, dtype=torch.float32)).add_(1 / 3)

    p = nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    one, two = Precise([p], lr=1.0), Precise([p], lr=1.0)
    one.step()
    load_optimizer(two, one.state_dict())
    assert two.state[p]["sum"].dtype == torch.float32
    assert torch.equal(one.state[p]["sum"], two.state[p]["sum"])


# -- through the Trainer -------------------------------------------------------------------------


def test_resume_falls_back_to_an_intact_checkpoint(scenarios, tmp_path):
    """Fails if a run whose newest checkpoint is damaged ends elsewhere than the uninterrupted one."""
    model, trainer, data = scenarios.resumable("tensors", None)
    trainer.fit(data, epochs=5)
    expected = scenarios.final_state(model, trainer)
    _, trainer, data = scenarios.resumable("tensors", tmp_path)
    trainer.fit(data, epochs=5, max_steps=7)
    _flip(tmp_path / "step-00000007" / "training.safetensors")
    model, trainer, data = scenarios.resumable("tensors", tmp_path, keep=1)
    trainer.fit(data, epochs=5, resume=True)
    for name, tensor in scenarios.final_state(model, trainer).items():
        assert torch.equal(tensor, expected[name])


def test_checkpoints_of_another_run_are_not_mixed_in(scenarios, tmp_path):
    """Fails if a new run starts in a folder with checkpoints, whose later steps would then be taken for its own."""
    _, trainer, data = scenarios.resumable("tensors", tmp_path)
    trainer.fit(data, epochs=1)
    _, trainer, data = scenarios.resumable("tensors", tmp_path)
    with pytest.raises(CheckpointError, match="resume=True"):
        trainer.fit(data, epochs=1)


def test_another_model_or_data_is_refused_and_nothing_is_changed(scenarios, tmp_path):
    """Fails if a checkpoint that does not fit is loaded in part."""
    _, trainer, data = scenarios.resumable("tensors", tmp_path)
    trainer.fit(data, epochs=2, max_steps=3)
    model, trainer, data = scenarios.resumable("tensors", tmp_path)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    data.batch_size = 6
    with pytest.raises(CheckpointError, match="batches=8, this run has 5"):
        trainer.fit(data, epochs=2, resume=True)
    data.batch_size = 4
    trainer.objective.terms["memory"].register_buffer("more", torch.zeros(1))
    with pytest.raises(CheckpointError, match=r"another terms: it lacks \['memory.more'\]"):
        trainer.fit(data, epochs=2, resume=True)
    del trainer.objective.terms["memory"].more
    model.add_module("head", nn.Linear(2, 2))
    with pytest.raises(CheckpointError, match=r"another model: it lacks \['head"):
        trainer.fit(data, epochs=2, resume=True)
    del model.head
    model[0].bias = None
    with pytest.raises(CheckpointError, match=r"\['0.bias'\] \(1 in all\) are not in this one"):
        trainer.fit(data, epochs=2, resume=True)
    _, other, data = scenarios.resumable("tensors", tmp_path)
    other.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    with pytest.raises(CheckpointError, match="parameter groups"):
        other.fit(data, epochs=2, resume=True)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_other_number_of_epochs_is_allowed_with_a_warning(scenarios, tmp_path, caplog):
    """Fails if a run cannot be made longer."""
    _, trainer, data = scenarios.resumable("tensors", tmp_path)
    trainer.fit(data, epochs=1)
    _, trainer, data = scenarios.resumable("tensors", tmp_path)
    with caplog.at_level(logging.WARNING):
        history = trainer.fit(data, epochs=2, resume=True)
    assert "schedules change" in caplog.text
    assert [row["epoch"] for row in history] == [1, 2]


def test_checkpoints_hold_nothing_pickled(scenarios, tmp_path):
    """Fails if a file of another kind than safetensors and JSON is written, or the model's cannot be used by itself."""
    from safetensors.torch import load_model

    model, trainer, data = scenarios.resumable("tensors", tmp_path)
    trainer.fit(data, epochs=1)
    newest = latest(tmp_path)
    assert {p.suffix for p in newest.iterdir()} == {".safetensors", ".json"}
    fresh, _, _ = scenarios.resumable("tensors", None)
    load_model(fresh, newest / "model.safetensors")
    assert torch.equal(fresh[1].running_mean, model[1].running_mean)


@pytest.mark.parametrize("keep", [1, 2])
def test_trainer_keeps_the_last_ones(keep, scenarios, tmp_path):
    """Fails if old checkpoints pile up."""
    _, trainer, data = scenarios.resumable("tensors", tmp_path, keep=keep)
    trainer.fit(data, epochs=2, max_steps=6)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-00000005", "step-00000006"][-keep:]


def test_no_steps_between_means_ends_of_epochs(scenarios, tmp_path):
    """Fails if without checkpoint_every nothing, or every step, is written."""
    _, trainer, data = scenarios.resumable("tensors", tmp_path, every=None, keep=9)
    trainer.fit(data, epochs=2)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-00000004", "step-00000008"]
