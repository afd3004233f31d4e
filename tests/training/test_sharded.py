"""Weights in shards over two processes: what one process learns, checkpoints that either can read, and refusals."""

import os
import re
import shutil
from functools import partial

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn

from regularized.evidence.processes import run_launched
from regularized.fine_tuning.lfu import LfUTerm
from regularized.fine_tuning.sara import SaRA
from regularized.mechanisms.distributed import leave_process_group
from regularized.mechanisms.ema import EMA
from regularized.training import (
    Checkpoints,
    Compute,
    CrossEntropy,
    EarlyStopping,
    Evaluation,
    Ridge,
    TensorData,
    Term,
    Trainer,
)
from regularized.training.sharded import gathered, is_sharded

X = torch.randn(24, 6, generator=torch.Generator().manual_seed(0))
Y = X[:, :3].argmax(1)


class Net(nn.Module):
    """Blocks, a part beside them, and a parameter without dimensions."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 7)
        self.blocks = nn.ModuleList([nn.Linear(7, 7), nn.Linear(7, 3)])
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x):
        return self.blocks[1](torch.tanh(self.blocks[0](torch.tanh(self.first(x))))) * self.scale


class Follow(Term):
    """An averaged copy, made before the model is in shards; a parameter of its own; whole weights in a moment."""

    sharding = "gradients"

    def __init__(self, peak=0.0):
        super().__init__(weight=0.5)
        self.head = nn.Parameter(torch.ones(3))
        self.peak = peak
        self.seen = []

    def attach(self, model):
        self.average = EMA(model, decay=0.5)

    def forward(self, step):
        last = int(os.environ.get("RANK", 0)) == int(os.environ.get("WORLD_SIZE", 1)) - 1
        spoilt = self.peak if last and step.progress.step == 1 else 0.0
        return ((step.logits * self.head) ** 2).sum() + step.logits.sum() * spoilt

    def before_step(self, step):
        self.seen.append(step.progress.step)
        step.model.first.weight.grad.add_(0.01 * step.model.blocks[0].weight[:, :6])

    def after_step(self, step):
        self.average.update(step.model)
        with torch.no_grad():
            step.model.first.bias.mul_(0.9)


def build(sharding, folder=None, *, precision="no", compile="no", peak=0.0):
    torch.manual_seed(0)
    return Trainer(
        Net(),
        # The penalty stands before the task, and so asks for whole weights before there was a forward pass.
        terms={"ridge": Ridge(weight=0.05), "task": CrossEntropy(), "follow": Follow(peak)},
        optimizer=partial(torch.optim.AdamW, lr=0.05),
        accumulate=2,
        clip_norm=0.5,
        evaluate=Evaluation(
            lambda model: {"loss": float(nn.functional.cross_entropy(model(X), Y))},
            early_stopping=EarlyStopping("loss", "higher", patience=3),  # so that the first weights are restored
        ),
        checkpoints=Checkpoints(folder, every=1) if folder else None,
        compute=Compute(sharding=sharding, precision=precision, compile=compile),
    )


def fit(trainer, **how):
    trainer.fit(TensorData(X, Y, batch_size=4, seed=3), epochs=3, **how)
    state = {f"model.{k}": v for k, v in trainer.model.state_dict().items()}
    state |= {f"terms.{k}": v for k, v in trainer.objective.terms.state_dict().items()}
    return {k: v.clone() for k, v in gathered(state).items()}


def work(folder):
    """All that two processes do, so that they are started once."""
    rank = dist.get_rank() if dist.is_initialized() else int(os.environ["RANK"])
    trainer = build("fsdp2")
    shards = [name for name, p in trainer.model.named_parameters() if is_sharded(p)]
    found = {"whole": fit(trainer), "shards": shards}
    fit(build("fsdp2", f"{folder}/parts"), max_steps=4)
    if rank == 0:
        shutil.copytree(f"{folder}/parts", f"{folder}/for_one")
    found["resumed"] = fit(build("fsdp2", f"{folder}/parts"), resume=True)
    found["of_one"] = fit(build("fsdp2", f"{folder}/of_one"), resume=True)
    for sharding in ("no", "fsdp2"):
        low = build(sharding, precision="fp16", peak=1e6)
        state = fit(low)
        found[f"fp16 {sharding}"] = (state, low.objective.terms["follow"].seen, low.scaler.get_scale())
    found["compiled"] = fit(build("no", compile="aot_eager"))
    with pytest.raises(ValueError, match=r"the weights are in shards.*fit\(\.\.\., resume=True\)"):
        low.merge()
    with pytest.raises(ValueError, match="make the EMA before"):
        EMA(low.model, decay=0.5)
    torch.save(found, f"{folder}/{rank}.pt")
    del trainer, low
    leave_process_group()


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    fit(build("no", folder / "of_one"), max_steps=4)
    run_launched(work, str(folder))
    return folder, [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def assert_near(ours, theirs, atol=1e-5):
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(
            value, theirs[name], rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_two_processes_with_shards_learn_what_one_does(both):
    """Fails if a penalty, clipping, a moment, an averaged copy, early stopping or a scalar parameter sees a shard."""
    _, found = both
    expected = fit(build("no"))
    for rank in range(2):
        assert_near(found[rank]["whole"], expected)
        assert found[rank]["shards"] == [n for n, p in Net().named_parameters() if p.ndim]


def test_checkpoints_of_shards_and_of_one_process(both):
    """Fails if a resumed run differs by a bit, or a checkpoint in shards is not what one process reads and writes."""
    folder, found = both
    for rank in range(2):
        assert all(torch.equal(found[rank]["resumed"][k], v) for k, v in found[rank]["whole"].items())
        assert_near(found[rank]["of_one"], found[rank]["whole"])
    newest = max((folder / "for_one").glob("step-*"))
    shapes = {name: value.shape for name, value in load_file(newest / "model.safetensors").items()}
    assert shapes == {name: value.shape for name, value in Net().state_dict().items()}
    assert_near(fit(build("no", folder / "for_one"), resume=True), found[0]["whole"])


@pytest.mark.parametrize("sharding", ["no", "fsdp2"])
def test_fp16_leaves_out_the_same_steps_in_both(sharding, both):
    """Fails if one process makes a step whose gradients overflowed in the other one, by DDP or in shards."""
    _, found = both
    first = found[0][f"fp16 {sharding}"][0]
    for rank in range(2):
        state, seen, scale = found[rank][f"fp16 {sharding}"]
        assert seen == [0, 2, 3, 4, 5, 6, 7, 8]
        assert scale == 2.0**15
        assert all(torch.equal(first[k], v) for k, v in state.items())
        assert all(bool(v.isfinite().all()) for v in state.values())


def test_two_compiled_processes_learn_what_one_does(both):
    """Fails if a compiled step keeps the gradients of its own process, or exchanges those of a term twice."""
    _, found = both
    expected = fit(build("no"))
    for rank in range(2):
        assert_near(found[rank]["compiled"], expected)


@pytest.mark.parametrize(
    ("term", "says"),
    [
        (type("Silent", (Term,), {})(), 'does not say what it needs.*sharding = "forward" where'),
        (type("Wrong", (Term,), {"sharding": "some"})(), "must be one of .*got 'some'"),
        (SaRA(threshold=1e-3), "cannot train with sharding"),
        (object.__new__(LfUTerm), "cannot train with sharding"),
    ],
    ids=["silent", "wrong", "sara", "lfu"],
)
def test_terms_that_cannot_or_do_not_say_are_refused(term, says):
    """Fails if a term trains on shards that it takes for weights."""
    if isinstance(term, LfUTerm):
        nn.Module.__init__(term)
    term.forward = lambda step: step.logits.sum()
    with pytest.raises(ValueError, match=says):
        Trainer(
            nn.Linear(6, 3),
            terms={"task": CrossEntropy(), "other": term},
            optimizer=torch.optim.SGD,
            compute=Compute(sharding="fsdp2"),
        )


def test_an_optimizer_of_whole_weights_is_refused():
    """Fails if an optimizer goes on with parameters that are no longer the model's."""
    model = nn.Linear(6, 3)
    with pytest.raises(ValueError, match=re.escape("give a factory")):
        Trainer(
            model,
            terms={"task": CrossEntropy()},
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            compute=Compute(sharding="fsdp2"),
        )
