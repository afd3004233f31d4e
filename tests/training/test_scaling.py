"""float16 with a scaled loss: what overflows is left out, and nothing else changes."""

import re
from functools import partial

import pytest
import torch
from torch import nn

from regularized.training import Checkpoints, Compute, CrossEntropy, NonFiniteLoss, TensorData, Term, Trainer

X = torch.randn(24, 6, generator=torch.Generator().manual_seed(0))
Y = X[:, :3].argmax(1)


class Watch(Term):
    """Sees the gradients of the first layer, and what moments there were; its own value is multiplied by `peak`."""

    def __init__(self, peak=0.0, at=()):
        super().__init__()
        self.peak, self.at = peak, at
        self.seen, self.gradients = [], []

    def forward(self, step):
        return step.logits.sum() * (self.peak if step.progress.step in self.at else 0.0)

    def before_step(self, step):
        self.seen.append(f"before {step.progress.step}")
        self.gradients.append(step.model[0].weight.grad.clone())

    def after_step(self, step):
        self.seen.append(f"after {step.progress.step}")

    def reset(self):
        self.seen.append("reset")


def build(watch, precision="fp16", checkpoints=None):
    torch.manual_seed(0)
    return Trainer(
        nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)),
        terms={"task": CrossEntropy(), "watch": watch},
        optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        clip_norm=10.0,
        checkpoints=checkpoints,
        compute=Compute(precision=precision),
    )


def data():
    return TensorData(X, Y, batch_size=8)


def test_gradients_are_unscaled_before_the_step():
    """Fails if terms or clipping see gradients times the scale, or nothing is computed in float16."""
    exact, low = Watch(), Watch()
    build(exact, "no").fit(data(), epochs=1)
    build(low).fit(data(), epochs=1)
    apart = max(float((a - b).abs().max()) for a, b in zip(exact.gradients, low.gradients, strict=True))
    assert 0 < apart < 1e-3


def test_a_step_that_overflows_is_left_out(tmp_path):
    """Fails if it reaches weights, moments or schedules, or a resumed run begins with the first scale again."""

    def run(folder, **stop):
        watch = Watch(peak=1e5, at=(1, 2))
        trainer = build(watch, checkpoints=Checkpoints(folder, every=1))
        trainer.fit(data(), epochs=2, **stop)
        return trainer, watch

    whole, watch = run(tmp_path / "whole")
    assert watch.seen == ["reset", "before 0", "after 0", "reset", "reset"] + [
        f"{moment} {step}" for step in (3, 4, 5) for moment in ("before", "after")
    ]
    assert whole.scaler.get_scale() == 2.0**14
    run(tmp_path / "parts", max_steps=2)
    resumed, _ = run(tmp_path / "parts", resume=True)
    assert resumed.scaler.state_dict() == whole.scaler.state_dict()
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True))


def test_a_gradient_that_no_scale_mends_is_an_error():
    """Fails if training leaves out all steps for ever, without a word."""

    class Root(Term):
        def forward(self, step):
            return (step.logits * 0).square().sum().sqrt()

    trainer = build(Root())
    with pytest.raises(NonFiniteLoss, match=re.escape("gradient of term 'watch', whose value is finite")):
        trainer.fit(data(), epochs=20)


def test_what_float16_cannot_train_is_refused():
    """Fails if float16 weights are updated, or an optimizer ascends by scaled gradients."""
    model = nn.Linear(6, 3).half()
    settings = {"terms": {"task": CrossEntropy()}, "compute": Compute(precision="fp16")}
    with pytest.raises(ValueError, match=r"'weight' is float16 itself.*model.float\(\)"):
        Trainer(model, optimizer=partial(torch.optim.SGD, lr=0.1), **settings)
    model = nn.Linear(6, 3)
    with pytest.raises(ValueError, match=r'asks for gradients at several weights.*"bf16"'):
        Trainer(model, optimizer=lambda groups: _Sharp(groups, lr=0.1), **settings)


class _Sharp(torch.optim.SGD):
    def backward(self, closure):
        closure()
