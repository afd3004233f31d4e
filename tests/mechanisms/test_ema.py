import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from regularized.mechanisms.ema import EMA, ramped_decay, running_mean_decay


def model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=8), st.floats(0, 1))
@settings(max_examples=50)
def test_equals_the_formula(values, decay):
    """Fails when decay and its complement are exchanged, or the first update is treated apart."""
    online = nn.Linear(1, 1, bias=False).double()
    average = EMA(online, decay=decay)
    expected = online.weight.item()
    for value in values:
        nn.init.constant_(online.weight, value)
        average.update(online)
        expected = decay * expected + (1 - decay) * value
    assert average.module.weight.item() == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_running_mean_is_the_mean():
    """Fails when the number of the update is off by one: the average must be the mean of start and all updates."""
    online = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(online.weight, 4.0)
    average = EMA(online, decay=running_mean_decay(0.9999))
    for value in (1.0, 7.0, 8.0):
        nn.init.constant_(online.weight, value)
        average.update(online)
    assert average.module.weight.item() == pytest.approx(5.0)


def test_decay_functions_at_their_ends():
    """Fails when the ramp has another end, exponent or offset."""
    ramp = ramped_decay(0.997, steps=40000)
    assert ramp(39999) == ramp(10**9) == 0.997
    assert ramp(19999) == pytest.approx(0.997 * 2.718281828459045**-1.25)
    assert ramped_decay(0.5, steps=0)(1) == 0.5
    assert [running_mean_decay(0.8)(n) for n in (1, 3, 4, 5)] == pytest.approx([0.5, 0.75, 0.8, 0.8])


@pytest.mark.parametrize("buffers", ["copy", "average", "own"])
def test_buffers(buffers):
    """Fails when the statistics of batch normalisation go another way than asked for."""
    online = model()
    average = EMA(online, decay=0.9, buffers=buffers)
    online(torch.randn(8, 3) + 5)
    mean, count = online[1].running_mean, online[1].num_batches_tracked
    average.update(online)
    factor = {"copy": 1.0, "average": 0.1, "own": 0.0}[buffers]
    torch.testing.assert_close(average.module[1].running_mean, factor * mean)
    assert average.module[1].num_batches_tracked == (0 if buffers == "own" else count)


def test_the_copy_is_apart():
    """Fails when the average shares memory with the model, needs gradients, or blocks those of its inputs."""
    online = model()
    average = EMA(online, decay=0.5)
    x = torch.randn(4, 3, requires_grad=True)
    torch.testing.assert_close(average(x), online(x))
    with torch.no_grad():
        online[0].weight.zero_()
    assert average.module[0].weight.any()
    assert not any(p.requires_grad for p in average.parameters())
    average(x).sum().backward()
    assert x.grad is not None


def test_state_holds_the_number_of_updates():
    """Fails when a resumed average starts its decay anew."""
    online, decay = model(), ramped_decay(0.99, steps=10)
    first = EMA(online, decay=decay)
    for _ in range(5):
        first.update(model(1))
    second = EMA(online, decay=decay)
    second.load_state_dict(first.state_dict())
    third = copy.deepcopy(first)
    for average in (first, second, third):
        average.update(model(2))
    assert second.updates == third.updates == 6
    for name, tensor in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], tensor)
        assert torch.equal(third.state_dict()[name], tensor)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: EMA(model(), decay=1.5), r"decay must be in \[0, 1\], got 1.5"),
        (lambda: EMA(model(), decay=lambda n: -1.0).update(model()), r"decay must be in \[0, 1\], got -1"),
        (lambda: EMA(model(), decay=0.9, buffers="mean"), "buffers must be 'copy', 'average' or 'own'"),
        (lambda: EMA(model(), decay=0.9).update(nn.Linear(3, 2)), "structure"),
        (lambda: ramped_decay(0.9, steps=-1), "steps must be at least 0"),
        (lambda: running_mean_decay(2.0), "decay must be in"),
    ],
)
def test_errors(call, words):
    """Fails when a wrong setting is accepted."""
    with pytest.raises(ValueError, match=words):
        call()
