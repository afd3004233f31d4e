"""A compiled step: the weights and the memory of the plain one, and no graph made twice."""

import re
import shutil
from functools import partial

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from regularized.training import (
    Batch,
    Checkpoints,
    Compute,
    CrossEntropy,
    Progress,
    Ridge,
    Step,
    TensorData,
    Term,
    Trainer,
    cosine,
    linear,
)
from regularized.training.compiled import CompiledObjective

X = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
Y = X[:, :3].argmax(1)


class Memory(Term):
    """Averages outputs by sample, counts its calls, has a parameter, reads a tap and the epoch, and sees moments."""

    taps = ("1",)

    def __init__(self):
        super().__init__(weight=linear(0.0, 0.5, until=0.5))
        self.head = nn.Parameter(torch.ones(3))
        self.register_buffer("average", torch.zeros(20, 3))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("factor", torch.zeros(()))
        self.seen = []

    def epoch_start(self, progress):
        self.factor.fill_(0.5 ** (progress.epoch + 1))

    def forward(self, step):
        with torch.no_grad():
            self.calls += 1
            p = step.log_probabilities.exp()
            self.average[step.index] = 0.7 * self.average[step.index] + 0.3 * p
        near = (step.log_probabilities * self.average[step.index] * self.head).sum()
        return self.factor * step.hidden("1").square().sum() - near

    def after_step(self, step):
        self.seen.append((step.progress.step, step.logits.sum().item()))


class Reading(Term):
    """Reads a number from the device, at which a graph ends."""

    def forward(self, step):
        return step.logits.square().sum() * (2.0 if step.logits.detach().sum().item() > 0 else 1.0)


def build(compile="aot_eager", terms=None, folder=None, *, dropout=0.2, accumulate=2):
    torch.manual_seed(0)
    return Trainer(
        nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3)),
        terms=terms or {"task": CrossEntropy(), "ridge": Ridge(weight=0.01), "memory": Memory()},
        optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        schedule=cosine(),
        clip_norm=1.0,
        accumulate=accumulate,
        checkpoints=None if folder is None else Checkpoints(folder, every=1),
        compute=Compute(device="cpu", compile=compile),
    )


def fit(trainer, epochs=2, **how):
    trainer.fit(TensorData(X, Y, batch_size=5, seed=3), epochs=epochs, **how)
    return {
        name: value.clone() for name, value in {**trainer.model.state_dict(), **trainer.objective.state_dict()}.items()
    }


def assert_near(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(
            value, theirs[name], rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.fixture
def graphs():
    torch.compiler.reset()
    counters.clear()
    return lambda: (counters["stats"]["unique_graphs"], dict(counters["graph_break"]))


def test_compiled_training_is_the_plain_one_and_resumes(graphs, tmp_path):
    """Fails if weights, tables, counters or what moments see end elsewhere, or steps make graphs anew."""
    plain, compiled = build("no"), build()
    expected = fit(plain)
    assert_near(whole := fit(compiled), expected)
    for (step, seen), (also, ours) in zip(
        plain.objective.terms["memory"].seen, compiled.objective.terms["memory"].seen, strict=True
    ):
        assert step == also
        assert ours == pytest.approx(seen, abs=1e-4)
    assert graphs() == (2, {})  # with the penalty, for the first micro-batch of each step, and without it
    fit(compiled)
    assert graphs() == (2, {})
    fit(build(folder=tmp_path), max_steps=3)
    resumed = fit(build(folder=tmp_path), resume=True)
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler (apt-get install g++)")
def test_kernels_give_the_plain_training():
    """Fails if kernels draw other dropout, or compute another gradient, than the plain step."""
    terms = {"task": CrossEntropy(), "ridge": Ridge(weight=linear(0.01, 0.02))}
    expected = fit(build("no", terms, accumulate=1, dropout=0.5), epochs=1)
    assert_near(fit(build("inductor", terms, accumulate=1, dropout=0.5), epochs=1), expected)


def test_a_term_that_breaks_the_graph_keeps_its_numbers(graphs):
    """Fails if what is computed between the pieces of a graph is lost, or computed twice."""
    terms = [{"task": CrossEntropy(), "reading": Reading(weight=0.1), "memory": Memory()} for _ in range(2)]
    expected = fit(build("no", terms[0], accumulate=1))
    assert_near(fit(build("aot_eager", terms[1], accumulate=1)), expected)
    assert graphs()[1]


def test_trainings_keep_graphs_of_their_own(graphs):
    """Fails if the ninth training of a process is computed without a graph, as torch keeps eight."""
    batch = Batch.of((X, Y))
    for _ in range(9):
        objective = CompiledObjective({"task": CrossEntropy()}, backend="eager")
        objective.loss(Step(nn.Linear(6, 3), batch, Progress(1, 2)), objective.counts([batch]))
    assert graphs()[0] == 9


def test_what_cannot_be_compiled_is_refused():
    """Fails if shards, or the search for the operation whose gradient is NaN, meet a graph without a word."""
    with pytest.raises(ValueError, match=re.escape("exclude each other")):
        Compute(compile="inductor", sharding="fsdp2")
    with pytest.raises(ValueError, match=r"compile must be 'no', 'inductor' or 'aot_eager'"):
        Compute(compile="fast")
    trainer = build()
    with torch.autograd.set_detect_anomaly(True), pytest.raises(ValueError, match=re.escape('Compute(compile="no")')):
        fit(trainer)
