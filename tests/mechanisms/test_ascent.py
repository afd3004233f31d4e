"""Steps uphill: length, invariance to scale, exact restoration, frozen statistics."""

import copy

import pytest
import torch
from torch import nn

from regularized.mechanisms.ascent import ascent_direction, frozen_statistics, global_norm, moved


def gradients(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in ((3, 4), (5,), ())]


def test_norm_is_over_all_tensors_together():
    """Fails when each tensor is normalised by itself."""
    flat = torch.cat([g.flatten() for g in gradients()])
    torch.testing.assert_close(global_norm(gradients()), flat.norm())
    step = torch.cat([s.flatten() for s in ascent_direction(gradients(), 0.3)])
    torch.testing.assert_close(step, 0.3 * flat / flat.norm())


@pytest.mark.parametrize("factor", [1e-6, 65536.0])
def test_step_does_not_depend_on_the_scale_of_the_loss(factor):
    """Fails when the norm is left out, or eps weighs: a gradient scaler would change the radius."""
    scaled = [g.double() * factor for g in gradients()]
    for a, b in zip(ascent_direction(scaled, 0.3), ascent_direction(gradients(torch.float64), 0.3), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


def test_low_precision_is_summed_in_float32():
    """Fails when the norm of bfloat16 gradients is formed in bfloat16: 4096 equal squares would not add up."""
    ones = [torch.full((64,), 0.1, dtype=torch.bfloat16) for _ in range(64)]
    assert global_norm(ones).dtype == torch.float32
    torch.testing.assert_close(global_norm(ones), ones[0][0].float() * 64)
    assert ascent_direction(ones, 1.0)[0].dtype == torch.bfloat16


def test_zero_gradient_gives_no_step():
    """Fails when zero is divided by zero."""
    assert all(not step.any() for step in ascent_direction([torch.zeros(3), torch.zeros(2)], 0.5))


def test_restores_the_very_bits_also_after_an_error():
    """Fails when the offset is subtracted again, or an exception leaves the weights displaced."""
    weights = [nn.Parameter(g) for g in gradients()]
    weights[1].data[0] = -0.0
    before = [w.detach().clone() for w in weights]

    def an_error_inside():
        with moved(weights, [g * 1e3 for g in gradients()]):
            assert all(bool((w != b).any()) for w, b in zip(weights, before, strict=True))
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        an_error_inside()
    for weight, copied in zip(weights, before, strict=True):
        assert torch.equal(weight, copied)
        assert torch.equal(weight.signbit(), copied.signbit())


def test_frozen_statistics_change_no_output():
    """Fails when evaluation mode is used instead, which normalises by other numbers."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4).eval())
    reference, x = copy.deepcopy(model), torch.randn(6, 3)
    with frozen_statistics(model):
        out = model(x)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), reference.buffers(), strict=True))
    assert torch.equal(out, reference(x))
    assert [part.track_running_stats for part in model[1:]] == [True, True]
    model(x)
    assert int(model[1].num_batches_tracked) == 1
