"""The checks of the contract must be able to fail: each is given a technique with the fault that it looks for."""

import json
from contextlib import suppress
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from regularized.evidence.contract import (
    CHECKS,
    DIAGNOSTIC_CHECKS,
    PROCEDURE_CHECKS,
    DiagnosticSubject,
    NotApplicable,
    ProcedureSubject,
    Subject,
    checks_of,
    run,
)
from regularized.evidence.contract import suite as contract_suite
from regularized.mechanisms.distributed import gather_rows
from regularized.mechanisms.sample_history import store_rows
from regularized.training.terms import CrossEntropy, Term


class Penalty(Term):
    """Sum of squared logits: a sound term, with switchable faults."""

    sharding = "forward"

    def __init__(self, fault="", weight=0.5):
        super().__init__(weight=weight)
        self.fault = fault
        self.calls = ()
        self.register_buffer("seen", torch.zeros(24))
        if fault == "state not a buffer":
            self.memory = torch.zeros(())

    def forward(self, step):
        if self.fault == "does nothing":
            return step.logits.sum() * 0
        if self.fault == "reads shards":
            return step.logits.square().sum() + step.model[0].weight.square().mean() * step.batch.size
        if self.fault == "bf16 overflow":
            scale = 1e30 if step.logits.dtype == torch.bfloat16 else 1.0
            return step.logits.float().mul(scale).square().sum()
        value = step.logits.square().sum()
        if self.fault == "compiled otherwise" and torch.compiler.is_compiling():
            return value * 1.01
        if self.fault == "reads a number" and value.item() > 1e6:
            return value * 0
        if self.fault == "counts in Python":
            self.calls = (*self.calls, 0)
        if self.fault == "mean for sum":
            return value / step.batch.size
        if self.fault == "unseeded":
            import os

            return value * (1 + int.from_bytes(os.urandom(2), "little") / 65536)
        if self.fault == "batch statistic":
            return step.logits.mean(0).square().sum() * step.batch.size
        if self.fault == "not zero":
            return value + 1
        if self.fault == "local state":
            with torch.no_grad():
                self.seen[step.index] += 1
        if self.fault == "state not a buffer":
            self.memory = self.memory + 0.1
            return value * self.memory
        return value


class Spoilt(Term):
    """Remembers gradients that it takes from autograd itself, overflowing ones too."""

    def __init__(self):
        super().__init__()
        self.register_buffer("largest", torch.zeros(()))

    def forward(self, step):
        if step.logits.requires_grad:
            step.logits.register_hook(lambda g: self.largest.copy_(torch.maximum(self.largest, g.detach().abs().max())))
        return step.logits.square().sum()


class Silent(Penalty):
    """Reads a weight in its loss, and does not say so."""

    sharding = None


class Shrinking(Term):
    """Shrinks the weight that it found when it was attached, and does not say so."""

    contributes = False

    def attach(self, model):
        self.found = (model[0].weight,)

    def after_step(self, step):
        with torch.no_grad():
            self.found[0].mul_(0.9)


class Surgery(Term):
    """Doubles the weights of a layer, each time it is asked: surgery that is not idempotent."""

    contributes = False

    def attach(self, model):
        with torch.no_grad():
            model[0].weight.mul_(2)


class Table(Term):
    """A row for each sample, written by the process that had it; the faulty one tells the other process nothing."""

    def __init__(self, told):
        super().__init__()
        self.told = told
        self.register_buffer("rows", torch.zeros(24, 3, dtype=torch.float64))

    def forward(self, step):
        rows = step.logits.detach().double()
        if self.told:
            store_rows(self.rows, *gather_rows(step.index, rows))
        else:
            self.rows[step.index] = rows
        return step.logits.square().sum()


class Holding(Term):
    """Counts the losses of a step, and forgets neither its count nor the step that was interrupted."""

    def __init__(self):
        super().__init__()
        self.losses = 0

    def forward(self, step):
        self.losses += 1
        return self.losses * step.logits.square().sum()

    def after_step(self, step):
        self.losses = 0


class Renamed(Term):
    """Surgery that gives the weights of a layer other names, and does nothing else."""

    contributes = False

    def attach(self, model):
        if not isinstance(model[0], nn.Sequential):
            model[0] = nn.Sequential(model[0])


class DrawsOnly(Term):
    """Surgery that draws at random, and does nothing else."""

    contributes = False

    def attach(self, model):
        torch.randn(3)


class Halved(Term):
    """Surgery that merging forgets to undo in part."""

    contributes = False

    def attach(self, model):
        if not isinstance(model[0], nn.Sequential):
            model[0] = nn.Sequential(model[0], nn.Dropout(0.0))

    def merge(self, model):
        model[0] = model[0][0]
        with torch.no_grad():
            model[0].weight.mul_(0.5)


def with_dropout():
    return nn.Sequential(nn.Linear(5, 6), nn.Dropout(0.5), nn.Linear(6, 3))


def model():
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))


def data(n, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 5, generator=generator)
    return {"inputs": x, "targets": x[:, :3].argmax(1), "index": torch.arange(n)}


def terms(fault, weight=0.5):
    return {"task": CrossEntropy(), "penalty": Penalty(fault, weight)}


def with_surgery(kind=Surgery):
    return {"task": CrossEntropy(), "surgery": kind()}


def with_table(told):
    return {"task": CrossEntropy(), "table": Table(told)}


def with_spoilt():
    return {"task": CrossEntropy(), "spoilt": Spoilt()}


def with_silent():
    return {"task": CrossEntropy(), "silent": Silent("reads shards")}


def with_holding():
    return {"task": CrossEntropy(), "holding": Holding()}


def needs_samples():
    return nn.Sequential(NeedsSamples(), *model())


class NeedsSamples(nn.Module):
    def forward(self, x):
        if len(x) == 0:
            raise ValueError("the batch is empty")
        return x


def plain():
    return {"task": CrossEntropy()}


def part():
    return partial(F.mse_loss, torch.zeros(3)), (torch.ones(3, requires_grad=True),)


def breaking(x):
    if x.sum().item() > 0:
        return x * 2
    return x


def breaking_part():
    return breaking, (torch.ones(3, requires_grad=True),)


def subject(fault="", **changes):
    settings = {"off": partial(terms, fault, 0.0), "part": part, **changes}
    return Subject("test", model, partial(terms, fault), plain, data, **settings)


@pytest.mark.parametrize("name", CHECKS)
def test_sound_technique_passes(name):
    """The checks must not be impossible either."""
    with suppress(NotApplicable):
        CHECKS[name](subject())


def test_what_does_not_apply_says_so():
    """Fails when a check that looks at nothing returns as if it had passed."""
    stateless = Subject("plain", model, plain, plain, data)
    gpu = set() if torch.cuda.is_available() else {"gpu"}
    outcomes = {outcome.check: outcome for outcome in run("test", [stateless])}
    idle = {"coefficient_zero", "compile", "state", "attach", "merge", *gpu}
    assert outcomes["fsdp2"].status == "passed"
    assert {check for check, outcome in outcomes.items() if outcome.status == "not_applicable"} == idle
    assert all(outcomes[check].reason for check in idle)
    assert outcomes["it_bites"].status == "failed"
    assert "does not change the weights" in outcomes["it_bites"].reason


@pytest.mark.parametrize(
    ("name", "faulty"),
    [
        ("it_bites", subject("does nothing")),
        ("it_bites", Subject("renamed", model, partial(with_surgery, Renamed), plain, data)),
        ("it_bites", Subject("draws", with_dropout, partial(with_surgery, DrawsOnly), plain, data)),
        ("deterministic", subject("unseeded")),
        ("coefficient_zero", subject(off=partial(terms, "", 1e-6))),
        ("accumulation", subject("mean for sum")),
        ("accumulation", subject("batch statistic")),
        ("two_processes", subject("mean for sum")),
        ("two_processes", subject("local state")),
        ("resume", subject("state not a buffer")),
        ("interrupted", Subject("holding", model, with_holding, plain, data)),
        ("trainer_processes", Subject("table", model, partial(with_table, False), plain, data)),
        ("trainer_processes", subject("mean for sum")),
        ("fsdp2", subject("reads shards")),
        ("bf16", subject("bf16 overflow")),
        ("fp16", Subject("spoilt", model, with_spoilt, plain, data)),
        ("compile", subject(part=breaking_part)),
        ("compile_step", subject("compiled otherwise")),
        ("attach", Subject("surgery", model, with_surgery, plain, data)),
        ("merge", Subject("halved", model, partial(with_surgery, Halved), plain, data)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_fault_is_found(name, faulty):
    with pytest.raises(Exception) as raised:  # noqa: PT011  an AssertionError, or what the compiler raises
        CHECKS[name](faulty)
    assert not isinstance(raised.value, NotApplicable)


@pytest.mark.parametrize(
    ("terms", "says"),
    [(with_silent, 'with sharding = "weights" it ends where'), (partial(with_surgery, Shrinking), "it fails or ends")],
    ids=["reads", "moves what was replaced"],
)
def test_what_a_term_could_say_of_shards_is_told(terms, says):
    """Fails when the reason recommends a word with which training in shards goes wrong, or none where one is right."""
    with pytest.raises(NotApplicable, match=f"refused: it does not say what it needs.*{says}"):
        CHECKS["fsdp2"](Subject("silent", model, terms, plain, data))


def test_a_step_that_is_no_graph_says_where_and_why():
    """Fails when a broken graph, or one that is made at every step, passes for a compiled step."""
    with pytest.raises(NotApplicable, match=r"the graph breaks.*Tensor\.item"):
        CHECKS["compile_step"](subject("reads a number"))
    with pytest.raises(NotApplicable, match="makes the graph anew"):
        CHECKS["compile_step"](subject("counts in Python"))


class Procedure:
    """A walk with a generator of its own; the faulty ones stand still, or forget to save it."""

    def __init__(self, forgetful=False, length=1.0):
        self.length = length
        self.weight = torch.zeros(3)
        self.generator = torch.Generator().manual_seed(0)
        self.forgetful = forgetful

    def fit(self, epochs):
        for _ in range(epochs):
            self.weight = self.weight + self.length * torch.randn(3, generator=self.generator)

    def state_dict(self):
        state = {"weight": self.weight}
        return state if self.forgetful else {**state, "generator": self.generator.get_state()}

    def load_state_dict(self, state):
        self.weight = state["weight"].clone()
        if "generator" in state:
            self.generator.set_state(state["generator"])


def procedure(*, plain=0.5, walk=Procedure, **fault):
    return ProcedureSubject(
        "walk",
        build=partial(walk, **fault),
        plain=partial(Procedure, length=plain),
        train=lambda p, epochs: p.fit(epochs),
        weights=lambda p: {"weight": p.weight},
    )


class Unseeded(Procedure):
    def fit(self, epochs):
        self.generator.seed()
        super().fit(epochs)


@pytest.mark.parametrize(
    ("name", "faulty", "says"),
    [
        ("it_bites", procedure(length=0.0), "changes nothing"),
        ("it_bites", procedure(plain=1.0), "same place"),
        ("deterministic", procedure(walk=Unseeded), "same seed"),
        ("resume", procedure(forgetful=True), "resumed"),
    ],
)
def test_fault_of_a_procedure_is_found(name, faulty, says):
    for check in PROCEDURE_CHECKS.values():
        with suppress(NotApplicable):
            check(procedure())
    with pytest.raises(AssertionError, match=says):
        PROCEDURE_CHECKS[name](faulty)


def dropped_out():
    return nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).eval()


def sound_report(model):
    with torch.no_grad():
        return {"out": model(torch.ones(2, 4)), "norm": model[0].weight.norm()}


def left_in_training(model):
    model.train()
    return {"out": model[0](torch.ones(2, 4)).detach()}


def left_with_hook(model):
    model.register_forward_hook(lambda *_: None)
    return sound_report(model)


def left_with_gradient(model):
    model(torch.ones(2, 4)).sum().backward()
    return sound_report(model)


def changes_weights(model):
    with torch.no_grad():
        model[0].weight.mul_(2.0)
    return sound_report(model)


@pytest.mark.parametrize(
    ("name", "faulty"),
    [
        ("leaves_alone", left_in_training),
        ("leaves_alone", left_with_hook),
        ("leaves_alone", left_with_gradient),
        ("leaves_alone", changes_weights),
        ("leaves_alone", lambda model: {"out": torch.randn(3)}),
        ("deterministic", lambda model: {"out": torch.randn(3)}),
        ("deterministic", lambda model: {"out": model(torch.ones(2, 4))}),
        ("it_bites", lambda model: {"out": torch.ones(3)}),
    ],
)
def test_fault_of_a_diagnostic_is_found(name, faulty):
    for check in DIAGNOSTIC_CHECKS.values():
        with suppress(NotApplicable):
            check(DiagnosticSubject("sound", dropped_out, sound_report))
    with pytest.raises(AssertionError):
        DIAGNOSTIC_CHECKS[name](DiagnosticSubject("faulty", dropped_out, faulty))


def test_a_model_that_takes_no_empty_batch():
    """Fails when it is not compared at all, or passes as if a process without samples were no matter."""
    sound, faulty = (Subject("t", needs_samples, partial(with_table, told), plain, data) for told in (True, False))
    with pytest.raises(NotApplicable, match="the batch is empty"):
        CHECKS["trainer_processes"](sound)
    with pytest.raises(AssertionError, match="table"):
        CHECKS["trainer_processes"](faulty)


def test_exceptions_of_a_card():
    """Fails when an announced failure counts as one, or an exception outlives its reason."""
    diagnostic = DiagnosticSubject("blind", dropped_out, lambda model: {"out": torch.ones(3)})
    outcomes = {o.check: o for o in run("test", [diagnostic], exceptions={"it_bites": "is blind", "leaves_alone": "?"})}
    assert (outcomes["it_bites"].status, outcomes["it_bites"].reason) == ("excepted", "is blind")
    assert outcomes["leaves_alone"].status == "failed"
    assert "remove the exception" in outcomes["leaves_alone"].reason


def test_an_unknown_subject_is_refused():
    with pytest.raises(TypeError, match="got str"):
        checks_of("subject")


def test_saved_outcomes(tmp_path, monkeypatch):
    """Fails when failures are saved as if they were results, or a damaged file is not named."""
    home = tmp_path / "a_paper"
    home.mkdir()
    (home / "mine.py").write_text("")
    monkeypatch.syspath_prepend(str(home))
    monkeypatch.setattr("regularized.evidence.provenance.code_key", lambda name: "key")
    monkeypatch.setattr("regularized.evidence.provenance.environment", lambda name: {"torch": "2"})
    outcomes = list(run("test", [DiagnosticSubject("sound", dropped_out, sound_report)]))
    path = contract_suite.save(outcomes, "mine")
    assert contract_suite.load(path)["outcomes"] == outcomes
    blind = list(run("test", [DiagnosticSubject("blind", dropped_out, lambda model: {"out": torch.ones(3)})]))
    with pytest.raises(ValueError, match="blind: it_bites"):
        contract_suite.save(blind, "mine")
    assert json.loads(path.read_text())["outcomes"][0]["status"] == "passed"
    path.write_text("{}")
    with pytest.raises(ValueError, match="contract SLUG --save"):
        contract_suite.load(path)
    with pytest.raises(ValueError, match="contract SLUG --save"):
        contract_suite.load(home)  # a folder where the file should be
    assert contract_suite.load(tmp_path / "nothing.json") is None
