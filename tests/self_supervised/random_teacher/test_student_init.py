"""Where a student starts, and the head that it trains with."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from regularized.self_supervised.random_teacher.layer import BottleneckHead, EncoderWithHead
from regularized.self_supervised.random_teacher.student_init import draw_weights, interpolate_init, neighbourhood_init


def network(seed):
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5))
    return draw_weights(model, generator=torch.Generator().manual_seed(seed))


def bits(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("preserving", [False, True])
def test_both_ends_are_exact(preserving):
    """alpha = 0 is the teacher bit for bit, alpha = 1 the fresh network; fails when the roles are exchanged."""
    teacher, fresh = network(0), network(1)
    theirs, ours = bits(teacher), bits(fresh)
    assert not torch.equal(theirs["0.weight"], ours["0.weight"])
    far = interpolate_init(teacher, network(1), 1.0, variance_preserving=preserving)
    near = interpolate_init(teacher, fresh, 0.0, variance_preserving=preserving)
    assert near is fresh
    for name in theirs:
        assert torch.equal(dict(near.named_parameters())[name], theirs[name]), name
        assert torch.equal(dict(far.named_parameters())[name], ours[name]), name
    assert all(torch.equal(p, theirs[name]) for name, p in teacher.named_parameters())


def test_variance_is_preserved_on_the_way():
    """Independent weights of variance 1 keep it for every alpha; fails with the square root forgotten."""
    generator = torch.Generator().manual_seed(0)

    def layer():
        linear = nn.Linear(400, 250, bias=False)
        linear.weight.data = torch.randn(250, 400, generator=generator)
        return linear

    teacher, fresh = layer(), layer().state_dict()
    for alpha in (0.0, 0.2, 0.5, 0.9, 1.0):
        student = nn.Linear(400, 250, bias=False)
        student.load_state_dict(fresh)
        interpolate_init(teacher, student, alpha, variance_preserving=True)
        assert float(student.weight.detach().var()) == pytest.approx(1.0, rel=0.02)
    for eps in (0.1, 1.0):
        student.load_state_dict(fresh)
        neighbourhood_init(teacher, student, eps, variance_preserving=True)
        assert float(student.weight.detach().var()) == pytest.approx(1.0, rel=0.02)


def test_the_factor_at_a_half():
    """sqrt(2 alpha^2 - 2 alpha + 1) is sqrt(0.5) at 0.5; fails when it multiplies instead of dividing."""
    plain = interpolate_init(network(0), network(1), 0.5)
    preserving = interpolate_init(network(0), network(1), 0.5, variance_preserving=True)
    for a, b in zip(plain.parameters(), preserving.parameters(), strict=True):
        torch.testing.assert_close(b, a / 0.5**0.5)


def test_buffers_stay_fresh():
    """Parameters only; fails when the running statistics of a used teacher are taken over."""
    teacher = network(0)
    teacher[1].running_mean.fill_(7.0)
    student = interpolate_init(teacher, network(1), 0.0)
    assert torch.equal(student[1].running_mean, torch.zeros(4))
    assert float(student[1].weight.detach()[0]) == 1.0
    assert float(interpolate_init(teacher, network(1), 0.5, variance_preserving=True)[1].weight.detach()[0]) > 1.4


def test_neighbourhood_is_a_sum():
    """theta_T + eps theta_fresh; fails when the teacher is scaled by 1 - eps."""
    teacher, fresh = network(0), network(1)
    theirs, ours = bits(teacher), bits(fresh)
    student = neighbourhood_init(teacher, fresh, 0.1)
    for name, p in student.named_parameters():
        torch.testing.assert_close(p.detach(), theirs[name] + 0.1 * ours[name])


def test_drawing_is_kaiming_by_fan_out_from_one_stream():
    """Fails when the global generator is used, the fan is the wrong one, or a bias is left at torch's default."""
    model = nn.Sequential(nn.Linear(50, 800), nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64))
    before = torch.get_rng_state()
    draw_weights(model, generator=torch.Generator().manual_seed(3))
    assert torch.equal(torch.get_rng_state(), before)
    assert float(model[0].weight.std()) == pytest.approx((2 / 800) ** 0.5, rel=0.02)
    assert float(model[1].weight.std()) == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.1)
    assert not model[0].bias.any()
    assert not model[1].bias.any()
    # The student's stream may go on where the teacher's ended, as in the official code: other weights.
    stream = torch.Generator().manual_seed(3)
    first, second = (draw_weights(nn.Linear(5, 5), generator=stream).weight.clone() for _ in range(2))
    assert not torch.equal(first, second)


def test_a_head_inside_a_network_draws_its_own():
    """Fails when the head gets Kaiming weights, or is drawn twice and shifts the stream."""
    model = EncoderWithHead(nn.Linear(4, 64), BottleneckHead(64, hidden=(128,), bottleneck=64, out_features=256))
    draw_weights(model, generator=torch.Generator().manual_seed(0))
    for part in (model.head.mlp[0], model.head.bottleneck, model.head.outputs):
        assert float(part.weight.std()) == pytest.approx(0.02, rel=0.05)
    stream = torch.Generator().manual_seed(0)
    draw_weights(nn.Linear(4, 64), generator=stream)
    alone = BottleneckHead(64, hidden=(128,), bottleneck=64, out_features=256, generator=stream)
    assert torch.equal(model.head.outputs.weight, alone.outputs.weight)


def test_the_bottleneck_has_unit_length():
    """Scaling what enters the normalisation changes nothing; fails when the feature is not normalised."""
    head = BottleneckHead(6, hidden=(8,), bottleneck=4, out_features=10).double()
    x = torch.randn(5, 6, dtype=torch.float64)
    out = head(x)
    with torch.no_grad():
        head.bottleneck.weight *= 3.0
        head.bottleneck.bias *= 3.0
    torch.testing.assert_close(head(x), out)
    torch.testing.assert_close(head.features(x).norm(dim=1), torch.ones(5, dtype=torch.float64))
    with torch.no_grad():
        head.bottleneck.weight.zero_()
    assert torch.isfinite(head(x)).all()  # a feature of length 0 is divided by 1e-12


def test_weight_norm_is_off_and_can_be_on():
    """Fails when the default does not follow the trained results, or the switch normalises columns."""
    head = BottleneckHead(6, hidden=(8,), bottleneck=4, out_features=10)
    x = torch.randn(5, 6)
    plain = head(x)
    torch.testing.assert_close(plain, head.features(x) @ head.outputs.weight.T)
    head.weight_norm = True
    torch.testing.assert_close(head(x), plain / head.outputs.weight.norm(dim=1))
    assert float(head(x).detach().abs().max()) <= 1.0 + 1e-6  # a cosine


def test_the_head_by_hand():
    """A second derivation; fails with another activation, or one too many after the bottleneck."""
    head = BottleneckHead(3, hidden=(4, 5), bottleneck=2, out_features=6)
    x = torch.randn(7, 3)
    a, b = head.mlp[0], head.mlp[2]
    hidden = F.gelu(F.gelu(x @ a.weight.T + a.bias) @ b.weight.T + b.bias)
    feature = hidden @ head.bottleneck.weight.T + head.bottleneck.bias
    expected = feature / feature.norm(dim=1, keepdim=True) @ head.outputs.weight.T
    torch.testing.assert_close(head(x), expected)
    assert head.outputs.bias is None
    with pytest.raises(ValueError, match="widths must be positive"):
        BottleneckHead(3, hidden=(0,))
    with pytest.raises(TypeError, match="BottleneckHead"):
        EncoderWithHead(nn.Flatten(), nn.Linear(2, 2))
