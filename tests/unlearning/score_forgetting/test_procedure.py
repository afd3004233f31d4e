"""The distillation: a second derivation of its step, what it must leave alone, and where it ends."""

import copy
from functools import partial

import pytest
import torch
from tests.unlearning.score_forgetting.teachers import gaussians, small_teacher

from regularized.training import Progress
from regularized.training.randomness import mix
from regularized.unlearning.score_forgetting import LabelSampler, ScoreForgettingDistillation, prompt_report

ADAM = partial(torch.optim.Adam, lr=0.01, betas=(0.0, 0.999))


def distillation(teacher=None, **settings):
    known = {"forget": 0, "override": 1, "optimizer": ADAM, "decay": 0.9, "forget_weight": 0.5, "forget_share": 0.5}
    return ScoreForgettingDistillation(small_teacher() if teacher is None else teacher, **{**known, **settings})


def weights(sfd):
    parts = {"fake": sfd.fake, "generator": sfd.generator, "average": sfd.average}
    return {f"{part}.{name}": p.detach().clone() for part, net in parts.items() for name, p in net.named_parameters()}


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def _reference(teacher, *, steps, batch, lam, alpha, share, override, through=True):
    """The authors' order: every term by itself, all gradients by autograd, two backward passes for each network."""
    fake, theta = (copy.deepcopy(teacher.network).requires_grad_(True) for _ in range(2))
    optimizers = [ADAM(net.parameters()) for net in (fake, theta)]
    a = teacher.schedule.alphas_cumprod
    average = copy.deepcopy(theta)

    def clean(net, x_t, t, labels):
        at = a[t][:, None]
        return (x_t - (1 - at).sqrt() * net(x_t, t.float(), labels)) / at.sqrt()

    def generate(noise, labels):
        t = torch.full((len(noise),), 440)
        return clean(theta, (1 - a[440]).sqrt() * noise, t, labels)

    for step in range(steps):
        groups = []
        for stream, size in ((0, batch), (1, int(batch * share))):
            draws = torch.Generator().manual_seed(mix(0, step, stream))
            if stream == 0:
                labels = LabelSampler(3, forget=0, override=1).kept(size, draws)
                asked = labels
            else:
                labels, asked = torch.zeros(size, dtype=torch.long), torch.full((size,), override)
            normal = partial(torch.randn, (size, 4), generator=draws, dtype=torch.float64)
            halves = []
            for _ in range(2):
                noise, t = normal(), torch.randint(38, 712, (size,), generator=draws)
                halves.append((noise, t, normal()))
            groups.append((labels, asked, halves))
        optimizers[0].zero_grad()
        for weight, (labels, _, halves) in zip((1.0, lam), groups):
            noise, t, e = halves[0]
            x0 = generate(noise, labels).detach()
            at = a[t][:, None]
            x_t = at.sqrt() * x0 + (1 - at).sqrt() * e
            (weight * (fake(x_t, t.float(), labels) - e).pow(2).sum(dim=1).mean()).backward()
        for p in fake.parameters():
            p.grad.clamp_(-1.0, 1.0)
        optimizers[0].step()
        optimizers[1].zero_grad()
        for weight, (labels, asked, halves) in zip((1.0, lam), groups):
            noise, t, e = halves[1]
            x0 = generate(noise, labels)
            at = a[t][:, None]
            x_t = at.sqrt() * x0 + (1 - at).sqrt() * e
            p, s = clean(teacher.network, x_t, t, asked), clean(fake, x_t, t, labels)
            if not through:
                p, s = p.detach(), s.detach()
            w = (p - x0).abs().mean(dim=1, keepdim=True).detach()
            loss = ((p - s) * ((p - x0) - (alpha if through else 1.0) * (p - s)) / w).sum(dim=1).mean()
            (weight * loss).backward()
        for p in theta.parameters():
            p.grad.clamp_(-1.0, 1.0)
        optimizers[1].step()
        with torch.no_grad():
            for slow, quick in zip(average.parameters(), theta.parameters()):
                slow.mul_(0.9).add_(0.1 * quick)
    return fake, theta, average


@pytest.mark.parametrize(("lam", "share", "through"), [(0.5, 0.5, True), (0.01, 1.0, True), (0.3, 0.25, False)])
def test_second_derivation(lam, share, through):
    """Fails on a wrong label, weight or detach, a missing clip, weights that are stale, or gradients that reach psi."""
    teacher = small_teacher(dropout=0.0)
    expected = _reference(teacher, steps=3, batch=8, lam=lam, alpha=1.3, share=share, override=1, through=through)
    sfd = distillation(teacher, forget_weight=lam, forget_share=share, alpha=1.3, through_networks=through)
    for _ in range(3):
        sfd.step(8)
    for theirs, ours in zip(expected, (sfd.fake, sfd.generator, sfd.average)):
        for p, q in zip(theirs.parameters(), ours.parameters(), strict=True):
            torch.testing.assert_close(q, p, rtol=1e-8, atol=1e-10)


def test_without_weight_it_is_plain_distillation():
    """Fails when forgotten samples are drawn, or change what kept ones draw, where their weight is 0."""
    plain = distillation(forget=None, override=None, frequencies=[0.0, 1.0, 1.0])
    without = distillation(forget_weight=0.0)
    for sfd in (plain, without):
        losses = sfd.fit(steps=3, batch_size=8)
        assert not bool(losses.generator_forgotten)
    assert equal(weights(plain), weights(without))


def test_kept_samples_do_not_see_the_others():
    """Fails when forgetting shifts the random numbers of kept samples: losses before the first update are the same."""
    forgetting, plain = (distillation(small_teacher(0.0), forget_weight=weight).step(8) for weight in (0.5, 0.0))
    assert float(forgetting.fake_kept) == pytest.approx(float(plain.fake_kept), rel=1e-12)


def _gradients(**settings):
    """Gradients of the first updates, of a rate that leaves the weights where they are."""
    sfd = distillation(small_teacher(0.0), clip=None, optimizer=partial(torch.optim.SGD, lr=0.0), **settings)
    sfd.fake.network.first.weight.data += 0.1  # else the kept term is 0
    sfd.step(8)
    return torch.cat([p.grad.flatten() for net in (sfd.fake, sfd.generator) for p in net.parameters()])


def test_the_term_is_added_linearly():
    """Fails when the weight also divides, or scales the kept term."""
    nothing, half, whole = (_gradients(forget_weight=weight) for weight in (0.0, 0.5, 1.0))
    torch.testing.assert_close(half - nothing, 0.5 * (whole - nothing))
    assert bool((whole - nothing).abs().max() > 1e-3)


def test_overridden_by_itself_it_is_the_kept_term_of_that_class():
    """Fails when anything but the teacher's label makes forgetting."""
    forgotten = distillation(small_teacher(0.0), kept_weight=0.0, forget_weight=1.0, forget_share=1.0)
    forgotten.labels.override = 0
    kept = distillation(small_teacher(0.0), forget=None, override=None, frequencies=[1.0, 0.0, 0.0])
    for sfd in (forgotten, kept):
        sfd.fake.network.first.weight.data += 0.1
        rows = sfd._rows(8)
        streams = tuple(torch.Generator().manual_seed(5) for _ in range(2))
        rows = rows._replace(streams=streams)
        sfd.values = sfd._generator_loss(sfd._generated(rows), rows)
    torch.testing.assert_close(forgotten.values, kept.values)


def test_ends_at_the_teachers_gaussians():
    """Fails when the forgotten prompt does not end at the teacher's other class, in mean and width, or others leave."""
    teacher = gaussians()
    sfd = distillation(teacher, optimizer=partial(torch.optim.Adam, lr=0.02, betas=(0.0, 0.999)), decay=0.98)
    sfd.fit(steps=500, batch_size=64)
    labels = torch.arange(3).repeat_interleave(3000)
    samples = sfd.sampler.sample(labels, generator=torch.Generator().manual_seed(0)).view(3, -1)
    torch.testing.assert_close(samples.mean(dim=1), torch.tensor([0.5, 0.5, 2.0]).double(), rtol=0, atol=0.15)
    torch.testing.assert_close(samples.std(dim=1), torch.tensor([0.3, 0.3, 0.4]).double(), rtol=0, atol=0.12)
    report = prompt_report(
        sfd.sampler.sample,
        lambda x: -(x - torch.tensor([[-1.0, 0.5, 2.0]])).abs(),
        num_classes=3,
        forget=0,
        override=1,
        per_class=500,
    )
    assert report.forgotten_class_share < 0.05
    assert report.kept_class_accuracy > 0.9


def test_the_teacher_stays():
    """Fails when a gradient or an update reaches the teacher, or its copies share memory with it."""
    teacher = small_teacher()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    sfd = distillation(teacher)
    start = weights(sfd)
    sfd.fit(steps=2, batch_size=8)
    assert equal(before, teacher.state_dict())
    assert all(p.grad is None for p in teacher.parameters())
    now = weights(sfd)
    assert all(not torch.equal(start[name], now[name]) for name in start)


def test_modes():
    """Fails when psi's dropout is on in the generator's update, or off in its own."""
    sfd, seen = distillation(), []
    sfd.fake.network.register_forward_hook(lambda net, inputs, output: seen.append(("fake", net.training)))
    sfd.generator.diffusion.network.register_forward_hook(
        lambda net, inputs, output: seen.append(("generator", net.training))
    )
    sfd.teacher.network.register_forward_hook(lambda net, inputs, output: seen.append(("teacher", net.training)))
    sfd.step(4)
    assert seen == [
        ("generator", True), ("fake", True), ("generator", True), ("teacher", False), ("fake", False)
    ]  # fmt: skip


def test_one_pass_for_both_groups():
    """Fails when kept and forgotten samples are run one after the other: 8 and a quarter of 8 in one batch."""
    sfd, sizes = distillation(forget_share=0.25), []
    sfd.teacher.network.register_forward_hook(lambda net, inputs, output: sizes.append(len(output)))
    sfd.step(8)
    assert sizes == [10]


def test_override_at_random_is_a_kept_class():
    """Fails when the forgotten class stands in for itself, or the last class is favoured."""
    sampler = LabelSampler(5, forget=2)
    drawn = sampler.stand_in(4000, torch.Generator().manual_seed(0)).bincount(minlength=5)
    assert drawn[2] == 0
    assert bool(((drawn[[0, 1, 3, 4]] - 1000).abs() < 120).all())


def test_frequencies():
    """Fails when given frequencies are not those that are drawn."""
    sampler = LabelSampler(4, forget=0, override=1, frequencies=[9.0, 3.0, 1.0, 0.0])
    drawn = sampler.kept(4000, torch.Generator().manual_seed(0)).bincount(minlength=4)
    assert drawn[[0, 3]].tolist() == [0, 0]
    assert abs(int(drawn[1]) - 3000) < 120


def test_stopped_and_resumed(tmp_path):
    """Fails when anything is missing in the state: dropout, an optimizer's moments, the average, the position."""
    whole = distillation()
    whole.fit(steps=4, batch_size=8)
    half = distillation()
    half.fit(steps=2, batch_size=8)
    torch.save(half.state_dict(), tmp_path / "state.pt")
    torch.manual_seed(99)
    resumed = distillation()
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    resumed.fit(steps=4, batch_size=8)
    assert equal(weights(whole), weights(resumed))


def test_fit_leaves_the_global_generator_alone():
    """Fails when training moves the random numbers of who calls it."""
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    sfd = distillation()
    torch.manual_seed(3)
    sfd.fit(steps=1, batch_size=4)
    assert torch.equal(torch.rand(1), expected)


def test_a_loop_of_ones_own_and_fit_agree():
    """Fails when fit does more than step, where nothing is random but what step draws itself."""
    first, second = (distillation(small_teacher(0.0)) for _ in range(2))
    first.fit(steps=3, batch_size=8)
    for step in range(3):
        second.step(8, progress=Progress(step, 3))
    assert equal(weights(first), weights(second))


def test_schedule_of_the_rates():
    """Fails when the rates stay as they were built."""
    sfd = distillation(schedule=lambda progress: 1.0 - progress.fraction)
    rates = []
    sfd.fit(steps=4, batch_size=4, after_step=lambda sfd, losses: rates.append(sfd.optimizers[1].param_groups[0]["lr"]))
    assert rates == pytest.approx([0.01, 0.0075, 0.005, 0.0025])


def test_two_stages():
    """Fails when the second stage starts from the teacher again, or trains the first one's networks."""
    first = distillation(forget=None, override=None)
    first.fit(steps=2, batch_size=8)
    before = weights(first)
    second = distillation(first.teacher, start=first)
    assert all(torch.equal(before[name], value) for name, value in weights(second).items() if "average" not in name)
    second.fit(steps=1, batch_size=8)
    assert equal(before, weights(first))


def test_sampling_is_in_evaluation_mode():
    """Fails when dropout is on while sampling, or training goes on in evaluation mode afterwards."""
    sfd = distillation()
    sfd.step(4)
    labels = torch.zeros(5, dtype=torch.long)
    one, other = (sfd.generator.sample(labels, generator=torch.Generator().manual_seed(0)) for _ in range(2))
    assert torch.equal(one, other)
    assert sfd.generator.diffusion.network.training


def test_sampler_follows_the_generator():
    """Fails when the sampler is the generator itself, or a copy that nothing moves."""
    sfd = distillation(decay=0.5)
    start = sfd.sampler.diffusion.network.last.bias.clone()
    sfd.step(8)
    quick, slow = (one.diffusion.network.last.bias for one in (sfd.generator, sfd.sampler))
    torch.testing.assert_close(slow, (start + quick) / 2)


def test_report():
    """Fails when prompts and judgements are mixed up, or the forgotten prompt counts among the kept ones."""
    answers = torch.tensor([2, 1, 0])
    report = prompt_report(
        lambda labels: answers[labels],
        lambda x: torch.nn.functional.one_hot(x, 3),
        num_classes=3,
        forget=0,
        override=2,
        per_class=7,
        batch_size=4,
    )
    assert (report.forgotten_class_share, report.override_share, report.kept_class_accuracy) == (0.0, 1.0, 0.5)
    assert "<table" in report._repr_html_()
