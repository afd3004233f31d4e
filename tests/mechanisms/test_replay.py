"""Recorded forward passes; what they are for is tested where they are used."""

import pytest
import torch
from torch import nn

from regularized.mechanisms.replay import ForwardRecorder, find_layers


def test_only_training_passes_are_recorded():
    """Evaluation, no_grad and passes of a copy leave nothing. Fails when a validation batch is replayed."""
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    recorder = ForwardRecorder(model, ["1"])
    recorder.start()
    x = torch.randn(4, 2)
    with torch.no_grad():
        model(x)
    model.eval()(x)
    assert recorder.take() == []
    model.train()(x)
    passes = recorder.take()
    assert len(passes) == 1
    assert passes[0].is_of(x)
    assert not passes[0].is_of(torch.randn(4, 2))
    assert not passes[0].hidden["1"].requires_grad
    recorder.stop()
    model(x)
    assert recorder.take() == []


def test_replay_substitutes_by_name():
    """Named tensors take the place of parameters for one pass. Fails when the model's own are used or changed."""
    model = nn.Sequential(nn.Linear(2, 3, bias=False), nn.Identity())
    recorder = ForwardRecorder(model, ["1"])
    recorder.start()
    x = torch.randn(4, 2)
    model(x)
    other = torch.randn(3, 2)
    seen = recorder.replay(recorder.take()[0], {"0.weight": other}, lambda hidden: hidden["1"])
    torch.testing.assert_close(seen, x @ other.T)
    assert recorder.take() == []
    assert not torch.equal(model[0].weight, other)


def test_a_layer_that_is_not_used():
    """A state that never came is an error. Fails when a stale or an empty one is compared."""

    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    model = Partly()
    recorder = ForwardRecorder(model, ["unused"])
    recorder.start()
    with pytest.raises(ValueError, match=r"did not go through \['unused'\]"):
        model(torch.zeros(1, 2))


def test_the_longest_list_of_equal_blocks():
    """A list of unequal parts, a shorter one, or one inside a block is not taken for the blocks of a transformer."""
    model = nn.ModuleDict(
        {
            "mixed": nn.ModuleList([nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), nn.ReLU()]),
            "short": nn.ModuleList([nn.Linear(2, 2)]),
            "blocks": nn.ModuleList(nn.ModuleList(nn.Linear(2, 2) for _ in range(5)) for _ in range(3)),
        }
    )
    assert find_layers(model) == ("blocks.0", "blocks.1", "blocks.2")
    assert find_layers(model, ["mixed.1", 0]) == ("mixed.1", "blocks.0")
