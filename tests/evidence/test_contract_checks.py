"""The checks of the contract must be able to fail: each is given a technique with the fault that it looks for."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from regularized.evidence.contract import (
    CHECKS,
    DIAGNOSTIC_CHECKS,
    PROCEDURE_CHECKS,
    BadInput,
    DiagnosticSubject,
    ProcedureSubject,
    Subject,
    check_bad_input,
)
from regularized.training.terms import CrossEntropy, Term


class Penalty(Term):
    """Sum of squared logits: a sound term, with switchable faults."""

    def __init__(self, fault="", weight=0.5):
        super().__init__(weight=weight)
        self.fault = fault
        self.register_buffer("seen", torch.zeros(24))
        if fault == "state not a buffer":
            self.memory = torch.zeros(())

    def forward(self, step):
        if self.fault == "does nothing":
            return step.logits.sum() * 0
        if self.fault == "bf16 overflow":
            scale = 1e30 if step.logits.dtype == torch.bfloat16 else 1.0
            return step.logits.float().mul(scale).square().sum()
        value = step.logits.square().sum()
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


class Surgery(Term):
    """Doubles the weights of a layer, each time it is asked: surgery that is not idempotent."""

    contributes = False

    def attach(self, model):
        with torch.no_grad():
            model[0].weight.mul_(2)


def model():
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))


def data(n, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 5, generator=generator)
    return {"inputs": x, "targets": x[:, :3].argmax(1), "index": torch.arange(n)}


def terms(fault, weight=0.5):
    return {"task": CrossEntropy(), "penalty": Penalty(fault, weight)}


def with_surgery():
    return {"task": CrossEntropy(), "surgery": Surgery()}


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
    CHECKS[name](subject())


@pytest.mark.parametrize(
    ("name", "faulty"),
    [
        ("it_bites", subject("does nothing")),
        ("deterministic", subject("unseeded")),
        ("coefficient_zero", subject(off=partial(terms, "", 1e-6))),
        ("accumulation", subject("mean for sum")),
        ("accumulation", subject("batch statistic")),
        ("two_processes", subject("mean for sum")),
        ("two_processes", subject("local state")),
        ("resume", subject("state not a buffer")),
        ("bf16", subject("bf16 overflow")),
        ("compile", subject(part=breaking_part)),
        ("attach", Subject("surgery", model, with_surgery, plain, data)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_fault_is_found(name, faulty):
    with pytest.raises(Exception):  # noqa: B017, PT011  an AssertionError, or what the compiler raises
        CHECKS[name](faulty)


class Procedure:
    """A walk with a generator of its own; the faulty one forgets to save it."""

    def __init__(self, forgetful=False):
        self.weight = torch.zeros(3)
        self.generator = torch.Generator().manual_seed(0)
        self.forgetful = forgetful

    def fit(self, epochs):
        for _ in range(epochs):
            self.weight = self.weight + torch.randn(3, generator=self.generator)

    def state_dict(self):
        state = {"weight": self.weight}
        return state if self.forgetful else {**state, "generator": self.generator.get_state()}

    def load_state_dict(self, state):
        self.weight = state["weight"].clone()
        if "generator" in state:
            self.generator.set_state(state["generator"])


def procedure(forgetful):
    return ProcedureSubject(
        "walk", partial(Procedure, forgetful), lambda p, epochs: p.fit(epochs), lambda p: {"weight": p.weight}
    )


def test_procedures():
    for check in PROCEDURE_CHECKS.values():
        check(procedure(forgetful=False))
    with pytest.raises(AssertionError, match="resumed"):
        PROCEDURE_CHECKS["resume"](procedure(forgetful=True))


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
        ("sees", lambda model: {"out": torch.ones(3)}),
    ],
)
def test_fault_of_a_diagnostic_is_found(name, faulty):
    for check in DIAGNOSTIC_CHECKS.values():
        check(DiagnosticSubject("sound", dropped_out, sound_report))
    with pytest.raises(AssertionError):
        DIAGNOSTIC_CHECKS[name](DiagnosticSubject("faulty", dropped_out, faulty))


def test_bad_input():
    """Fails when another error, silence, or a message without the promised words passes."""
    check_bad_input(BadInput("division", lambda: 1 / 0, ZeroDivisionError, ("division",)))
    with pytest.raises(AssertionError, match="lacks"):
        check_bad_input(BadInput("division", lambda: 1 / 0, ZeroDivisionError, ("remedy",)))
    with pytest.raises(AssertionError, match="no ValueError"):
        check_bad_input(BadInput("nothing", lambda: None, ValueError, ()))
    with pytest.raises(AssertionError, match="no UserWarning"):
        check_bad_input(BadInput("nothing", lambda: None, UserWarning, ()))
