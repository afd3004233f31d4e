"""The contrast against cross-entropy, its gradient as weighted InfoNCE, its limits, and videos that stay apart."""

import math
import warnings

import pytest
import torch
from torch.nn import functional as F

from regularized.self_supervised.identity_seeking import (
    IdentitySeeking,
    InterFrameContrastive,
    inter_frame_contrast,
    max_weight_matching,
    reliability_loss,
)
from regularized.training.progress import Progress, piecewise


def features(n=6, m=6, d=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(count, d, dtype=torch.float64, generator=generator) for count in (n, m))


def test_without_reliability_it_is_cross_entropy_both_ways():
    """Fails when a denominator runs over the wrong crops, or one direction is missing."""
    a, b = features()
    out = InterFrameContrastive(tau=0.2, q=0.0)(a, b)
    logits = F.normalize(a, dim=1) @ F.normalize(b, dim=1).T / 0.2
    partner = out.pairs[:, 1]
    expected = (F.cross_entropy(logits, partner) + F.cross_entropy(logits.T, partner.argsort())) / 2
    torch.testing.assert_close(out.loss, expected, rtol=1e-12, atol=1e-12)


def test_with_full_reliability_it_is_one_minus_p():
    """Fails when the loss is another member of the family."""
    a, b = features(4, 7)
    out = InterFrameContrastive(q=1.0)(a, b)
    p = inter_frame_contrast(out.similarity, out.pairs).exp()
    torch.testing.assert_close(out.loss, 1.0 - p.mean(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out.reliability, p.mean(dim=0))


@pytest.mark.parametrize("q", [1e-6, 0.3, 1.0])
def test_gradient_is_infonce_times_reliability(q):
    """Fails when an unreliable pair is weighted by anything but its own P^q."""
    log_p = torch.tensor([-0.1, -1.0, -8.0], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(reliability_loss(log_p, q).sum(), log_p)
    torch.testing.assert_close(gradient, -(q * log_p.detach()).exp(), rtol=1e-10, atol=1e-10)


def test_weights_of_ones_own_are_the_same_thing():
    """Fails when P^q given as a function of one's own has another gradient, or lets a gradient through the weights."""
    gradients = []
    for contrast in (
        InterFrameContrastive(q=0.5),
        InterFrameContrastive(reliability=lambda similarity, probability, pairs: probability**0.5),
    ):
        a, b = features()
        out = contrast(a.requires_grad_(), b.requires_grad_())
        gradients.append(torch.autograd.grad(out.loss, (a, b)))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_wrong_pairs_pull_little():
    """Fails when the least reliable pair pulls hardest, as it does in InfoNCE."""
    log_p = torch.tensor([math.log(0.9), math.log(1e-6)], dtype=torch.float64, requires_grad=True)
    pulls = {}
    for q in (0.0, 1.0):
        (gradient,) = torch.autograd.grad(reliability_loss(log_p, q).sum(), log_p)
        pulls[q] = gradient.abs() * (1 - log_p.exp())  # by the logit of the pair
    assert pulls[0.0][1] > pulls[0.0][0]
    assert pulls[1.0][1] < 1e-5 < pulls[1.0][0]


def test_equal_candidates():
    """Fails when P is not one over the number of candidates."""
    log_p = inter_frame_contrast(torch.zeros(4, 4, dtype=torch.float64), torch.tensor([[1, 2]]))
    torch.testing.assert_close(log_p.exp(), torch.full((2, 1), 0.25, dtype=torch.float64))
    assert reliability_loss(log_p, 1.0).mean().item() == pytest.approx(0.75)
    assert reliability_loss(log_p, 0.0).mean().item() == pytest.approx(math.log(4))
    assert reliability_loss(log_p, 1e-9).mean().item() == pytest.approx(math.log(4), abs=1e-8)


def test_length_of_features_does_not_matter():
    """Fails when features are not normalised."""
    a, b = features()
    contrast = InterFrameContrastive()
    torch.testing.assert_close(contrast(3.0 * a, 0.1 * b).loss, contrast(a, b).loss)


def test_videos_stay_apart():
    """Fails when a crop is matched into another video, or other videos are no negatives."""
    a, b = features(6, 6)
    b[3:] = a[:3]  # the best partners are in the wrong video
    video = torch.tensor([0, 0, 0, 1, 1, 1])
    contrast = InterFrameContrastive(q=0.0)
    out = contrast(a, b, video, video)
    assert video[out.pairs[:, 0]].equal(video[out.pairs[:, 1]])
    assert len(out.pairs) == 6
    for one in (0, 1):
        inside = out.pairs[video[out.pairs[:, 0]] == one]
        alone = max_weight_matching(out.similarity[video == one][:, video == one])
        assert inside.equal(alone + 3 * one)
    assert out.loss > contrast(a[:3], b[:3]).loss  # three more negatives, equal to the anchors


def test_order_of_a_batch_does_not_matter():
    """Fails when positions, and not videos, decide who is matched."""
    a, b = features(6, 6)
    video, order = torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([4, 2, 0, 5, 1, 3])
    contrast = InterFrameContrastive()
    expected = contrast(a, b, video, video).loss
    torch.testing.assert_close(contrast(a[order], b, video[order], video).loss, expected)


def test_a_video_with_one_frame_is_counted_and_not_matched():
    """Fails when it stops the batch, or its crops become anchors."""
    a, b = features(4, 3)
    contrast = InterFrameContrastive()
    out = contrast(a, b, torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 2]))
    assert out.skipped == contrast.skipped == 2
    assert out.pairs[:, 0].tolist() == [0, 1]
    assert out.similarity.shape == (4, 3)


def test_nothing_to_match_is_zero_with_a_graph():
    """Fails when a batch without pairs ends a training."""
    a, b = features(2, 2)
    with pytest.warns(UserWarning, match="no video has crops in both frames"):
        out = InterFrameContrastive()(a.requires_grad_(), b, torch.zeros(2), torch.ones(2))
    out.loss.backward()
    assert out.loss == 0
    assert not a.grad.any()


def test_one_crop_is_certain():
    """Fails when there is a negative where there is none."""
    with pytest.warns(UserWarning, match="no negative"):
        assert InterFrameContrastive()(*features(1, 1)).loss.item() == pytest.approx(0.0, abs=1e-12)


def test_normalized_weights_keep_the_step():
    """Fails when unsure pairs make the loss small where it was asked not to: the mean weight is divided out."""
    a, b = features()
    plain, normalized = (InterFrameContrastive(normalize_weights=on)(a, b) for on in (False, True))
    p = inter_frame_contrast(plain.similarity, plain.pairs).exp()
    torch.testing.assert_close(normalized.loss, plain.loss / p.mean())


def test_pretext_follows_its_schedule():
    """Fails when the warm-up has no effect, or never ends."""
    torch.manual_seed(0)
    pretext = IdentitySeeking(torch.nn.Linear(5, 4).double(), q=piecewise({0.5: 1.0}, initial=0.0))
    batch = dict(zip(("first", "second"), features(), strict=True))
    first, second = (pretext.encoder(batch[name]) for name in ("first", "second"))
    for step, q in ((0, 0.0), (9, 1.0)):
        expected = InterFrameContrastive(q=q)(first, second).loss
        torch.testing.assert_close(pretext(batch, Progress(step, 10)).loss, expected)


def test_no_needless_warning():
    """Fails when an ordinary batch warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        InterFrameContrastive()(*features())
