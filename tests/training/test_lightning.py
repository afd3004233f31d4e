"""The terms in Lightning do what they do in our loop: loss curve, weights, state, resume, two processes."""

import builtins
import csv
import importlib
import math
import sys
from functools import partial
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from tests.training import adapter_cases as cases
from torch import nn

from regularized.training import CrossEntropy, NonFiniteLoss, Term, cosine
from regularized.training.lightning import TermsModule

SAMPLES = 22  # batches of 8: the last step of an epoch has 6, which are 2 or 3 micro-batches instead of 2 or 4
SPLITS = [(8, 1), (4, 2), (2, 4)]

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


class Recorder(pl.Callback):
    """What is logged, and what the training step returns, once an optimizer step."""

    def __init__(self):
        self.records = []
        self.losses = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step > len(self.records):
            self.records.append({name: value.item() for name, value in trainer.callback_metrics.items()})
            self.losses += [value.item() for value in outputs.values() if isinstance(value, torch.Tensor)]


def _same(a, b, *, tolerance=0.0):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.allclose(a[name], b[name], rtol=tolerance, atol=tolerance), (
            f"{name} differs by {(a[name] - b[name]).abs().max()}"
        )


def _state(module):
    return cases.state(module.model, module.objective)


def _train(folder, batch, accumulate, *, resume=None, data=None, **settings):
    module, trainer = cases.lightning(folder, accumulate, **settings)
    trainer.fit(module, data or cases.loader(*cases.vectors(SAMPLES), batch), ckpt_path=resume)
    return module, trainer


@pytest.mark.parametrize(("batch", "accumulate"), SPLITS)
def test_equals_our_loop_bit_for_bit(batch, accumulate, tmp_path):
    """Fails if a moment comes too early, late or twice, Lightning divides a share, or the schedule is off by a step."""
    x, y = cases.vectors(SAMPLES)
    model, named = cases.mlp(), cases.terms(SAMPLES, "0")
    batches = [(x[index], y[index], index) for index in torch.arange(SAMPLES).split(batch)]
    records, trainer = cases.ours(model, named, batches, accumulate, tmp_path, schedule=cosine())
    recorder = Recorder()
    module, _ = _train(tmp_path, batch, accumulate, schedule=cosine(), callbacks=[recorder])
    _same(_state(module), cases.state(model, trainer.objective))
    assert len(records) == 6
    assert [{name: record[f"terms/{name}"] for name in records[0]} for record in recorder.records] == records


@pytest.mark.parametrize(("batch", "accumulate"), SPLITS)
def test_equals_the_whole_batch_by_hand(batch, accumulate, tmp_path):
    """Fails if a penalty counts once a micro-batch, labels are counted before the transform or for each micro-batch by
    itself, an incomplete last step is scaled as a full one, or the terms' own parameters are not trained."""
    half = lambda share: (1 + math.cos(math.pi * share)) / 2  # noqa: E731
    losses, expected = cases.by_hand(cases.mlp(), "0", *cases.vectors(SAMPLES), 8, schedule=half)
    recorder = Recorder()
    module, trainer = _train(tmp_path, batch, accumulate, schedule=cosine(), callbacks=[recorder])
    assert trainer.global_step == 6
    assert recorder.losses == pytest.approx(losses, rel=2e-5)
    assert [record["loss"] for record in recorder.records] == recorder.losses
    found = _state(module)
    for name, value in expected.items():
        key = f"terms.remember.{name}" if name in ("scale", "history") else f"model.{name}"
        assert torch.allclose(found[key], value, rtol=1e-4, atol=2e-6), name
    epochs, steps, norm = found["terms.remember.moments"].tolist()
    assert (epochs, steps) == (2, 6)
    assert norm == pytest.approx(cases.CLIP, rel=1e-4)  # seen after clipping, over model and terms together


class Positioned:
    """Batches in a fixed order, with a position that Lightning saves: what it takes to resume inside an epoch."""

    def __init__(self, batch):
        x, y = cases.vectors(SAMPLES)
        self.batches = [(x[i], y[i], i) for i in torch.arange(SAMPLES).split(batch)]
        self.position = 0

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        if self.position == len(self.batches):
            self.position = 0
        while self.position < len(self.batches):
            self.position += 1
            yield self.batches[self.position - 1]

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


@pytest.mark.parametrize("stop", [2, 3, 4])
def test_resumed_equals_uninterrupted(stop, tmp_path):
    """Fails if state, generator or parameters of terms, or their optimizer state, are not in the checkpoint, or if an
    epoch starts twice. 3 steps an epoch: inside an epoch and at its end."""

    def run(folder, resume=None, **settings):
        keep = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        module, _ = _train(
            folder, 4, 2, named=cases.terms(SAMPLES, "0", noise=0.1), schedule=cosine(), data=Positioned(4),
            enable_checkpointing=True, callbacks=[keep], resume=resume, **settings,
        )  # fmt: skip
        return _state(module)

    expected = run(tmp_path / "whole")
    assert expected["terms.remember.moments"][1] == 6
    _same(run(tmp_path / "parts", resume=tmp_path / "whole" / f"step={stop}.ckpt"), expected)


def test_checkpoint_inside_an_optimizer_step(tmp_path, caplog):
    """Fails if batches that were collected but not trained on are lost without a word."""

    class SaveAfterOneBatch(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 0:
                trainer.save_checkpoint(tmp_path / "inside.ckpt")

    _train(tmp_path, 4, 2, callbacks=[SaveAfterOneBatch()], max_epochs=1)
    assert "1 batch(es) are collected" in caplog.text


def test_loaded_without_trainer(tmp_path):
    """Fails if the terms' buffers are no part of the module's state_dict."""
    module, trainer = _train(tmp_path, 8, 1)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = TermsModule.load_from_checkpoint(
        tmp_path / "last.ckpt",
        model=cases.mlp(),
        terms=cases.terms(SAMPLES, "0"),
        optimizer=partial(torch.optim.SGD, lr=0.1),
    )
    _same(_state(loaded), _state(module))


def test_evaluation(tmp_path):
    """Fails if evaluation changes or needs per-sample state, disturbs the training, or drops an incomplete batch."""
    from torch.utils.data import DataLoader, TensorDataset

    def named():
        return {name: term for name, term in cases.terms(SAMPLES, "0").items() if name != "mask"}

    x, y = cases.vectors(10)
    y = y.clamp(min=0)  # no ignored labels: the mean over batches is the mean over samples
    held_out = DataLoader(TensorDataset(x, y), batch_size=4)
    module, trainer = cases.lightning(tmp_path, 2, named=named(), num_sanity_val_steps=1, val_check_interval=2)
    trainer.fit(module, cases.loader(*cases.vectors(SAMPLES), 4), held_out)
    reference, _ = _train(tmp_path, 4, 2, named=named())
    _same(_state(module), _state(reference))
    for run, name in ((trainer.validate, "val_loss"), (trainer.test, "test_loss")):
        [metrics] = run(module, held_out, verbose=False)
        with torch.no_grad():
            loss = nn.functional.cross_entropy(module.model(x), y) + cases.penalty(module.model)
            loss += 0.5 * module.model[0](x).square().mean()
        assert metrics[name] == pytest.approx(loss.item(), rel=1e-5)
    _same(_state(module), _state(reference))
    predictions = trainer.predict(module, cases.loader(x, y, 5))
    assert torch.allclose(torch.cat(predictions), module(x))


def test_evaluation_refuses_to_change_state(tmp_path):
    """Fails if a term that forgets `self.training` writes validation data into its history unnoticed."""

    class Careless(Term):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, step):
            self.seen += 1
            return step.logits.sum() * 0.0

    module, trainer = cases.lightning(tmp_path, 1, named={"careless": Careless()})
    with pytest.raises(RuntimeError, match=r"careless\.seen"):
        trainer.validate(module, cases.loader(*cases.vectors(8), 4), verbose=False)


class _Surgery(Term):
    contributes = False

    def attach(self, model):
        nn.utils.parametrizations.weight_norm(model[2])


def test_surgery_comes_before_optimizer_and_checkpoint(tmp_path):
    """Fails if attach runs after the optimizer was built, or after a checkpoint was loaded into the bare model."""
    named = {"task": CrossEntropy(), "surgery": _Surgery()}
    module, trainer = cases.lightning(tmp_path, 1, named=named)
    before = [p.detach().clone() for p in module.model[2].parametrizations.parameters()]
    trainer.fit(module, cases.loader(*cases.vectors(8), 4))
    after = list(module.model[2].parametrizations.parameters())
    assert len(before) == 2
    assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    resumed, trainer = _train(
        tmp_path, 4, 1, named={"task": CrossEntropy(), "surgery": _Surgery()}, resume=tmp_path / "last.ckpt"
    )
    _same(_state(resumed), _state(module))


def test_terms_are_logged_although_no_step_ends_there(tmp_path):
    """Fails if values are logged with the last batch of a step only: Lightning looks every third batch here."""
    log = CSVLogger(tmp_path)
    _train(tmp_path, 4, 2, logger=log, log_every_n_steps=3)
    with (Path(log.log_dir) / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["terms/remember"]]
    assert [int(row["step"]) for row in rows] == [2, 5, 8, 11]


class _Where(Term):
    contributes = False

    def __init__(self):
        super().__init__()
        self.seen = []

    def after_step(self, step):
        self.seen.append(step.progress)


@pytest.mark.parametrize(
    ("settings", "sized", "total", "epochs"),
    [
        ({"max_epochs": 2}, True, 6, 2),
        ({"max_epochs": 2, "limit_train_batches": 3}, True, 4, 2),
        ({"max_epochs": 9, "max_steps": 4}, True, 4, 2),
        ({"max_epochs": -1, "max_steps": 4}, True, 4, 2),
        ({"max_epochs": -1, "max_steps": 2}, False, 2, 1),
    ],
)
def test_progress(settings, sized, total, epochs, tmp_path):
    """Fails if schedules see another length of the run than it has, or count batches for optimizer steps."""
    where = _Where()
    data = cases.loader(*cases.vectors(SAMPLES), 4)
    named = {"task": CrossEntropy(), "where": where}
    _train(tmp_path, 4, 2, named=named, data=data if sized else _Endless(data), **settings)
    assert [p.step for p in where.seen] == list(range(total))
    assert {(p.total_steps, p.total_epochs) for p in where.seen} == {(total, epochs)}
    assert where.seen[-1].epoch == epochs - 1


class _Endless:
    def __init__(self, data):
        self.data = data

    def __iter__(self):
        while True:
            yield from self.data


def test_run_without_an_end(tmp_path):
    """Fails if schedules silently stand still where the length of the run is unknown."""
    with pytest.raises(ValueError, match="length of the run"):
        _train(tmp_path, 4, 2, data=_Endless(cases.loader(*cases.vectors(8), 4)))


def test_not_finite(tmp_path):
    """Fails if a NaN reaches the weights, or nobody says whose it was."""

    class Bad(Term):
        def forward(self, step):
            return step.logits.sum() * float("nan")

    module, trainer = cases.lightning(tmp_path, 2, named={"task": CrossEntropy(), "bad": Bad()})
    with pytest.raises(NonFiniteLoss, match="term 'bad'"):
        trainer.fit(module, cases.loader(*cases.vectors(8), 4))
    assert all(torch.isfinite(p).all() for p in module.parameters())


def test_bad_arguments():
    """Fails if a mistake shows itself later, as something else."""
    make = partial(TermsModule, nn.Linear(2, 2), terms={"task": CrossEntropy()})
    factory = partial(torch.optim.SGD, lr=0.1)
    with pytest.raises(TypeError, match=r"partial\(torch\.optim\.SGD"):
        make(optimizer=torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1))
    with pytest.raises(ValueError, match="accumulate must be at least 1, got 0"):
        make(optimizer=factory, accumulate=0)
    with pytest.raises(ValueError, match="clip_norm must be positive"):
        make(optimizer=factory, clip_norm=0.0)


def test_refused(tmp_path, monkeypatch):
    """Fails if something that would not be exact is trained all the same."""
    data = cases.loader(*cases.vectors(8), 4)
    for option in ("accumulate_grad_batches", "gradient_clip_val"):
        with pytest.raises(Exception, match="not supported for manual optimization"):
            _train(tmp_path, 4, 1, data=data, **{option: 2})
    module, trainer = cases.lightning(tmp_path, 1, samples=8)
    monkeypatch.setattr(trainer.precision_plugin, "scaler", object(), raising=False)
    with pytest.raises(ValueError, match="bf16-mixed"):
        trainer.fit(module, data)
    module, trainer = cases.lightning(tmp_path, 1, samples=8)
    monkeypatch.setattr("regularized.training.lightning.SingleDeviceStrategy", pl.strategies.DDPStrategy)
    with pytest.raises(ValueError, match="on one device or with DDP, got SingleDeviceStrategy"):
        trainer.fit(module, data)


def test_bf16(tmp_path):
    """Fails if a term computes in half precision: the counts and the history would be visibly rounded."""
    module, _ = _train(tmp_path, 4, 2, precision="bf16-mixed")
    reference, _ = _train(tmp_path, 4, 2)
    history = module.objective.terms["remember"].history
    assert history.dtype == torch.float32
    assert torch.allclose(history, reference.objective.terms["remember"].history, atol=0.02)
    assert (history != history.bfloat16()).any()


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    """Fails if counts are not summed over processes, shares are averaged, or gradients are exchanged twice."""
    recorder = Recorder()
    module, _ = _train(tmp_path, 4, 2, samples=24, data=cases.loader(*cases.vectors(24), 4), callbacks=[recorder])
    first, second = cases.in_processes("lightning", tmp_path, batch=2, accumulate=2)
    _same(first, second)
    _same(first, {**_state(module), "losses": torch.tensor(recorder.losses[-1])}, tolerance=2e-5)


def test_missing_extra(monkeypatch):
    """Fails if a person without Lightning is not told what to install."""
    real = builtins.__import__

    def without(name, *rest):
        if name.split(".")[0] == "pytorch_lightning":
            raise ModuleNotFoundError("No module named 'pytorch_lightning'", name="pytorch_lightning")
        return real(name, *rest)

    module = sys.modules.pop("regularized.training.lightning", None)
    monkeypatch.setattr(builtins, "__import__", without)
    try:
        with pytest.raises(ImportError, match=r'pip install "regularized\[lightning\]"'):
            importlib.import_module("regularized.training.lightning")
    finally:
        if module is not None:
            sys.modules["regularized.training.lightning"] = module
