"""The noise mask. Golden vectors, contract and bad input are checked in tests/test_contract.py."""

import copy
import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from regularized.overfitting.noise_mask.layer import BetaMaskPolicy, NoiseMask, gaussian_blur
from regularized.overfitting.noise_mask.loss import beta_log_density, noise_mask_objective
from regularized.overfitting.noise_mask.procedure import NoiseMaskPretraining
from regularized.training.data import TensorData


def policy(grid=4, **changes):
    torch.manual_seed(0)
    return BetaMaskPolicy(nn.Sequential(nn.Flatten(), nn.Linear(64, 6)), features=6, grid=grid, **changes)


def images(n=5):
    return torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(1))


@given(seed=st.integers(0, 50), low=st.floats(-2, 2), high=st.floats(-2, 2))
@settings(max_examples=25)
def test_density_is_torchs(seed, low, high):
    """An independent implementation; fails when the two concentrations are swapped or not exponentiated."""
    generator = torch.Generator().manual_seed(seed)
    cells = torch.rand(3, 4, dtype=torch.float64, generator=generator).clamp(1e-6, 1 - 1e-6)
    alpha = torch.full((3, 4), low, dtype=torch.float64)
    beta = torch.full((3, 4), high, dtype=torch.float64)
    expected = torch.distributions.Beta(alpha.exp(), beta.exp()).log_prob(cells)
    torch.testing.assert_close(beta_log_density(cells, alpha, beta), expected, rtol=1e-10, atol=1e-10)


def test_uniform_density_and_its_gradient():
    """Beta(1, 1): log density 0, q = log D, and the closed-form derivative by a (sheet, check 1)."""
    cells = torch.rand(2, 9, dtype=torch.float64)
    alpha = torch.zeros(2, 9, dtype=torch.float64, requires_grad=True)
    beta = torch.zeros(2, 9, dtype=torch.float64, requires_grad=True)
    logs = beta_log_density(cells, alpha, beta)
    assert torch.allclose(logs, torch.zeros_like(logs), atol=1e-12)
    q = torch.logsumexp(logs, dim=1)
    torch.testing.assert_close(q, torch.full_like(q, math.log(9)))
    grad_a, grad_b = torch.autograd.grad(logs.sum(), (alpha, beta))
    one = torch.ones(1, dtype=torch.float64)
    mean = torch.digamma(one) - torch.digamma(2 * one)
    torch.testing.assert_close(grad_a, cells.log() - mean)
    torch.testing.assert_close(grad_b, torch.log1p(-cells) - mean)
    assert torch.autograd.gradcheck(lambda a, b: beta_log_density(cells, a, b), (alpha, beta))


def test_blur_of_a_constant_and_of_a_point():
    """Fails for zero padding (a constant would sink at the border) or a kernel that does not sum to 1."""
    constant = torch.full((2, 1, 9, 9), 0.37, dtype=torch.float64)
    torch.testing.assert_close(gaussian_blur(constant, 5, 2.0), constant)
    point = torch.zeros(1, 1, 9, 9, dtype=torch.float64)
    point[0, 0, 4, 4] = 1.0
    at = torch.arange(-2, 3, dtype=torch.float64)
    line = torch.exp(-0.5 * (at / 1.5) ** 2)
    expected = torch.outer(line, line) / line.sum() ** 2
    torch.testing.assert_close(gaussian_blur(point, 5, 1.5)[0, 0, 2:7, 2:7], expected)
    assert gaussian_blur(point, 1, 1.5) is point


def test_mask_is_enlarged_by_nearest_neighbours_and_shared_by_channels():
    """Fails for bilinear enlargement, a transposed grid, or a mask for each channel."""
    mask = NoiseMask(policy(grid=2), kernel=1)
    cells = torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    big = mask.enlarge(cells, 4)
    assert torch.equal(big[0, 0, 0], torch.tensor([0.1, 0.1, 0.2, 0.2]))
    assert torch.equal(big[0, 0, 3], torch.tensor([0.3, 0.3, 0.4, 0.4]))
    coloured = NoiseMask(BetaMaskPolicy(nn.Sequential(nn.Flatten(), nn.Linear(192, 6)), features=6, grid=8), kernel=3)
    x = torch.rand(5, 3, 8, 8)
    out = coloured(x)
    torch.testing.assert_close(out.images, x * out.mask)
    assert out.mask.shape == (5, 1, 8, 8)


def test_no_gradient_through_the_draw():
    """REINFORCE: fails with `rsample`, where the masked image would depend on the policy."""
    mask = NoiseMask(policy(), kernel=3, sigma=1.0)
    out = mask(images())
    assert not out.images.requires_grad
    assert not out.mask.requires_grad
    assert out.log_density.requires_grad


def test_gradients_of_the_product():
    """The classifier's gradient is mean q times the plain one; the policy's is the loss times that of mean q."""
    mask, net = NoiseMask(policy(), kernel=3, sigma=1.0), nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    x, y = images(), torch.tensor([0, 1, 2, 0, 1])
    out = mask(x)
    ce = F.cross_entropy(net(out.images), y)
    plain = torch.autograd.grad(ce, list(net.parameters()), retain_graph=True)
    of_q = torch.autograd.grad(out.log_density.mean(), list(mask.parameters()), retain_graph=True)
    objective = noise_mask_objective(ce, out.log_density)
    both = torch.autograd.grad(objective, [*net.parameters(), *mask.parameters()], retain_graph=True)
    for ours, theirs in zip(both[:2], plain, strict=True):
        torch.testing.assert_close(ours, float(out.log_density.detach().mean()) * theirs)
    for ours, theirs in zip(both[2:], of_q, strict=True):
        torch.testing.assert_close(ours, float(ce.detach()) * theirs)
    apart = noise_mask_objective(ce, out.log_density, coupled=False)
    separate = torch.autograd.grad(apart, [*net.parameters(), *mask.parameters()])
    for ours, theirs in zip(separate, (*plain, *both[2:]), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_credit_for_each_image():
    """Fails when the batch's mean is used: an image without loss must not move its own policy."""
    density = torch.tensor([2.0, 3.0], requires_grad=True)
    losses = torch.tensor([0.0, 5.0])
    (grad,) = torch.autograd.grad(noise_mask_objective(losses, density, credit="sample"), density)
    assert torch.equal(grad, torch.tensor([0.0, 2.5]))
    (grad,) = torch.autograd.grad(noise_mask_objective(losses, density), density)
    assert torch.equal(grad, torch.tensor([1.25, 1.25]))


def test_score_function_gradient_is_unbiased():
    """10^5 draws of one cell: the mean of loss * d log p agrees with the derivative of the expected loss.

    Fails for a wrong sign, a missing normaliser in the density, or a biased draw.
    """
    torch.manual_seed(0)
    n = 100_000
    alpha = torch.full((n, 1), 0.4, requires_grad=True)
    beta = torch.full((n, 1), -0.2, requires_grad=True)
    cells = torch.distributions.Beta(alpha.detach().exp(), beta.detach().exp()).sample()
    objective = (cells.square() * beta_log_density(cells, alpha, beta)).sum(dim=1)
    (grad,) = torch.autograd.grad(objective.sum(), alpha)

    def expected_square(log_a):
        a, b = math.exp(log_a), math.exp(-0.2)
        return a * (a + 1) / ((a + b) * (a + b + 1))

    exact = (expected_square(0.4 + 1e-5) - expected_square(0.4 - 1e-5)) / 2e-5
    error = float(grad.std()) / math.sqrt(n)
    assert abs(float(grad.mean()) - exact) < 4 * error
    assert error < 0.1 * exact


def test_running_state_is_an_average_of_the_heads():
    """Closed form of the update; with a constant head it converges geometrically at 0.99. No gradient gets in."""
    chosen = policy(seed=3)
    nn.init.zeros_(chosen.alpha_head[-1].weight)
    nn.init.constant_(chosen.alpha_head[-1].bias, 2.0)
    start = chosen.base_alpha.clone()
    for _ in range(3):
        alpha, _ = chosen(images())
    torch.testing.assert_close(chosen.base_alpha, 2.0 + 0.99**3 * (start - 2.0))
    # The concentrations use the state of before the update.
    torch.testing.assert_close(alpha.detach()[0], (0.9 * (2.0 + 0.99**2 * (start - 2.0)) + 0.1 * 2.0)[0])
    assert not chosen.base_alpha.requires_grad
    before = chosen.base_alpha.clone()
    chosen.eval()
    chosen(images())
    assert torch.equal(chosen.base_alpha, before)


def test_twice_is_two_passes_of_the_batch_statistics():
    """Fails if `twice` doubles the momentum instead of applying it two times."""
    once, twice = policy(), policy(twice=True)
    twice.load_state_dict(once.state_dict())
    x = images()
    hidden = once.alpha_head[0](once.backbone(x))
    reference = nn.BatchNorm1d(6)
    reference(hidden)
    reference(hidden)
    twice(x)
    torch.testing.assert_close(twice.alpha_head[1].running_mean, reference.running_mean)
    torch.testing.assert_close(twice.alpha_head[1].running_var, reference.running_var)


def test_evaluation_leaves_images_alone_unless_asked():
    """Fails when a mask stays on in evaluation; asked for, it is one random mask for the whole batch."""
    x = images()
    mask = NoiseMask(policy(), kernel=3, sigma=1.0).eval()
    assert torch.equal(mask(x).images, x)
    asked = NoiseMask(policy(), kernel=3, sigma=1.0, mask_in_evaluation=True).eval()
    out = asked(x)
    assert torch.equal(out.mask[0], out.mask[4])
    assert not torch.equal(out.mask, asked(x).mask)
    torch.testing.assert_close(out.images, x * out.mask)


def pretraining(**changes):
    torch.manual_seed(2)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    sgd = partial(torch.optim.SGD, momentum=0.9)
    return NoiseMaskPretraining(
        net,
        NoiseMask(policy(), kernel=3, sigma=1.0),
        optimizer=partial(sgd, lr=0.05),
        policy_optimizer=partial(sgd, lr=changes.pop("policy_lr", 0.5)),
        **changes,
    )


def test_policy_learns_where_masks_hurt():
    """It bites: only one cell matters, and the policy learns to leave that one open; with the sign turned it closes it.

    Fails for a wrong sign of the policy's gradient.
    """

    def opened(sign):
        torch.manual_seed(0)
        chosen = BetaMaskPolicy(nn.Sequential(nn.Flatten(), nn.Linear(4, 4)), features=4, grid=2, decay=0.0)
        mask = NoiseMask(chosen, kernel=1)
        optimizer = torch.optim.Adam(mask.parameters(), lr=0.02)
        x = torch.ones(64, 1, 2, 2) + 0.1 * torch.randn(64, 1, 2, 2)
        for _ in range(150):
            out = mask(x)
            # A loss with mean zero acts as a baseline; log_density of the one cell is what REINFORCE asks for.
            reward = -out.cells[:, 0]
            alpha, beta = chosen(x)
            logs = beta_log_density(out.cells, alpha, beta)[:, 0]
            optimizer.zero_grad()
            (sign * (reward - reward.mean()) * logs).mean().backward()
            optimizer.step()
        alpha, beta = chosen(x)
        return float((alpha.exp() / (alpha.exp() + beta.exp()))[:, 0].detach().mean())

    assert opened(1.0) > 0.7
    assert opened(-1.0) < 0.3


def test_two_optimizers_two_schedules():
    """Fails when one schedule moves both, or the policy is not trained."""
    both = pretraining(schedule=lambda p: 0.0, policy_schedule=1.0)
    net = {name: value.clone() for name, value in both.classifier.state_dict().items()}
    head = both.noise_mask.policy.alpha_head[-1].weight.detach().clone()
    both.fit([(images(), torch.tensor([0, 1, 2, 0, 1]))], epochs=2)
    assert all(torch.equal(value, net[name]) for name, value in both.classifier.state_dict().items())
    assert not torch.equal(both.noise_mask.policy.alpha_head[-1].weight, head)


def test_after_phase_one_the_classifier_is_plain():
    """Nothing of the policy stays: same names, and the output in evaluation is that of the classifier alone."""
    both = pretraining()
    both.fit([(images(), torch.tensor([0, 1, 2, 0, 1]))], epochs=2)
    alone = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    alone.load_state_dict(both.classifier.state_dict())
    assert torch.equal(alone.eval()(images()), both.classifier.eval()(images()))


def test_resume_in_the_middle_of_an_epoch_is_exact():
    """Fails when the masks of the rest of an epoch, momentum, or the running state are drawn or begun anew."""
    data = TensorData(images(12), torch.arange(12) % 3, batch_size=4)
    whole, first, second = pretraining(), pretraining(), pretraining()
    expected = whole.fit(data, epochs=2)

    def saving(both):
        if both.steps == 2:
            second.load_state_dict(copy.deepcopy(both.state_dict()))

    first.fit(data, epochs=2, after_step=saving)
    assert second.fit(data, epochs=2) == expected
    for ours, theirs in ((second.classifier, whole.classifier), (second.noise_mask, whole.noise_mask)):
        assert all(torch.equal(ours.state_dict()[name], value) for name, value in theirs.state_dict().items())


def test_a_state_of_another_training_is_refused():
    """Fails when a key that is missing is noticed when half of the state is loaded, or not at all."""
    both = pretraining()
    state = both.state_dict()
    with pytest.raises(ValueError, match=r"the state of NoiseMaskPretraining does not fit: missing \['optimizers'\]"):
        both.load_state_dict({name: part for name, part in state.items() if name != "optimizers"})


def test_not_finite_is_reported():
    both = pretraining()
    with torch.no_grad():
        both.classifier[1].weight.fill_(math.inf)
    with pytest.raises(FloatingPointError, match="epoch 0"):
        both.fit([(images(), torch.tensor([0, 1, 2, 0, 1]))], epochs=1)
