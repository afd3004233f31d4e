"""Training without labels as a procedure."""

import io
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from regularized.self_supervised.pretraining import Pretraining
from regularized.training.data import TensorData
from regularized.training.progress import linear

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


class Out(NamedTuple):
    """A loss, a number beside it, and something that is no number."""

    error: Tensor
    loss: Tensor
    rows: Tensor


class Denoising(nn.Module):
    """Draws noise and dropout, and notes when it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.2), nn.Linear(8, 3))
        self.fixed = nn.Parameter(torch.ones(3), requires_grad=False)
        self.events: list[tuple[str, int, float]] = []

    def forward(self, inputs, progress):
        self.events.append(("loss", progress.step, float(self.net[0].weight.detach().sum())))
        rows = (self.net(inputs + torch.randn_like(inputs)) - inputs).square().mean(dim=1)
        return Out(rows.detach().sqrt().mean(), rows.mean(), rows)

    def after_step(self, progress):
        self.events.append(("after", progress.step, float(self.net[0].weight.detach().sum())))


def build(**settings):
    torch.manual_seed(0)
    return Pretraining(Denoising(), **{"optimizer": SGD, **settings})


def data():
    return TensorData(torch.randn(12, 3, generator=torch.Generator().manual_seed(1)), batch_size=4, seed=2)


def test_scalars_are_averaged_by_name():
    """Fails when a tensor of rows is taken for a number, or names and numbers change places."""
    training = build()
    (record,) = training.fit(data(), epochs=1)
    assert sorted(record) == ["error", "loss"]
    assert record["error"] ** 2 < record["loss"] + 1e-6  # the mean of roots is below the root of the mean


def test_what_follows_is_moved_behind_each_step():
    """Fails when slow copies follow before the optimizer has stepped, or only at the end of an epoch."""
    training = build()
    training.fit(data(), epochs=1)
    events = training.pretext.events
    assert [name for name, _, _ in events] == ["loss", "after"] * 3
    assert [step for _, step, _ in events] == [0, 0, 1, 1, 2, 2]
    for before, after in zip(events[::2], events[1::2], strict=True):
        assert before[2] != after[2]


def test_only_what_needs_a_gradient_is_trained():
    """Fails when a frozen copy inside the pretext is given to the optimizer, whose decay would shrink it."""
    given = []
    build(optimizer=lambda parameters: given.append(len(parameters)) or SGD(parameters))
    assert given == [4]


def test_it_goes_on_in_the_middle_of_an_epoch():
    """Fails when the noise, the dropout, the transform or the order differ after an interruption."""

    def noisy(x):
        return x + torch.rand(())

    whole = build(transform=noisy, schedule=linear(1.0, 0.1))
    whole.fit(data(), epochs=2)
    first = build(transform=noisy, schedule=linear(1.0, 0.1))

    class Stopped(Exception):
        pass

    file = io.BytesIO()

    def stop(training):
        if training.optimizers.steps[0] == 4:
            torch.save(training.state_dict(), file)
            raise Stopped

    with pytest.raises(Stopped):
        first.fit(data(), epochs=2, after_step=stop)
    file.seek(0)
    second = build(transform=noisy, schedule=linear(1.0, 0.1))
    torch.manual_seed(99)
    second.load_state_dict(torch.load(file, weights_only=True))
    second.fit(data(), epochs=2)
    assert second.epoch == 2
    for (name, a), b in zip(whole.pretext.state_dict().items(), second.pretext.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_labels_are_not_looked_at():
    """Fails when a batch with labels trains otherwise than one without."""
    x = torch.randn(8, 3)
    ends = []
    for batch in (x, (x, torch.arange(8))):
        training = build()
        training.fit([batch], epochs=1)
        ends.append(training.pretext.net[0].weight.detach().clone())
    assert torch.equal(*ends)
