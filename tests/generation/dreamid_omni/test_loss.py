"""Masked flow matching."""

import torch

from regularized.generation.dreamid_omni import (
    Conditions,
    OmniBatch,
    SymmetricConditionalDiT,
    TalkingGlyphs,
    draw_sigma,
    drop_conditions,
    joint_flow_matching_loss,
    masked_velocity_error,
    noised,
)

WORLD = TalkingGlyphs()


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_masks():
    """Fails when the mask is turned round, the mean is over what is left, or references are in the loss."""
    said, clean, noise = draw(2, 11, 6), draw(2, 8, 6, seed=1), draw(2, 8, 6, seed=2)
    plain = (noise - clean - said[:, :8]).square()
    assert torch.equal(masked_velocity_error(said, clean, noise), plain.mean())
    assert torch.equal(masked_velocity_error(said, clean, noise, torch.zeros(2, 8, 1)), plain.mean())
    assert masked_velocity_error(said, clean, noise, torch.ones(2, 8, 1)) == 0
    mask = torch.zeros(2, 8, 1)
    mask[:, 2:5] = 1
    half = masked_velocity_error(said, clean, noise, mask)
    assert torch.allclose(half, plain[:, [0, 1, 5, 6, 7]].sum() / plain.numel())


def test_gradient_flows_outside_the_mask_only():
    """Fails when the mask weighs the value and not the gradient, or references get a gradient from the loss."""
    said = draw(1, 3, 6, 4, 8).requires_grad_()
    clean, noise, mask = draw(1, 3, 4, 4, 8, seed=1), draw(1, 3, 4, 4, 8, seed=2), torch.zeros(1, 1, 4, 1, 8)
    mask[..., 1, :, :4] = 1
    masked_velocity_error(said, clean, noise, mask).backward()
    assert not said.grad[:, :, 4:].any()
    assert not said.grad[:, :, 1, :, :4].any()
    assert said.grad[:, :, 1, :, 4:].all()
    assert said.grad[:, :, 0].all()


def test_velocity():
    """z_s + (0 - s) v is z: from any noise the velocity leads back. Fails when it is the noise, or has another sign."""
    clean, noise, sigma = draw(3, 8, 6), draw(3, 8, 6, seed=1), torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    at = noised(clean, noise, sigma)
    assert torch.allclose(at - sigma.view(-1, 1, 1) * (noise - clean), clean)
    assert masked_velocity_error(noise - clean, clean, noise) == 0


def test_a_model_that_says_nothing():
    """Loss of a fresh model: E |e - z|^2 of each stream. Fails when streams are summed instead of averaged."""
    model = SymmetricConditionalDiT(WORLD.config())
    batch = WORLD.sample(64, "r2av", "cross_pair", torch.Generator().manual_seed(0))
    parts = joint_flow_matching_loss(model, batch, weights=(1.0, 3.0), generator=torch.Generator().manual_seed(1))
    for part, z in ((parts.video, batch.video), (parts.audio, batch.audio)):
        assert abs(part.item() - (1 + float(z.square().mean()))) < 0.1
    assert torch.allclose(parts.loss, parts.video + 3 * parts.audio)


def test_both_streams_share_the_time():
    """Fails when the streams are noised by different shares: the model has one time for both."""
    seen = {}

    class Spy(torch.nn.Module):
        config = WORLD.config()

        def forward(self, video, audio, t, given):
            seen.update(video=video, audio=audio, t=t)
            return SymmetricConditionalDiT(WORLD.config())(video, audio, t, given)

    video, audio = torch.full((4, 3, 4, 4, 8), 100.0), torch.full((4, 8, 6), 100.0)
    batch = OmniBatch(video, audio, Conditions(torch.zeros(4, 2, 10)))
    joint_flow_matching_loss(Spy(), batch, generator=torch.Generator().manual_seed(0))
    left = 1 - seen["t"] / 1000
    assert torch.allclose(seen["video"].mean(dim=(1, 2, 3, 4)) / 100, left, atol=0.02)
    assert torch.allclose(seen["audio"].mean(dim=(1, 2)) / 100, left, atol=0.02)
    assert len(left.unique()) == 4


def test_sigma():
    """Fails when the shift is applied to the normal number, or upside down."""
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    plain, shifted = draw_sigma(1000, generator=generators[0]), draw_sigma(1000, shift=5.0, generator=generators[1])
    assert torch.allclose(shifted, 5 * plain / (1 + 4 * plain))
    assert abs(float(plain.median()) - 0.5) < 0.05
    assert abs(float(shifted.median()) - 5 / 6) < 0.05


def test_dropped_conditions():
    """Fails when text and references fall together, structure falls, or what is left out also leaves the sequence."""
    batch = WORLD.sample(400, "rv2av", "cross_pair", torch.Generator().manual_seed(0))
    kept = drop_conditions(batch.given, dropout=0.25, generator=torch.Generator().manual_seed(1))
    text, picture = (x.flatten(1).any(dim=1) for x in (kept.text, kept.pictures))
    voice = kept.voices[0].flatten(1).any(dim=1)
    assert torch.equal(picture, voice)
    assert 0.65 < float(text.double().mean()) < 0.85
    assert 0.4 < float((text & picture).double().mean()) < 0.7
    assert kept.voices[0].shape == batch.given.voices[0].shape
    assert kept.source_video is batch.given.source_video
    assert drop_conditions(batch.given, dropout=0.0) is batch.given
