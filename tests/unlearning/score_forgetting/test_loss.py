"""The two losses, the schedule, and what a network's answer means."""

import pytest
import torch
from tests.unlearning.score_forgetting.teachers import SCHEDULE, gaussians, small_teacher
from torch import nn

from regularized.unlearning.score_forgetting import (
    ConditionalDiffusion,
    NoiseSchedule,
    OneStepGenerator,
    eps_matching_loss,
    sid_generator_loss,
)


def _three(seed=0, shape=(4, 2, 3)):
    draws = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=draws, dtype=torch.float64) for _ in range(3)]


def test_levels_of_the_linear_schedule():
    """Fails when betas are spaced otherwise, or steps are counted from one."""
    a = SCHEDULE.alphas_cumprod
    assert float(a[440].sqrt()) == pytest.approx(0.371093, abs=1e-6)
    assert float((1 - a[440]).sqrt()) == pytest.approx(0.928596, abs=1e-6)
    assert float((1 / a[440] - 1).sqrt()) == pytest.approx(2.502326, abs=1e-6)
    assert float((1 / a[38] - 1).sqrt()) == pytest.approx(0.1373, abs=1e-4)
    assert float((1 / a[711] - 1).sqrt()) < 13.107 < float((1 / a[713] - 1).sqrt())


def test_noise_is_exact_in_single_precision():
    """Fails when 1 - a is a difference of single-precision numbers."""
    level = SCHEDULE.levels(torch.tensor([0]), torch.zeros(1, 1))[1]
    assert float(level) == pytest.approx(1e-4**0.5, rel=1e-6)


def test_eps_matching_sums_over_a_sample():
    """Fails when it averages over entries, or over the batch."""
    predicted, noise, _ = _three()
    expected = torch.stack([(p - e).pow(2).sum() for p, e in zip(predicted, noise)])
    torch.testing.assert_close(eps_matching_loss(predicted, noise), expected)


def test_generator_loss_by_a_loop():
    """Fails on a wrong sign, a scale of the whole batch, or a gradient through the scale."""
    p, s, x = _three()
    x.requires_grad_()
    losses = sid_generator_loss(p, s, x, alpha=1.2)
    by_hand = []
    for one_p, one_s, one_x in zip(p, s, x):
        w = float((one_p - one_x).detach().abs().mean())
        by_hand.append(((one_p - one_s) * ((one_p - one_x) - 1.2 * (one_p - one_s))).sum() / w)
    torch.testing.assert_close(losses, torch.stack(by_hand))
    gradient, expected = torch.autograd.grad(losses.sum(), x)[0], torch.autograd.grad(sum(by_hand), x)[0]
    torch.testing.assert_close(gradient, expected)


def test_generator_loss_scales():
    """Fails when the scale is left out (k^2), or taken twice: samples k times as large give k times the loss."""
    p, s, x = _three(1)
    torch.testing.assert_close(sid_generator_loss(3 * p, 3 * s, 3 * x), 3 * sid_generator_loss(p, s, x))


def test_with_alpha_one_it_is_the_other_form():
    """Fails when alpha belongs to the other factor: (p - s)(s - x) / w."""
    p, s, x = _three(2)
    w = (p - x).abs().flatten(1).mean(dim=1)
    torch.testing.assert_close(sid_generator_loss(p, s, x, alpha=1.0), ((p - s) * (s - x)).flatten(1).sum(dim=1) / w)


def test_scale_has_a_floor():
    """Fails when a sample that the teacher leaves as it is divides by zero."""
    x = torch.zeros(1, 3)
    assert bool(sid_generator_loss(x, x + 1.0, x).isfinite().all())


def test_half_precision_is_summed_in_single():
    """Fails when the sum of many products is one of half precision."""
    p, s, x = (part.half() for part in _three(3, (2, 4000)))
    losses = sid_generator_loss(p, s, x)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, sid_generator_loss(p.double(), s.double(), x.double()).float())


def test_equal_scores_give_nothing():
    """Fails when anything but the difference of the two scores drives the generator: neither loss nor gradient."""
    teacher = small_teacher()
    x0 = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    t, labels = torch.randint(38, 712, (6,)), torch.randint(3, (6,))
    x_t = teacher.schedule.add_noise(x0, torch.randn_like(x0), t)
    loss = sid_generator_loss(teacher.denoised(x_t, t, labels), teacher.denoised(x_t, t, labels), x0).sum()
    assert loss.item() == 0.0
    assert float(torch.autograd.grad(loss, x0)[0].abs().max()) < 1e-12


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_predictions_say_the_same(prediction):
    """Fails on a wrong sign or level in one of the conversions: what was added and what is beneath come out again."""
    x0, noise, _ = _three(4, (5, 3))
    t = torch.tensor([0, 100, 440, 711, 999])
    signal, level = SCHEDULE.levels(t, x0)
    output = {"eps": noise, "x0": x0, "v": signal * noise - level * x0}[prediction]
    x_t = SCHEDULE.add_noise(x0, noise, t)
    torch.testing.assert_close(SCHEDULE.denoised(x_t, output, t, prediction), x0, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(SCHEDULE.noise_in(x_t, output, t, prediction), noise, rtol=1e-9, atol=1e-9)


def test_schedule_of_another_library():
    """Fails when given products are taken for betas."""
    betas = torch.linspace(1e-4, 0.02, 50, dtype=torch.float64)
    torch.testing.assert_close(
        NoiseSchedule((1 - betas).cumprod(0)).alphas_cumprod, NoiseSchedule.linear(50).alphas_cumprod
    )


def test_one_step_of_a_network_that_sees_no_noise():
    """Fails when the input is not scaled to its step: x_in / sqrt(a)."""

    class Nothing(nn.Module):
        def forward(self, x_t, t, labels):
            assert t.dtype == torch.float32
            assert t.tolist() == [440.0] * len(t)
            return torch.zeros_like(x_t)

    generator = OneStepGenerator(ConditionalDiffusion(Nothing(), shape=(2,), num_classes=1))
    noise = torch.randn(3, 2, dtype=torch.float64)
    a = SCHEDULE.alphas_cumprod[440]
    torch.testing.assert_close(generator(noise, torch.zeros(3, dtype=torch.long)), noise * (1 - a).sqrt() / a.sqrt())


def test_many_steps_sample_the_distribution():
    """Fails when DDIM uses the levels of the wrong step, or answers for the wrong label."""
    teacher = gaussians()
    labels = torch.arange(3).repeat_interleave(2000)
    samples = teacher.sample(labels, steps=100, generator=torch.Generator().manual_seed(0)).view(3, -1)
    torch.testing.assert_close(samples.mean(dim=1), torch.tensor([-1.0, 0.5, 2.0]).double(), rtol=0, atol=0.04)
    torch.testing.assert_close(samples.std(dim=1), torch.tensor([0.5, 0.3, 0.4]).double(), rtol=0, atol=0.04)


def test_the_teachers_own_loss_is_least_at_the_truth():
    """Fails when the training loss mixes up noise and sample: the exact network beats one that is off."""
    torch.manual_seed(0)
    labels = torch.randint(3, (4000,))
    x0 = torch.tensor([-1.0, 0.5, 2.0]).double()[labels, None] + torch.tensor([0.5, 0.3, 0.4]).double()[
        labels, None
    ] * torch.randn(4000, 1, dtype=torch.float64)
    losses = [
        float(teacher.loss(x0, labels, generator=torch.Generator().manual_seed(1)).mean())
        for teacher in (gaussians(), gaussians(means=(-0.5, 0.5, 2.0)), gaussians(deviations=(0.5, 0.6, 0.4)))
    ]
    assert losses[0] < min(losses[1:])
