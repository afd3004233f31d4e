"""Selfie. Golden vectors, contract and bad input are checked in tests/test_contract.py."""

import copy
import math
import warnings
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from regularized.mechanisms.patches import Split, patch_vectors, random_split, take
from regularized.papers.selfie.contract import small_selfie, small_trunk
from regularized.self_supervised.pretraining import Pretraining
from regularized.self_supervised.selfie import (
    AttentionPool,
    GridPositions,
    Selfie,
    load_trunk,
    selection_accuracy,
    selection_logits,
    selection_loss,
)
from regularized.training.data import TensorData


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def images(count=5, seed=0):
    return torch.randn(count, 2, 12, 16, generator=seeded(seed))


def double_selfie():
    torch.manual_seed(0)
    return small_selfie().double().eval()


# -- the loss -----------------------------------------------------------------------------------


def test_known_values_of_the_loss():
    """Fails when the logits are scaled, or the right answer is not on the diagonal."""
    h = torch.randn(3, 5, 4, dtype=torch.float64, generator=seeded())
    nothing = selection_logits(torch.zeros(3, 4).double(), torch.zeros_like(h), h)
    assert float(selection_loss(nothing)) == pytest.approx(math.log(5), abs=1e-15)
    own = torch.eye(4, dtype=torch.float64).expand(2, 4, 4)
    surely = selection_logits(torch.zeros(2, 4).double(), 30 * own, 30 * own)
    assert float(selection_loss(surely)) < 1e-12
    assert float(selection_accuracy(surely)) == 1.0
    assert float(selection_accuracy(surely.flip(2))) == 0.0


def test_one_candidate_has_nothing_to_say():
    """Fails when the loss of one answer is not 0, with gradient 0."""
    h = torch.randn(3, 1, 4, requires_grad=True)
    loss = selection_loss(selection_logits(torch.randn(3, 4), torch.randn(3, 1, 4), h))
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert float(h.grad.abs().max()) == 0.0


def test_it_is_the_cross_entropy_of_each_hole():
    """Fails when holes and patches change places: then a hole is chosen for each patch."""
    summary, places, h = (torch.randn(*s, generator=seeded(i)) for i, s in enumerate([(3, 4), (3, 5, 4), (3, 5, 4)]))
    logits = selection_logits(summary, places, h)
    parts = [
        F.cross_entropy(((summary[b] + places[b, t]) @ h[b].T)[None], torch.tensor([t]))
        for b in range(3)
        for t in range(5)
    ]
    torch.testing.assert_close(selection_loss(logits), torch.stack(parts).mean())


def test_symmetries_of_the_loss():
    """Fails when the order of the holes counts, or something is added to the patches that they do not share."""
    summary = torch.randn(3, 4, dtype=torch.float64, generator=seeded())
    places, h = (torch.randn(3, 5, 4, dtype=torch.float64, generator=seeded(i)) for i in (1, 2))
    h.requires_grad_()
    logits = selection_logits(summary, places, h)
    order = torch.tensor([3, 0, 4, 1, 2])
    moved = selection_logits(summary, places[:, order], h[:, order])
    torch.testing.assert_close(moved, logits[:, order][:, :, order], rtol=0, atol=1e-12)
    torch.testing.assert_close(selection_loss(moved), selection_loss(logits), rtol=0, atol=1e-12)
    shared = torch.randn(3, 1, 4, dtype=torch.float64)
    shifted = selection_loss(selection_logits(summary, places, h + shared))
    torch.testing.assert_close(shifted, selection_loss(logits), rtol=0, atol=1e-12)
    (gradient,) = torch.autograd.grad(selection_loss(logits), h)
    torch.testing.assert_close(gradient.sum(dim=1), torch.zeros(3, 4, dtype=torch.float64), rtol=0, atol=1e-15)


# -- the module ---------------------------------------------------------------------------------


def test_the_summary_knows_nothing_of_what_was_cut_out():
    """Fails when a target's pixels, or its place, reach the context."""
    selfie = double_selfie()
    x = images().double().requires_grad_()
    split = random_split(5, 12, 3, generator=seeded())
    features = selfie.features(x)
    context = take(features, split.visible) + selfie.positions.table()[split.visible]
    (gradient,) = torch.autograd.grad(selfie.pool(context)[:, 0].sum(), x)
    seen = patch_vectors(gradient, 4).abs().amax(dim=2)
    assert float(take(seen, split.hidden).max()) == 0.0
    assert float(take(seen, split.visible).min()) > 0.0


def test_the_order_of_the_context_does_not_count_but_its_places_do():
    """Fails when positions are missing in the context, or belong to the order instead of the place."""
    selfie = double_selfie()
    features = selfie.features(images().double())
    split = random_split(5, 12, 3, generator=seeded())
    logits = selfie.logits(features, split)
    order = torch.randperm(9, generator=seeded(1))
    moved = selfie.logits(features, Split(split.visible[:, order], split.hidden))
    torch.testing.assert_close(moved, logits, rtol=0, atol=1e-12)
    exchanged = features.clone()  # two context patches of the first image change places
    a, b = split.visible[0, 0], split.visible[0, 1]
    exchanged[0, a], exchanged[0, b] = features[0, b], features[0, a]
    assert float((selfie.logits(exchanged, split)[0] - logits[0]).abs().max().detach()) > 1e-6
    selfie.context_positions = False
    bag, again = selfie.logits(features, split), selfie.logits(exchanged, split)
    torch.testing.assert_close(again[0], bag[0], rtol=0, atol=1e-12)


def test_each_hole_asks_for_its_own_patch():
    """Fails when the rows of the batch, or question and answer, are paired wrongly (repeat for repeat_interleave)."""
    torch.manual_seed(0)
    selfie = Selfie(nn.Flatten(), dim=16, patch_size=4, grid=(3, 3), num_targets=4, pool=AttentionPool(16, heads=2))
    x = torch.randn(6, 1, 12, 12)
    # With embeddings that are the patches of the first image, it alone is solved.
    nn.init.zeros_(selfie.pool.norm.weight)
    with torch.no_grad():
        selfie.positions.places.copy_(10 * selfie.features(x)[0])
    split = random_split(6, 9, 4, generator=seeded())
    right = selfie.logits(selfie.features(x), split).argmax(dim=2) == torch.arange(4)
    assert bool(right[0].all())
    assert float(right[1:].float().mean()) < 0.7


def test_gradients_reach_questions_and_answers():
    """Fails when anything is detached: trunk by both ways, pool, query and positions."""
    selfie = small_selfie()
    selfie(images()).loss.backward()
    for name, p in selfie.named_parameters():
        assert p.grad is not None, name
        assert float(p.grad.abs().max()) > 0, name


def test_patches_are_small_images_to_the_trunk():
    """Fails when pixels of a patch are mixed: a patch as large as the image must give what the image gives."""
    trunk = small_trunk().eval()
    selfie = Selfie(trunk, dim=8, patch_size=4, grid=(2, 2), num_targets=2, pool=AttentionPool(8, heads=2))
    x = torch.randn(3, 2, 8, 8)
    for place, part in enumerate((x[..., :4, :4], x[..., :4, 4:], x[..., 4:, :4], x[..., 4:, 4:])):
        torch.testing.assert_close(selfie.features(x)[:, place], trunk(part).mean(dim=(2, 3)))


@pytest.mark.parametrize("factored", [False, True])
def test_positions_have_a_vector_for_each_place(factored):
    """Fails when the number of vectors is not that of the paper: 14 for 7 x 7 with rows and columns."""
    positions = GridPositions((7, 7), 6, factored=factored)
    assert sum(p.numel() for p in positions.parameters()) == 6 * (14 if factored else 49)
    assert positions.table().shape == (49, 6)


def test_it_starts_from_the_size_of_the_reimplementation():
    """Fails when a default drifts: 3 layers, 32 heads, 640 inside, a quarter of the patches."""
    selfie = Selfie(nn.Flatten(), dim=64, patch_size=8, grid=(4, 4))
    layer = selfie.pool.layers[0]
    assert selfie.num_targets == 4
    assert len(selfie.pool.layers) == 3
    assert (layer.self_attn.num_heads, layer.linear1.out_features, layer.norm_first) == (32, 640, False)


def test_the_quiz_is_learned():
    """Fails when it stays at chance, as others reported of their attempts: sign, pairing or positions are wrong.

    Each patch shows where it is, and its image's sign.
    """
    torch.manual_seed(0)
    places = torch.randn(12, 2, 4, 4, generator=seeded())
    sign = torch.randint(2, (96, 1, 1, 1, 1), generator=seeded(1)).float() * 2 - 1
    noisy = sign * places + 0.1 * torch.randn(96, 12, 2, 4, 4, generator=seeded(2))
    x = noisy.view(96, 3, 4, 2, 4, 4).permute(0, 3, 1, 4, 2, 5).reshape(96, 2, 12, 16)
    training = Pretraining(small_selfie(), optimizer=partial(torch.optim.AdamW, lr=5e-3))
    records = training.fit(TensorData(x, batch_size=32), epochs=12)
    assert records[-1]["accuracy"] > 0.7
    assert records[0]["accuracy"] < 0.6
    assert sorted(records[0]) == ["accuracy", "loss"]


def test_a_trunk_is_taken_over_bit_for_bit():
    """Fails when statistics of batch normalisation stay behind, or a shared weight would be trained in both."""
    selfie = small_selfie().train()
    selfie(images())
    trunk = small_trunk()
    load_trunk(trunk, selfie.trunk.state_dict())
    classifier = nn.Sequential(trunk, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)).eval()
    x = images()
    assert torch.equal(classifier[0](x), selfie.trunk.eval()(x))
    with torch.no_grad():
        trunk[0].weight.zero_()
    assert float(selfie.trunk[0].weight.detach().abs().max()) > 0


def test_one_image_is_enough_for_batch_normalisation():
    """Fails when a batch of one image has one patch only: there are at least three."""
    assert bool(small_selfie().train()(images(1)).loss.isfinite())


def test_flat_background_is_reported_once():
    """Fails when twins are not seen, are seen where there are none, or the warning comes at every step."""
    flat = images()
    flat[:, :, :8] = 0.0  # two of three rows of patches
    selfie = small_selfie()
    with pytest.warns(UserWarning, match="67% of the patches"):
        selfie(flat)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        selfie(flat)
        small_selfie()(images())
        copy.deepcopy(selfie)(flat)


def test_a_step_in_bfloat16_is_finite():
    """Fails when the parts compute in types that do not fit, or the logits lose their precision."""
    selfie = small_selfie()
    with torch.autocast("cpu", torch.bfloat16):
        quiz = selfie(images())
    quiz.loss.backward()
    assert quiz.loss.dtype == torch.float32
    assert all(bool(p.grad.isfinite().all()) for p in selfie.parameters())
