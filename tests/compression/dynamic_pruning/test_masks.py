"""The masks of dynamic pruning: targets, strengths and the predictors' loss, against what the paper says of them."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from regularized.compression.dynamic_pruning.loss import mask_agreement, mask_loss
from regularized.compression.dynamic_pruning.masks import (
    DELTA,
    filter_strengths,
    mass_mask,
    predicted_mask,
    top_mask,
)


@pytest.mark.parametrize(("mass", "filters"), [(0.9, 3), (0.85, 2), (0.4, 1), (0.39, 0), (1.0, 4), (-1, 4)])
def test_how_many_filters_hold_a_share(mass, filters):
    """Fails when the filter that crosses the share is kept, when rounding drops one that just fits, or for no share."""
    strengths = torch.tensor([[0.2, 0.4, 0.1, 0.3]]) * 7.0
    kept = mass_mask(strengths, mass, min_keep=0)
    assert kept.sum() == filters
    assert kept.sum(dim=1).tolist() == [filters]
    order = strengths[0].argsort(descending=True)
    assert kept[0, order].tolist() == [True] * filters + [False] * (4 - filters)  # the strongest, wherever they stand


@given(
    st.lists(st.lists(st.floats(0, 100), min_size=6, max_size=6), min_size=1, max_size=4),
    st.floats(0.05, 0.99),
    st.floats(0.05, 0.99),
)
@settings(max_examples=60, deadline=None)
def test_kept_mass_is_bounded_and_grows(rows, first, second):
    """Fails when more mass than the share is kept, less is kept for a larger share, or images are mixed up."""
    strengths = torch.tensor(rows, dtype=torch.float64)
    low, high = (mass_mask(strengths, mass, min_keep=0) for mass in sorted((first, second)))
    assert bool((low <= high).all())
    total = strengths.sum(dim=1)
    assert bool(((strengths * high).sum(dim=1) <= (max(first, second) + DELTA) * total + 1e-9).all())
    one_by_one = torch.cat([mass_mask(row[None], max(first, second), min_keep=0) for row in strengths])
    assert torch.equal(high, one_by_one)


def test_scale_changes_nothing():
    """Fails when the share is taken of anything absolute."""
    strengths = torch.rand(5, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.equal(mass_mask(strengths, 0.7), mass_mask(strengths * 2.0**20, 0.7))


def test_dead_filters_and_dead_images():
    """Fails by 0 / 0 where no filter answers, or when a share of 1 keeps filters that never answer."""
    strengths = torch.tensor([[0.0, 2.0, 1e-9], [0.0, 0.0, 0.0]])
    assert mass_mask(strengths, 1.0, min_keep=0).tolist() == [[False, True, False], [False] * 3]
    assert mass_mask(strengths, 0.5, min_keep=0)[1].sum() == 0
    assert mass_mask(strengths, 0.5, min_keep=2).sum(dim=1).tolist() == [2, 2]
    assert top_mask(strengths, 0.0, min_keep=0).tolist() == [[False, True, False], [False] * 3]


def test_one_dominant_filter_is_kept():
    """Fails without the guard: one filter with 90 % of the mass would leave its layer empty at a share of one half."""
    strengths = torch.tensor([[0.05, 0.9, 0.05]])
    assert mass_mask(strengths, 0.5, min_keep=0).sum() == 0
    assert mass_mask(strengths, 0.5).tolist() == [[False, True, False]]


def test_uniform_keeps_equally_many():
    """Fails when the pruned share is taken for the kept one, or rounded up."""
    strengths = torch.rand(4, 7, generator=torch.Generator().manual_seed(0)) + 0.1
    for ratio in (0.0, 0.25, 0.5, 0.9):
        kept = top_mask(strengths, ratio)
        assert kept.sum(dim=1).tolist() == [7 - int(ratio * 7)] * 4
        assert bool((strengths.masked_fill(~kept, 9.0).amin(1) >= strengths.masked_fill(kept, 0.0).amax(1)).all())
    assert top_mask(strengths, -1).all()


@pytest.mark.parametrize(
    "activation",
    [None, F.relu, nn.ReLU(inplace=True), nn.ReLU6(), nn.LeakyReLU(0.2), nn.Hardswish(inplace=True), F.gelu],
)
def test_strength_is_the_largest_magnitude_behind_the_activation(activation):
    """Fails when a shortcut is taken for an activation that falls somewhere, or the layer's own output is changed."""
    out = 8 * torch.randn(3, 5, 4, 4, generator=torch.Generator().manual_seed(0))
    before = out.clone()
    seen = out.clone() if activation is None else activation(out.clone())
    assert torch.equal(filter_strengths(out, activation), F.max_pool2d(seen.abs(), 4).flatten(1))
    assert torch.equal(out, before)


def test_half_precision_that_overflows():
    """Fails when inf / inf keeps every filter: one filter that has overflowed holds the whole mass."""
    out = torch.ones(1, 3, 2, 2, dtype=torch.float16)
    out[0, 1] = math.inf
    strengths = filter_strengths(out)
    assert strengths.dtype == torch.float32
    assert mass_mask(strengths, 0.9).tolist() == [[False, True, False]]
    out[0, 2] = math.inf
    assert mass_mask(filter_strengths(out), 1.0).tolist() == [[False, True, True]]


def test_loss_of_ignorant_predictors():
    """Fails when filters are averaged, or layers summed: ln 2 for each filter, mean over the layers."""
    logits = [torch.zeros(5, 3, dtype=torch.float64), torch.zeros(5, 8, dtype=torch.float64)]
    wanted = [torch.rand(z.shape) > 0.5 for z in logits]
    assert float(mask_loss(logits, wanted)) == pytest.approx(math.log(2) * (3 + 8) / 2, rel=1e-12)
    assert not predicted_mask(logits[0]).any()  # exactly one half is off


def test_loss_against_its_definition():
    """Fails for another order of means and sums; the second time with layers that see other numbers of images."""
    draws = torch.Generator().manual_seed(0)
    for rows in ((4, 4, 4), (4, 8, 2)):
        logits = [torch.randn(b, 5, generator=draws, dtype=torch.float64) for b in rows]
        wanted = [torch.rand(b, 5, generator=draws) > 0.4 for b in rows]
        total = 0.0
        for z, g in zip(logits, wanted):
            p = z.sigmoid()
            total += float(-torch.where(g, p.log(), (1 - p).log()).sum() / len(z))
        assert float(mask_loss(logits, wanted)) == pytest.approx(total / 3, rel=1e-12)


def test_no_image_no_loss():
    """Fails with 0 / 0 in a process whose part of a batch is empty."""
    assert float(mask_loss([torch.zeros(0, 3)], [torch.zeros(0, 3)])) == 0.0


def test_agreement():
    """Fails when layers of different widths are weighed by their filters."""
    kept = [torch.tensor([[True, False]]), torch.tensor([[True, True, True, False]])]
    wanted = [torch.tensor([[True, True]]), torch.tensor([[True, True, True, False]])]
    assert float(mask_agreement(kept, wanted)) == 0.75
