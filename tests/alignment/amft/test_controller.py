"""The weight between two losses: its gradient on quadratics, its two rules, and the mixture that it leaves behind."""

import pytest
import torch
from torch import nn

from regularized.alignment.amft import MetaWeightController, ScheduledWeight, meta_gradient
from regularized.training.progress import Progress, piecewise


def points(dtype=torch.float64):
    """Weights theta, and the minima a, b, v of three quadratics."""
    generator = torch.Generator().manual_seed(0)
    theta, a, b, v = (torch.randn(6, generator=generator, dtype=dtype) for _ in range(4))
    return nn.Parameter(theta), a, b, v


def quadratic(theta, minimum):
    return 0.5 * (theta - minimum).square().sum()


def measured(theta, a, b, v, **options):
    """g_mu as the controller takes it, and the controller."""
    controller = MetaWeightController(meta_lr=1.0, entropy_lr=0.0, bounds=(0.0, 1.0), normalize="none", **options)
    moved = controller.backward(
        sft=quadratic(theta, a), rl=quadratic(theta, b), params=[theta], val_loss=lambda: quadratic(theta, v), lr=ETA
    )
    return moved.meta.item(), controller


ETA = 0.01


def utility_after(theta, a, b, v, mu, eta):
    """-L_val one step ahead, written out."""
    start = theta.detach()
    ahead = start - eta * ((1.0 - mu) * (start - b) + mu * (start - a))
    return -quadratic(ahead, v).item()


def test_finite_difference():
    """Fails for the sign of the authors' code, a missing learning rate, or theta in place of theta'."""
    theta, a, b, v = points()
    h = 1e-4
    rate = (utility_after(theta, a, b, v, 0.5 + h, ETA) - utility_after(theta, a, b, v, 0.5 - h, ETA)) / (2 * h)
    assert measured(theta, a, b, v)[0] == pytest.approx(rate, abs=1e-9)


def test_present_weights_are_an_approximation():
    """Fails when look_ahead does nothing, or is off by more than the learning rate allows."""
    theta, a, b, v = points()
    exact, near = measured(theta, a, b, v)[0], measured(theta, a, b, v, look_ahead=False)[0]
    assert 0 < abs(near - exact) < 20 * ETA * abs(exact)


def test_weights_are_put_back():
    """Fails when the look-ahead leaves a trace in the weights, also where the held-out loss raises."""
    theta, a, b, v = points()
    before = theta.detach().clone()
    measured(theta, a, b, v)
    assert torch.equal(theta, before)
    controller = MetaWeightController(entropy_lr=0.0)
    with pytest.raises(RuntimeError, match="stop"):
        controller.backward(sft=quadratic(theta, a), rl=quadratic(theta, b), params=[theta], val_loss=stop, lr=0.1)
    assert torch.equal(theta, before)


def stop():
    raise RuntimeError("stop")


@pytest.mark.parametrize("normalize", ["none", "cosine"])
def test_direction(normalize):
    """Fails when mu goes away from the loss that helps: g_RL = 0 and v = a, so dU/dmu = eta |b - a|^2; and swapped."""
    _, a, b, _ = points()
    theta = nn.Parameter(b.clone())
    for first, second, sign in ((a, b, 1.0), (b, a, -1.0)):
        controller = MetaWeightController(entropy_lr=0.0, bounds=(0.0, 1.0), meta_lr=0.1, normalize=normalize)
        moved = controller.backward(
            sft=quadratic(theta, first),
            rl=quadratic(theta, second),
            params=[theta],
            val_loss=lambda: quadratic(theta, a),
            lr=ETA,
        )
        # With "none" the gradient is taken half of eta ahead: (1 - eta / 2) of the vector at theta.
        length = (1.0 - ETA / 2) * ETA * (b - a).square().sum().item()
        size = 0.1 * (1.0 if normalize == "cosine" else length)
        assert moved.meta.item() == pytest.approx(sign * size, rel=1e-9)
        assert controller.mu.item() == pytest.approx(0.5 + sign * size)


def test_equal_gradients():
    """Fails when a weight moves although both losses pull alike, or 0 / 0 becomes NaN."""
    g, val = [torch.ones(3)], [torch.randn(3)]
    for normalize in ("none", "cosine"):
        assert meta_gradient(val, g, g, normalize=normalize).item() == 0.0
    assert meta_gradient([None], g, [None], normalize="cosine").item() == 0.0


def test_missing_gradients_are_zeros():
    """Fails when a parameter that one loss does not reach drops out of the product, or of the lengths."""
    val, sft, rl = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 1.0]), torch.tensor([0.5, 4.0])
    zero = torch.zeros(2)
    for normalize in ("none", "cosine"):
        given = meta_gradient([val, val, None], [sft, None, sft], [None, rl, rl], normalize=normalize)
        filled = meta_gradient([val, val, zero], [sft, zero, sft], [zero, rl, rl], normalize=normalize)
        assert given.item() == pytest.approx(filled.item(), rel=1e-12)
        assert given.item() != 0.0


def test_half_precision_is_summed_in_float32():
    """Fails when the inner product overflows, or loses what is small, in the dtype of the weights."""
    val, sft = torch.full((4000,), 10.0, dtype=torch.float16), torch.full((4000,), 10.0, dtype=torch.float16)
    assert meta_gradient([val], [sft], [None]).item() == pytest.approx(4e5)


def test_entropy_rule():
    """Fails for the direction of the paper's prose: below its target, entropy raises mu, by eta_H times the gap."""
    controller = MetaWeightController(0.5, entropy_lr=0.01)
    controller.set_target_entropy(2.0)
    assert controller.update(entropy=torch.tensor(1.25)).mu.item() == pytest.approx(0.5075, abs=1e-15)
    assert controller.update(entropy=2.75).mu.item() == pytest.approx(0.5, abs=1e-15)
    for entropy, end in ((-1e4, 0.95), (1e4, 0.05)):
        assert controller.update(entropy=entropy).mu.item() == end


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


def losses(net, *, shared=False):
    """L_SFT of both layers and L_RL of the first one, on one forward pass or on two."""
    x = torch.linspace(-1.0, 1.0, 35).view(7, 5)
    hidden = net[:2](x)
    return net[2](hidden).square().mean(), (hidden if shared else net[:2](2.0 * x)).sin().mean()


def held_out(net):
    return lambda: (net(torch.ones(2, 5)) - 1.0).square().mean()


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("meta_lr", [0.3, 0.0])
def test_gradient_of_the_mixture(shared, meta_lr):
    """Fails when a meta step mixes with the old mu, adds to old gradients, or frees a graph that both losses share."""
    net = network()
    for p in net.parameters():
        p.grad = torch.full_like(p, 7.0)
    controller = MetaWeightController(0.4, meta_lr=meta_lr, entropy_lr=0.0)
    sft, rl = losses(net, shared=shared)
    moved = controller.backward(sft=sft, rl=rl, params=net.parameters(), val_loss=held_out(net), lr=0.1)
    mu = controller.mu.item()
    assert (mu != 0.4) == bool(meta_lr)
    sft, rl = losses(net, shared=shared)
    mixed = (1.0 - mu) * rl + mu * sft
    assert moved.loss.item() == pytest.approx(mixed.item(), abs=1e-6)
    for p, wanted in zip(net.parameters(), torch.autograd.grad(mixed, list(net.parameters()))):
        torch.testing.assert_close(p.grad, wanted, atol=1e-6, rtol=1e-6)


def trained(mixer=None, plain=None, steps=45):
    """Weights after some steps of Adam, by a mixer or by a plain loss of L_SFT and L_RL."""
    net = network()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(steps):
        sft, rl = losses(net)
        if mixer is None:
            optimizer.zero_grad()
            plain(sft, rl).backward()
        else:
            mixer.backward(sft=sft, rl=rl, params=net.parameters(), entropy=0.0, val_loss=held_out(net), lr=0.01)
        optimizer.step()
    return list(net.parameters())


@pytest.mark.parametrize(
    ("mixer", "plain"),
    [
        (MetaWeightController(0.3, meta_lr=0.0, entropy_lr=0.0), lambda sft, rl: 0.7 * rl + 0.3 * sft),
        (MetaWeightController(bounds=(1.0, 1.0), entropy_lr=0.0), lambda sft, rl: sft),
        (MetaWeightController(bounds=(0.0, 0.0), entropy_lr=0.0), lambda sft, rl: rl),
        (ScheduledWeight(0.3), lambda sft, rl: 0.7 * rl + 0.3 * sft),
        (ScheduledWeight(1.0), lambda sft, rl: sft),
        (ScheduledWeight(0.0), lambda sft, rl: rl),
    ],
)
def test_switched_off(mixer, plain):
    """Fails when a controller that may not move differs from a fixed weight in the last bit.

    L_RL alone leaves the second layer where it was, also under Adam: its gradient is None, not 0.
    """
    for a, b in zip(trained(mixer), trained(plain=plain)):
        assert torch.equal(a, b)


def test_a_loss_without_weight_takes_no_part():
    """Fails when 0 times infinity, or times NaN, gets into the weights."""
    w = nn.Parameter(torch.tensor(1.0))
    for mixer in (MetaWeightController(bounds=(1.0, 1.0), entropy_lr=0.0), ScheduledWeight(1.0)):
        mixer.backward(sft=2.0 * w, rl=w * torch.inf, params=[w])
        assert w.grad.item() == 2.0
    assert mixer.backward(sft=2.0 * w, rl=None, params=[w]).loss.item() == 2.0


def test_held_out_loss_is_asked_every_k_steps():
    """Fails when it runs more often than `every` says, not on the first step, or is not counted in the state."""
    asked = []
    net = network()

    def val_loss():
        asked.append(controller.steps)
        return held_out(net)()

    def steps(number):
        for _ in range(number):
            sft, rl = losses(net)
            moved = controller.backward(sft=sft, rl=rl, params=net.parameters(), val_loss=val_loss, lr=0.1)
            assert (moved.meta != 0.0) == (asked[-1:] == [controller.steps - 1])

    controller = MetaWeightController(entropy_lr=0.0, every=4)
    steps(6)
    state, controller = controller.state_dict(), MetaWeightController(entropy_lr=0.0, every=4)
    controller.load_state_dict(state)
    steps(4)
    assert asked == [0, 4, 8]


def test_state():
    """Fails when mu, the target or the count is not saved, or the state shares memory with the controller."""
    controller = MetaWeightController(0.5, entropy_lr=0.1)
    controller.set_target_entropy(1.0)
    controller.update(entropy=0.5)
    state = controller.state_dict()
    controller.update(entropy=0.5)
    other = MetaWeightController(0.9, entropy_lr=0.1)
    other.load_state_dict(state)
    assert (other.mu.item(), other.target_entropy) == (pytest.approx(0.55), 1.0)
    assert torch.equal(other.update(entropy=0.5).mu, controller.mu)


def test_schedule():
    """Fails when a schedule is not asked at its position, or says that it needs a loss without weight."""
    weight = ScheduledWeight(piecewise({0.0: 1.0, 0.5: 0.0}))
    assert [weight.needs(Progress(step, 4)) for step in (0, 2)] == [(True, False), (False, True)]
    w = nn.Parameter(torch.tensor(1.0))
    for step, grad in ((0, 3.0), (2, 5.0)):
        weight.backward(sft=3.0 * w, rl=5.0 * w, params=[w], progress=Progress(step, 4))
        assert w.grad.item() == grad
