import errno
import json
import logging
import math
import os
import shutil
import subprocess
import sys
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from regularized.training import CheckpointError, Checkpoints, CrossEntropy, TensorData, Trainer, checkpoint, cosine
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


def _in_manifest(path, old, new):
    manifest = path / "manifest.json"
    assert old in manifest.read_text()
    manifest.write_text(manifest.read_text().replace(old, new, 1))


DAMAGE = {
    "truncated": lambda p: (p / "model.safetensors").write_bytes((p / "model.safetensors").read_bytes()[:-9]),
    "one bit": lambda p: _flip(p / "model.safetensors"),
    "missing file": lambda p: (p / "model.json").unlink(),
    "missing manifest": lambda p: (p / "manifest.json").unlink(),
    "half a manifest": lambda p: (p / "manifest.json").write_text('{"format": 1, "fi'),
    "other format": lambda p: (p / "manifest.json").write_text('{"format": 99, "files": {}}'),
    "no dictionary": lambda p: (p / "manifest.json").write_text("[]"),
    "no text": lambda p: (p / "manifest.json").write_bytes(b"\xff\xfe"),
    "sha256 misspelt": lambda p: _in_manifest(p, '"sha256"', '"shb256"'),
    "bytes misspelt": lambda p: _in_manifest(p, '"bytes"', '"bites"'),
    "files misspelt": lambda p: _in_manifest(p, '"files"', '"filez"'),
    "format misspelt": lambda p: _in_manifest(p, '"format"', '"farmat"'),
    "size no number": lambda p: _in_manifest(p, '"bytes": ', '"bytes": "x", "was": '),
    "format no number": lambda p: _in_manifest(p, '"format": 2', '"format": "two"'),
    "files no mapping": lambda p: (p / "manifest.json").write_text('{"format": 2, "files": [1]}'),
    "entry no mapping": lambda p: (p / "manifest.json").write_text('{"format": 2, "files": {"model.json": 1}}'),
    "a file not listed": lambda p: (p / "terms.json").write_text("{}"),
    "nothing listed": lambda p: (p / "manifest.json").write_text('{"format": 2, "files": {}}'),
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


def test_another_version_is_not_called_damage(tmp_path):
    """Fails if a checkpoint of a newer version is said to be damaged, which would send its owner to a backup."""
    _write(tmp_path, 1)
    for version, says in ((3, "newer one. To go on from it update"), (1, "an older one")):
        (tmp_path / "step-00000001" / "manifest.json").write_text(json.dumps({"format": version, "parts": {}}))
        with pytest.raises(CheckpointError, match=says) as caught:
            latest(tmp_path)
        assert "damaged" not in str(caught.value)


def test_order_is_that_of_the_steps(tmp_path):
    """Fails if names are compared as texts: "step-100000000" comes before "step-99999999"."""
    for step in (99_999_998, 99_999_999, 100_000_000):
        _write(tmp_path, step, keep=2)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-99999999", "step-100000000"]
    assert latest(tmp_path).name == "step-100000000"
    (tmp_path / "step-notes").mkdir()  # somebody's own
    assert len(checkpoints(tmp_path)) == 2


def test_linked_checkpoints_are_pruned_and_what_they_point_to_is_not(tmp_path):
    """Fails if a symbolic link among the checkpoints stops the run, or its target is deleted."""
    elsewhere = tmp_path / "elsewhere"
    _write(elsewhere, 1)
    folder = tmp_path / "run"
    folder.mkdir()
    for step in (1, 3):
        (folder / f"step-{step:08d}").symlink_to(elsewhere / "step-00000001")
    assert load(latest(folder), "model")["w"][0] == 1
    _write(folder, 2, keep=1)
    _write(folder, 3, keep=1)  # takes the place of a link
    assert [p.name for p in checkpoints(folder)] == ["step-00000003"]
    assert load(latest(folder), "model")["w"][0] == 3
    assert latest(elsewhere).name == "step-00000001"


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


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "[1]",
        '{"list": 3}',
        '{"list": [], "tuple": []}',
        '{"dict": {"a": 1}}',
        '{"dict": [[1]]}',
        '{"dict": [[{"list": []}, 1]]}',
        '{"float": "much"}',
        '{"float": []}',
        '{"tensor": ["w"]}',
        '{"complex": "w"}',
        '{"tuple": ' * 20_000 + "[]" + "}" * 20_000,
    ],
)
def test_a_structure_that_nobody_wrote_is_one_kind_of_error(text, tmp_path):
    """Fails when hostile or damaged JSON leaks an error of dictionaries, numbers, tensors or the stack."""
    write_part(tmp_path, "part", {"w": torch.ones(3)})
    (tmp_path / "part.json").write_text(text)
    with pytest.raises(CheckpointError):
        load(tmp_path, "part")
    if len(text) < 100:
        with pytest.raises(CheckpointError):
            unflatten(json.loads(text), {"w": torch.ones(3)})


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


def _build(folder, *, every=None, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    settings = {"optimizer": partial(torch.optim.SGD, lr=0.1, momentum=0.9), **options}
    checkpoints = folder and Checkpoints(folder, every=every)
    return model, Trainer(model, terms={"task": CrossEntropy()}, checkpoints=checkpoints, **settings)


def _data(samples=24, *, batch_size=4, more=0.0, **options):
    x = torch.randn(samples, 3, generator=torch.Generator().manual_seed(1)) + more
    return TensorData(x, (x[:, 0] > 0).long(), batch_size=batch_size, **options)


def _loader(**options):
    data = _data(**options)
    return DataLoader(Subset(TensorDataset(data.inputs, data.targets), range(20)), batch_size=4, shuffle=True)


@pytest.mark.parametrize(
    ("before", "after", "options", "says"),
    [
        (_data, _data, {"optimizer": partial(torch.optim.Adam, lr=0.1)}, "class is SGD there and Adam here"),
        (_data, partial(_data, seed=1), {}, "seed is 0 there and 1 here"),
        (_data, partial(_data, shuffle=False), {}, "shuffle is True there and False here"),
        (_data, partial(_data, 23), {}, "samples is 24 there and 23 here"),
        (_data, partial(_data, more=1.0), {}, "the content differs"),
        (_data, _loader, {}, "batches=6, this run has 5"),
        (_loader, partial(_loader, more=1.0), {}, "the content differs"),
        (_loader, partial(_data, 20), {}, "kind is DataLoader of Subset there and TensorData here"),
        (lambda: [(torch.ones(2, 3), torch.ones(2).long())], lambda: [(torch.zeros(2, 3), torch.ones(2).long())], {},
         "the content differs"),
    ],
)  # fmt: skip
def test_another_run_is_refused_before_anything_changes(before, after, options, says, tmp_path):
    """Fails if a checkpoint of another optimizer or other data is taken, or refused when the model is changed already
    (another class of optimizer used to raise KeyError then)."""
    _, trainer = _build(tmp_path)
    trainer.fit(before(), epochs=2, max_steps=1)
    model, trainer = _build(tmp_path, **options)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=says):
        trainer.fit(after(), epochs=2, resume=True)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert not trainer.optimizer.state
    assert trainer.history == []


def test_a_model_of_another_type_is_refused(tmp_path):
    """Fails if float32 weights are loaded into a float64 model, or the other way round, as if it were the same run."""
    _, trainer = _build(tmp_path)
    trainer.fit(_data(), epochs=1)
    model, _ = _build(None)
    trainer = Trainer(
        model.double(),
        terms={"task": CrossEntropy()},
        optimizer=trainer.optimizer.__class__,
        checkpoints=Checkpoints(tmp_path),
    )
    with pytest.raises(CheckpointError, match=r"0\.weight is torch.float32 there and torch.float64 here"):
        trainer.fit(_data(), epochs=2, resume=True)


def test_settings_of_the_run_that_goes_on_count_and_are_told(tmp_path, caplog):
    """Fails if momentum comes from the checkpoint and the rate from the call, or either silently."""
    _, trainer = _build(tmp_path)
    trainer.fit(_data(), epochs=1)
    changed = {"optimizer": partial(torch.optim.SGD, lr=0.2, momentum=0.5), "schedule": cosine(), "clip_norm": 1.0}
    _, trainer = _build(tmp_path, **changed)
    with caplog.at_level(logging.WARNING):
        trainer.fit(_data(), epochs=1, resume=True)
    assert "those of this run count" in caplog.text
    for words in ("lr of parameter group 0 is 0.1 there and 0.2 here", "momentum of parameter group 0 is 0.9 there",
                  "schedule is _Constant(value=1.0) there", "clip_norm is None there and 1.0 here"):  # fmt: skip
        assert words in caplog.text
    assert trainer.optimizer.param_groups[0]["momentum"] == 0.5
    caplog.clear()
    _, trainer = _build(tmp_path)
    with caplog.at_level(logging.WARNING):
        trainer.fit(_data(), epochs=1, resume=True)
    assert caplog.text == ""  # the same again: nothing to tell


def test_what_an_optimizer_counts_in_its_groups_comes_from_the_checkpoint(tmp_path):
    """Fails if everything in the parameter groups is taken for a setting of the call."""

    class Counting(torch.optim.SGD):
        def __init__(self, params, lr):
            super().__init__(params, lr)
            for group in self.param_groups:
                group["made"] = 0

        def step(self, closure=None):
            super().step(closure)
            for group in self.param_groups:
                group["made"] += 1

    _, trainer = _build(tmp_path, optimizer=partial(Counting, lr=0.1))
    trainer.fit(_data(), epochs=2, max_steps=5)
    _, trainer = _build(tmp_path, optimizer=partial(Counting, lr=0.2))
    trainer.fit(_data(), epochs=2, resume=True)
    assert trainer.optimizer.param_groups[0]["made"] == 12


def test_a_start_without_a_step_does_not_stand_in_the_way(tmp_path):
    """Fails if a run that failed before its first step, of a mistake that was mended since, blocks the folder."""

    class Breaks(CrossEntropy):
        def forward(self, step):
            raise ZeroDivisionError

    for resume in (False, True):
        model, _ = _build(None)
        broken = Trainer(model, terms={"a": Breaks()}, optimizer=torch.optim.SGD, checkpoints=Checkpoints(tmp_path))
        with pytest.raises(ZeroDivisionError):
            broken.fit(_data(), epochs=1, resume=resume)
        assert [p.name for p in checkpoints(tmp_path)] == ["step-00000000"]
    _, trainer = _build(tmp_path)
    trainer.fit(_data(), epochs=1, resume=True)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-00000006"]


def test_a_disk_that_is_full_names_the_checkpoint_and_leaves_nothing(tmp_path, monkeypatch):
    """Fails if the error has no path, a part of a checkpoint stays behind, or the run cannot go on."""
    _, trainer = _build(tmp_path, every=1)
    write = checkpoint.write_part

    def full(folder, name, tree):
        write(folder, name, tree)
        if name == "training" and folder.name.endswith("3"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "write_part", full)
    with pytest.raises(CheckpointError, match=r"step-00000003 could not be written: .*No space left.*resume=True"):
        trainer.fit(_data(), epochs=2)
    assert not list(tmp_path.glob(".partial*"))
    monkeypatch.undo()
    assert trainer.fit(_data(), epochs=2, resume=True) == []
    assert latest(tmp_path).name == "step-00000012"


@pytest.mark.parametrize(
    "garbage", [b"\xff\xfe\x00\n", b"[1, 2]\n", b'{"step": "x"}\n', b"null\n", b'{"step": {}}\n{"a', b"\n\n"]
)
def test_garbage_in_the_log_does_not_block_a_checkpoint(garbage, scenarios, tmp_path):
    """Fails if a damaged line of a log, which nothing depends on, keeps a run from going on."""
    _, trainer, data = scenarios.resumable("tensors", tmp_path)
    trainer.fit(data, epochs=2, max_steps=6)
    log = tmp_path / "log" / "log.jsonl"
    log.write_bytes(garbage + log.read_bytes() + garbage)
    _, trainer, data = scenarios.resumable("tensors", tmp_path)
    trainer.fit(data, epochs=2, resume=True)
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["step"] for line in records if "task" in line] == [2, 4, 6, 8]


def test_two_processes_do_not_share_a_folder(tmp_path):
    """Fails if two runs write in one folder, where one used to delete the other's unfinished checkpoint."""
    code = (
        "import sys; from pathlib import Path; from regularized.training.folder_lock import locked\n"
        "with locked(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout.readline() == "held\n"
        model, trainer = _build(tmp_path)
        before = model[0].weight.clone()
        with pytest.raises(CheckpointError, match=rf"in use by another run \(process {other.pid} on .*another folder"):
            trainer.fit(_data(), epochs=1)
        assert torch.equal(model[0].weight, before)
    finally:
        other.kill()  # however it ends, the folder is free then
        other.communicate()
    trainer.fit(_data(), epochs=1)


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
    """Fails if without Checkpoints.every nothing, or every step, is written."""
    _, trainer, data = scenarios.resumable("tensors", tmp_path, every=None, keep=9)
    trainer.fit(data, epochs=2)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-00000004", "step-00000008"]
