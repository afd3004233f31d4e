"""The GAN step, and the procedure of stages: equivalences, state, Fisher information, feedback."""

import copy
import itertools

import pytest
import torch
from torch import nn

from regularized.training.progress import Progress
from regularized.training.randomness import preserved
from regularized.training.step import Batch
from regularized.unlearning.adapt_unlearn import (
    GAN,
    AdaptThenUnlearn,
    Feedback,
    GANSettings,
    Repulsion,
    adapt_then_unlearn,
    collect_feedback,
    generator_fisher,
    gradient_penalty,
    sample,
)
from regularized.unlearning.adapt_unlearn.gan import Steps


def pair(seed=0):
    torch.manual_seed(seed)
    generator = nn.Sequential(nn.Linear(2, 8), nn.LeakyReLU(0.2), nn.Linear(8, 2))
    return generator, nn.Sequential(nn.Linear(2, 8), nn.LeakyReLU(0.2), nn.Linear(8, 1))


def feedback():
    generator = torch.Generator().manual_seed(5)
    samples = torch.randn(90, 2, generator=generator)
    return Feedback(samples[:60], samples[60:] + 3.0)


SETTINGS = GANSettings(r1_every=3)


def procedure(seed=0, *, anchor=1.0, settings=SETTINGS, **options):
    steps = {"adaptations": 2, "adapt_steps": 6, "unlearn_steps": 7, "batch_size": 8} | options
    generator, discriminator = pair(seed)
    return AdaptThenUnlearn(generator, discriminator, feedback(), latents=2, anchor=anchor, settings=settings, **steps)


def equal(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


# -- the GAN step -------------------------------------------------------------------------------


def test_step_is_two_plain_updates():
    """Fails with wrong losses, a penalty at the wrong step or without its factor, or a discriminator trained twice."""
    torch.manual_seed(3)
    generator, discriminator = pair()
    sgd = lambda parameters: torch.optim.SGD(parameters, lr=0.1)  # noqa: E731
    gan = GAN(*copy.deepcopy((generator, discriminator)), latents=2, settings=GANSettings(sgd, sgd, r1=4.0, r1_every=2))
    optimizers = sgd(generator.parameters()), sgd(discriminator.parameters())
    for number in range(3):
        real = torch.randn(5, 2)
        with preserved():
            gan.training_step(Batch(real), progress=Progress(number, 3))
        fake = generator(torch.randn(5, 2)).detach()
        x = real.clone().requires_grad_()
        scores = discriminator(x)
        loss = -torch.log(torch.sigmoid(scores)).mean() - torch.log(1 - torch.sigmoid(discriminator(fake))).mean()
        if number % 2 == 0:
            (slope,) = torch.autograd.grad(scores.sum(), x, create_graph=True)
            loss = loss + 4.0 / 2.0 * 2.0 * slope.norm(dim=1).square().mean()
        optimizers[1].zero_grad()
        loss.backward()
        optimizers[1].step()
        optimizers[0].zero_grad()
        (-torch.log(torch.sigmoid(discriminator(generator(torch.randn(5, 2)))))).mean().backward()
        optimizers[0].step()
    for ours, plain in ((gan.generator, generator), (gan.discriminator, discriminator)):
        for one, other in zip(ours.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_average_follows():
    """Fails when the average is of another network, or its decay is that of the model."""
    generator, discriminator = pair()
    start = generator[0].weight.detach().clone()
    gan = GAN(generator, discriminator, latents=2, settings=GANSettings(ema_decay=0.75))
    gan.training_step(Batch(torch.randn(4, 2)), progress=Progress(0, 1))
    expected = 0.75 * start + 0.25 * generator[0].weight.detach()
    torch.testing.assert_close(gan.ema.module[0].weight, expected)


def test_generator_has_terms_of_its_own():
    """Fails when a penalty of the generator is not asked, or reaches the discriminator."""
    pull = GANSettings(generator_penalty=lambda g, p: 10.0 * g[0].weight.square().sum() if p.step % 2 == 0 else None)
    gans = [GAN(*pair(), latents=2, settings=settings, seed=1) for settings in (GANSettings(), pull)]
    data = torch.randn(20, 2)
    for gan in gans:
        gan.fit(data, steps=1)
    assert not torch.equal(gans[0].generator[0].weight, gans[1].generator[0].weight)
    assert equal(gans[0].discriminator, gans[1].discriminator)


def test_gradient_penalty_of_a_batch_is_a_mean():
    """Fails when the norm is not squared, or summed over the batch."""
    x = torch.randn(6, 3, requires_grad=True)
    w = torch.tensor([1.0, -2.0, 0.5])
    torch.testing.assert_close(gradient_penalty(x @ w, x), w.square().sum())


def test_batches_follow_orders():
    """Fails when a start in the middle gives other batches, or samples are drawn unevenly."""
    source = Steps(torch.arange(7), steps=10, batch_size=3, seed=4)
    whole = [batch.inputs.tolist() for batch in source.batches(0)]
    assert whole[4:] == [batch.inputs.tolist() for batch in source.batches(0, start=4)]
    counts = torch.bincount(torch.tensor(list(itertools.chain(*whole))), minlength=7)
    assert set(counts.tolist()) <= {4, 5}
    small = next(Steps(torch.arange(2), steps=1, batch_size=5, seed=0).batches(0)).inputs
    assert small.shape == (5,)


def test_gan_goes_on_from_a_state():
    """Fails when an optimizer, the average or the position is not saved."""
    data = torch.randn(40, 2)
    whole, part = (GAN(*pair(), latents=2, settings=SETTINGS, seed=2) for _ in range(2))
    whole.fit(data, steps=4)
    part.load_state_dict(copy.deepcopy(whole.state_dict()))
    for gan in (whole, part):
        gan.fit(data, steps=4)
    assert equal(whole.generator, part.generator)
    assert equal(whole.ema, part.ema)


# -- stages -------------------------------------------------------------------------------------


def without_pull(work):
    """The same procedure, whose steps are plain GAN steps."""
    work.gan.training_step = lambda batch, *, progress, **_: GAN.training_step(work.gan, batch, progress=progress)
    return work


def test_weight_zero_is_plain_fine_tuning_on_the_positives():
    """Fails when a weight of 0 leaves a trace in stage 2: it equals plain steps on the same batches, bit for bit."""
    work, plain = procedure(repulsion=Repulsion(weight=0.0)), procedure(repulsion=Repulsion(weight=1.0))
    work.fit()
    plain.fit(until=2)
    without_pull(plain).fit()
    assert equal(work.gan.generator, plain.gan.generator)
    assert equal(work.gan.discriminator, plain.gan.discriminator)
    repelled = procedure(repulsion=Repulsion(weight=1.0))
    repelled.fit()
    assert not equal(work.gan.generator, repelled.gan.generator)


def test_anchor_zero_is_plain_adaptation():
    """Fails when an anchor of 0 leaves a trace in stage 1."""
    work, plain = procedure(anchor=0.0), without_pull(procedure(anchor=5.0))
    for one in (work, plain):
        one.fit(until=1)
    assert equal(work.gan.generator, plain.gan.generator)


def test_huge_anchor_holds_the_generator():
    """Fails when the generator is held elsewhere, or not at all, while the discriminator adapts."""
    sgd = lambda parameters: torch.optim.SGD(parameters, lr=1e-6)  # noqa: E731
    settings = GANSettings(sgd, lambda p: torch.optim.SGD(p, lr=0.1), r1_every=3)
    work, start = procedure(anchor=1e5, settings=settings), pair()
    work.fit(until=1)
    for p, q in zip(work.gan.generator.parameters(), start[0].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0.0, atol=1e-4)
    assert not equal(work.gan.discriminator, start[1])


def test_each_stage_starts_from_the_pretrained_networks():
    """Fails when a stage goes on from the one before, or keeps its optimizers or average."""
    work, seen = procedure(), {}

    def look(batch, *, progress, **options):
        if progress.step == 0:
            optimizers = [len(optimizer.state) for optimizer in work.gan.optimizers]
            seen[work.stage] = (copy.deepcopy(work.gan), copy.deepcopy(work.gan.ema.module), optimizers)
        return GAN.training_step(work.gan, batch, progress=progress, **options)

    work.gan.training_step = look
    work.fit()
    assert sorted(seen) == [0, 1, 2]
    for gan, average, optimizers in seen.values():
        assert equal(gan.generator, pair()[0])
        assert equal(gan.discriminator, pair()[1])
        assert equal(average, pair()[0])
        assert optimizers == [0, 0]


def test_adaptations_see_parts_of_the_negatives():
    """Fails when adaptation trains on positives, on all negatives, or each time on the same part."""
    parts = {0: set(), 1: set(), 2: set()}
    work = procedure(adapt_steps=20, unlearn_steps=20)

    def spy(batch, *, progress, **options):
        parts[work.stage] |= set(map(tuple, batch.inputs.detach().tolist()))
        return GAN.training_step(work.gan, batch, progress=progress, **options)

    work.gan.training_step = spy
    work.fit()
    negatives, positives = (set(map(tuple, part.tolist())) for part in (feedback().negatives, feedback().positives))
    assert parts[0] < negatives
    assert parts[1] < negatives
    assert parts[0] != parts[1]
    assert len(parts[0]) == len(parts[1]) == 18  # 0.6 of 30
    assert parts[2] == positives


def test_references_are_the_averaged_generators():
    """Fails when the raw generator, the discriminator or the wrong number of copies is repelled from."""
    work, averages = procedure(), []
    for stage in (1, 2):
        work.fit(until=stage)
        averages.append([p.detach().clone() for p in work.gan.ema.module.parameters()])
    work.fit()
    means = [(a + b) / 2.0 for a, b in zip(*averages, strict=True)]
    for name, mean in zip(work.repulsion.names, means, strict=True):
        torch.testing.assert_close(work.repulsion.get_buffer(f"mean:{name.replace('.', '/')}"), mean)
    start = pair()[0]
    expected = sum(
        sum((p - r).square().sum() for p, r in zip(start.parameters(), average, strict=True)) for average in averages
    )
    torch.testing.assert_close(1.0 / work.repulsion.scales[0], expected.detach() / 2.0, rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("stop", [(0, 3), (1, 6), (2, 4), (2, 7)])
def test_goes_on_in_the_middle_of_a_stage(stop, tmp_path):
    """Fails when networks, optimizers, average, references, scale or position are lost with an interrupted stage."""

    class Stop(Exception):
        pass

    def guard(work):
        if (work.stage, work.gan.optimizers.steps[0]) == stop:
            raise Stop

    whole, part = procedure(), procedure()
    whole.fit()
    with pytest.raises(Stop):
        part.fit(after_step=guard)
    torch.save(part.state_dict(), tmp_path / "state.pt")
    torch.manual_seed(99)
    resumed = procedure(seed=7)  # other weights: all of them come from the state
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for work in (part, resumed):
        torch.rand(3)
        work.fit()
        assert equal(work.gan.generator, whole.gan.generator)
        assert equal(work.gan.ema, whole.gan.ema)
        assert equal(work.repulsion, whole.repulsion)


def test_one_call():
    """Fails when the returned generator is the raw one, in training mode, or options do not arrive."""
    generator, discriminator = pair()
    options = {"adaptations": 1, "adapt_steps": 2, "unlearn_steps": 2}
    clean = adapt_then_unlearn(
        generator, discriminator, lambda x: x[:, 0] > 0.0, latents=2, anchor=1.0, samples=64, **options
    )
    assert not clean.training
    assert not any(p.requires_grad for p in clean.parameters())
    assert not equal(clean, generator)


# -- Fisher information and feedback ------------------------------------------------------------


def test_fisher_is_a_mean_of_squares():
    """Fails when gradients are averaged before they are squared, or summed over latents; parts can be left out."""
    generator, discriminator = (net.double() for net in pair())
    z = torch.randn(5, 2, dtype=torch.float64)
    found = generator_fisher(generator, discriminator, z, which=lambda name: name.startswith("2"))
    assert set(found) == {"2.weight", "2.bias"}
    expected = torch.zeros(2, dtype=torch.float64)
    for latent in z:
        x = generator(latent).detach().requires_grad_()
        expected += torch.autograd.grad(discriminator(x).sum(), x)[0].square() / 5
    torch.testing.assert_close(found["2.bias"], expected, rtol=1e-12, atol=1e-14)


def test_fisher_leaves_modes_alone():
    """Fails when dropout is on meanwhile, or a mode is not put back; the discriminator stays as it was."""
    generator, discriminator = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)), nn.Linear(2, 1)
    generator[1].eval()
    z = torch.randn(4, 2)
    first, second = (generator_fisher(generator, discriminator, z)["0.weight"] for _ in range(2))
    assert torch.equal(first, second)
    assert generator.training
    assert not generator[1].training
    assert discriminator.weight.grad is None
    assert discriminator.weight.requires_grad


def test_feedback_is_sorted_and_repeatable():
    """Fails when sides are exchanged, samples are lost, or the global generator is touched."""
    generator = pair()[0]
    before = torch.get_rng_state()
    found = collect_feedback(generator, lambda x: x[:, 0] > 0.1, latents=2, samples=101, batch_size=40, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert bool((found.negatives[:, 0] > 0.1).all())
    assert not bool((found.positives[:, 0] > 0.1).any())
    assert len(found.positives) + len(found.negatives) == 101
    made = sample(generator, 2, 101, seed=3, batch_size=40)
    assert torch.equal(made[made[:, 0] > 0.1], found.negatives)
