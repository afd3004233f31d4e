import math

import pytest
import torch
from torch import nn

from regularized.training import EarlyStopping


def run(stopping, values):
    model = nn.Linear(1, 1)
    stopped = []
    for i, value in enumerate(values):
        with torch.no_grad():
            model.weight.fill_(i)
        stopped.append(stopping.update({"m": value}, model))
    return stopped, model


@pytest.mark.parametrize(
    ("direction", "values", "stopped", "best"),
    [
        ("lower", [3, 2, 2.5, 2.2], [0, 0, 0, 1], 1),
        ("higher", [1, 2, 2, 2], [0, 0, 0, 1], 1),  # equal is no improvement
        ("lower", [math.nan, math.nan], [0, 1], None),  # NaN never is
        ("lower", [3, math.nan, 1, 1], [0, 0, 0, 0], 2),
    ],
)
def test_stops_after_patience_and_restores(direction, values, stopped, best):
    """Fails on a wrong direction, an off-by-one in patience, or NaN taken for the best."""
    stopping = EarlyStopping("m", direction, patience=2)
    got, model = run(stopping, values)
    assert got == [bool(s) for s in stopped]
    last = model.weight.item()
    stopping.restore(model)
    assert model.weight.item() == (last if best is None else best)


def test_min_delta():
    """Fails if a change smaller than min_delta resets the patience."""
    assert run(EarlyStopping("m", "higher", patience=2, min_delta=0.5), [1, 1.4, 1.5])[0] == [False, False, True]


def test_state_goes_round_and_reset_forgets():
    """Fails if patience or best weights are lost in a checkpoint."""
    one, two = (EarlyStopping("m", "lower", patience=2) for _ in range(2))
    run(one, [1, 2])
    two.load_state_dict(one.state_dict())
    assert two.update({"m": 3.0}, nn.Linear(1, 1))
    model = nn.Linear(1, 1)
    two.restore(model)
    assert model.weight.item() == 0
    two.reset()
    assert two.best is None
    assert not two.update({"m": 9.0}, nn.Linear(1, 1))


def test_best_weights_are_a_copy():
    """Fails if the kept weights are the model's own tensors."""
    stopping = EarlyStopping("m", "lower")
    model = nn.Linear(1, 1)
    before = model.weight.item()
    stopping.update({"m": 1.0}, model)
    with torch.no_grad():
        model.weight.add_(1)
    stopping.restore(model)
    assert model.weight.item() == before


@pytest.mark.parametrize(
    "options", [{"direction": "up"}, {"patience": 0}, {"min_delta": -1.0}, {"min_delta": math.nan}]
)
def test_bad_arguments(options):
    """Fails if a wrong argument is taken silently."""
    with pytest.raises(ValueError, match=next(iter(options))):
        EarlyStopping(**{"metric": "m", "direction": "lower", **options})
