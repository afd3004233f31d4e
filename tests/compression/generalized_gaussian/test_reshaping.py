"""DeepShape: the order stays, the histogram is the target's, and the repository's variant beside ours."""

import pytest
import torch
from torch import nn

from regularized.compression.generalized_gaussian import GeneralizedGaussian, deepshape_, reshape_histogram


def laplace(number=20_000, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return GeneralizedGaussian(1.0, 0.1).sample((number,), generator=generator, dtype=torch.float64)


def test_order_stays():
    """Fails when a smaller weight ends above a larger one: a wrong sort, or values in another order."""
    w = laplace()
    for official in (False, True):
        new = reshape_histogram(w, bits=8, official=official).weights
        coarse = torch.round(w * 256) if official else w  # the repository breaks ties of the rounded ones by position
        order = torch.argsort(coarse, stable=True)
        steps = new[order].diff()
        if official:  # and leaves the largest within the cut-off as they are
            steps = steps[:15_000]
        assert bool((steps >= 0).all())


def test_histogram_is_the_target():
    """Fails when a value gets more or fewer weights than the target says, by more than one."""
    w, bits, largest = laplace(), 8, 60
    done = reshape_histogram(w, bits=bits, largest=largest)
    assert done.assigned == done.selected
    x = torch.arange(done.centre - largest, done.centre + largest + 1, dtype=torch.float64)
    law = done.before
    density = torch.exp(-((x - done.centre).abs() / (0.6 * law.scale * 2**bits)).pow(0.8 * law.shape))
    numbers = torch.stack([(done.weights * 2**bits == value).sum() for value in x])
    beyond = (torch.round(w * 2**bits) - done.centre).abs() > largest
    assert done.selected == int((~beyond).sum())
    assert float((numbers - done.selected * density / density.sum()).abs().max()) <= 1.0
    assert torch.equal(done.weights[beyond], torch.round(w * 2**bits)[beyond] / 2**bits)


def test_official_leaves_the_largest_over():
    """Fails when the repository's rounding down is not kept: fewer weights are assigned than selected."""
    done = reshape_histogram(laplace(), bits=13, largest=3000, official=True)
    assert done.assigned < done.selected


def test_factors_one_change_little():
    """Fails when a histogram that is the target already is moved."""
    w = laplace()
    new = reshape_histogram(w, shape_scale=1.0, std_scale=1.0, bits=10).weights
    assert float((new - w).abs().mean()) < 0.05 * float(w.abs().mean())


def test_cut_off_is_the_first_rare_value():
    """Fails when the cut-off is another than the smallest positive multiple that few weights have."""
    w = torch.tensor([0.0, 1, 1, 1, 2, 2, -1, -1, -2, 2, 0, 0, 3]).double()
    assert reshape_histogram(w, bits=0, rare=1).selected == 13  # 3 occurs once
    assert reshape_histogram(w, bits=0, rare=3).selected == int((w.abs() <= 1).sum())
    assert reshape_histogram(w, bits=0, rare=0).selected == 13  # 4 does not occur


def test_model_layers_and_vectors():
    """Fails when vectors are reshaped, tied weights twice, or layers share a histogram that each should have."""
    model = nn.Sequential(nn.Linear(100, 100), nn.LayerNorm(100), nn.Linear(100, 100))
    with torch.no_grad():
        model[2].weight.mul_(20)
    bias = model[0].bias.detach().clone()
    assert deepshape_(model, bits=8, scope="layer") == ["0.weight", "2.weight"]
    assert torch.equal(model[0].bias, bias)
    small = model[0].weight * 256
    assert torch.equal(small, small.round())
    assert (model[2].weight.std() / model[0].weight.std()).item() == pytest.approx(20, rel=0.1)


def test_types_and_shapes_stay():
    """Fails when the result is float64, or flat."""
    w = laplace().float().view(100, 200)
    done = reshape_histogram(w, bits=8)
    assert done.weights.shape == w.shape
    assert done.weights.dtype == torch.float32
