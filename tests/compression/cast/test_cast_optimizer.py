"""The optimizer of CAST: what it has in common with Adam, what it does not, and that its state is whole."""

import copy
import warnings

import pytest
import torch
from torch import nn

from regularized.compression.cast import SparseAdamW, decay_budget, semi_structured_mask
from regularized.mechanisms.surgery import NoEffectWarning
from regularized.training import NonFiniteLoss
from regularized.training.progress import linear

pytestmark = [
    pytest.mark.filterwarnings("ignore:even at a constant rate"),
    pytest.mark.filterwarnings("ignore:no parameter group has a pattern"),
]


def matrix(rows=6, columns=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return nn.Parameter(torch.randn(rows, columns, generator=generator, dtype=torch.float64))


def gradients(steps, shape, seed=1):
    return torch.randn(steps, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def run(optimizer, weight, grads):
    """The weight after each step."""
    after = []
    for grad in grads:
        weight.grad = grad.clone()
        optimizer.step()
        after.append(weight.detach().clone())
    return torch.stack(after)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_without_pattern_and_on_gradients_it_is_adam(weight_decay):
    """Fails when an operation of Adam, or their order, is another one: the two agree bit for bit."""
    ours, theirs = matrix(), matrix()
    grads = gradients(20, ours.shape)
    found = run(
        SparseAdamW([ours], 0.01, l1=0.1, total_steps=20, second_moment="gradient", weight_decay=weight_decay),
        ours,
        grads,
    )
    known = run(torch.optim.AdamW([theirs], 0.01, weight_decay=weight_decay, foreach=True), theirs, grads)
    assert torch.equal(found, known)


@pytest.mark.parametrize("pattern", [None, (1, 4)])
def test_second_moment_is_that_of_the_modified_momentum(pattern):
    """Fails when v is built from gradients, or kept weights of a masked one are treated otherwise than all others."""
    weight = matrix()
    grads, (b1, b2), lr, l1, steps = gradients(12, weight.shape), (0.8, 0.9), 0.01, 0.3, 12
    w, mu, v = weight.detach().clone(), torch.zeros_like(weight), torch.zeros_like(weight)
    known = []
    for t, g in enumerate(grads):
        mask = torch.ones_like(w, dtype=torch.bool) if pattern is None else semi_structured_mask(w, pattern)
        mu = b1 * mu + (1 - b1) * g
        m = torch.where(mask, mu, (1 - t / steps) * mu + t / steps * l1 * w.sign())
        v = b2 * v + (1 - b2) * m**2
        w = w - lr * (m / (1 - b1 ** (t + 1))) / ((v / (1 - b2 ** (t + 1))).sqrt() + 1e-8)
        known.append(w)
    optimizer = SparseAdamW([weight], lr, l1=l1, total_steps=steps, pattern=pattern, mask_every=1, betas=(b1, b2))
    torch.testing.assert_close(run(optimizer, weight, grads), torch.stack(known), rtol=1e-12, atol=1e-14)


def test_the_first_step_decays_nothing():
    """Fails when alpha begins at 1 / T instead of 0."""
    grads = gradients(2, (6, 8))
    ends = []
    for l1 in (0.0, 5.0):
        weight = matrix()
        ends.append(run(SparseAdamW([weight], 0.01, l1=l1, total_steps=4, pattern=(2, 4)), weight, grads))
    assert torch.equal(ends[0][0], ends[1][0])
    assert not torch.equal(ends[0][1], ends[1][1])


def test_one_weight_by_hand():
    """Fails when the decay leaks into the momentum, points away from zero, or runs away behind it."""
    lr, l1, steps = 0.01, 0.5, 400
    weight = nn.Parameter(torch.tensor([[1.0, 2.0]], dtype=torch.float64))
    optimizer = SparseAdamW([weight], lr, l1=l1, total_steps=steps, pattern=(1, 2))
    path = run(optimizer, weight, torch.zeros(steps, 1, 2, dtype=torch.float64))
    assert torch.equal(path[:, 0, 1], torch.full((steps,), 2.0, dtype=torch.float64))  # kept, and no gradient
    assert torch.count_nonzero(optimizer.state[weight]["exp_avg"]) == 0
    first_decayed = 1.0 - lr * (l1 / steps) / (1 - 0.9**2) / (
        (0.001 * (l1 / steps) ** 2 / (1 - 0.999**2)) ** 0.5 + 1e-8
    )
    assert path[1, 0, 0].item() == pytest.approx(first_decayed, rel=1e-12)
    crossed = int((path[:, 0, 0] <= 0).nonzero()[0])
    assert (path[:crossed, 0, 0].diff() <= 0).all()
    assert path[crossed:, 0, 0].abs().max() <= 2 * lr


def test_kept_weights_do_not_know_the_decay():
    """Fails when lambda reaches weights inside the pattern, or the momentum of those outside."""
    grads, ends = gradients(10, (6, 8)), []
    for l1 in (0.0, 0.1, 3.0):
        weight = matrix()
        optimizer = SparseAdamW([weight], 0.01, l1=l1, total_steps=10, pattern=(2, 4), mask_every=100)
        ends.append((run(optimizer, weight, grads), optimizer.masks()[weight], optimizer.state[weight]["exp_avg"]))
    mean = torch.zeros(6, 8, dtype=torch.float64)
    for grad in grads:
        mean = 0.9 * mean + 0.1 * grad
    for path, mask, momentum in ends:
        assert torch.equal(path[:, mask], ends[0][0][:, mask])
        torch.testing.assert_close(momentum, mean)
    assert not torch.equal(ends[1][0], ends[0][0])


def test_masks_are_drawn_when_due_of_the_weights_before_the_step():
    """Fails when a mask is drawn after the step, or at another step than t % T_1 = 0."""
    weight = matrix()
    grads = 5 * gradients(9, weight.shape)
    optimizer = SparseAdamW([weight], 0.5, l1=0.1, total_steps=9, pattern=(2, 4), mask_every=3)
    before, used = [], []
    for grad in grads:
        before.append(semi_structured_mask(weight))
        run(optimizer, weight, grad[None])
        used.append(optimizer.masks()[weight].clone())
    for t in range(9):
        assert torch.equal(used[t], before[t - t % 3]), t
    assert any(not torch.equal(before[t], before[t - t % 3]) for t in range(9))  # meanwhile they would have changed
    assert not torch.equal(before[0], before[3])


@pytest.mark.parametrize("at", [1, 4, 7])
def test_resumed_bit_for_bit(at, tmp_path):
    """Fails when the state lacks anything, or a mask comes back as another type or of other weights."""
    grads = gradients(9, (6, 8)).float()

    def build():
        weight, bias = nn.Parameter(matrix().detach().float()), nn.Parameter(torch.ones(3))
        groups = [{"params": [weight], "pattern": (2, 4)}, {"params": [bias]}]
        return weight, bias, SparseAdamW(groups, 0.01, l1=0.1, total_steps=9, mask_every=4)

    def steps(weight, bias, optimizer, some):
        for grad in some:
            weight.grad, bias.grad = grad.clone(), grad[0, :3].clone()
            optimizer.step()
        return weight, bias

    whole = steps(*build(), grads)
    weight, bias, optimizer = build()
    drawn_at = weight.detach().clone()
    for t, grad in enumerate(grads[:at]):
        drawn_at = weight.detach().clone() if t % 4 == 0 else drawn_at
        steps(weight, bias, optimizer, grad[None])
    torch.save({"weight": weight, "bias": bias, "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    again = build()
    with torch.no_grad():
        again[0].copy_(saved["weight"])
        again[1].copy_(saved["bias"])
    again[2].load_state_dict(saved["optimizer"])
    mask = again[2].masks()[again[0]]
    assert mask.dtype == torch.bool
    assert torch.equal(mask, semi_structured_mask(drawn_at))
    assert again[2].steps == at
    for ours, known in zip(steps(*again, grads[at:]), whole, strict=True):
        assert torch.equal(ours, known)


def test_a_copy_goes_on_alike():
    """Fails when a deep copy of the optimizer loses what it needs for a step."""
    weight = matrix()
    optimizer = SparseAdamW([weight], 0.01, l1=0.1, total_steps=9, pattern=(2, 4))
    grads = gradients(9, weight.shape)
    run(optimizer, weight, grads[:3])
    twin = copy.deepcopy(optimizer)
    (other,) = twin.param_groups[0]["params"]
    assert torch.equal(run(twin, other, grads[3:]), run(optimizer, weight, grads[3:]))


def test_a_weight_without_gradient_waits():
    """Fails when its moments are corrected by the steps of others, or the others' share of the run stands still."""
    late, other, alone = matrix(seed=3), matrix(seed=4), matrix(seed=3)
    grads = gradients(4, late.shape)
    optimizer = SparseAdamW([late, other], 0.01, l1=0.0, total_steps=8, second_moment="gradient")
    run(optimizer, other, grads)
    late.grad = grads[0].clone()
    optimizer.step()
    run(SparseAdamW([alone], 0.01, l1=0.0, total_steps=8, second_moment="gradient"), alone, grads[:1])
    assert torch.equal(late, alone)
    assert optimizer.steps == 5


def test_closure():
    """Fails when the closure runs without gradients, or its loss is lost."""
    weight = nn.Parameter(torch.ones(1, 4))
    optimizer = SparseAdamW([weight], 0.01, l1=0.1, total_steps=1, pattern=(2, 4))

    def closure():
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 4.0


def test_decay_budget_warns_before_the_first_step_alone():
    """Fails when a run that cannot reach zero goes unwarned, or one that can is warned of."""
    weight = matrix()
    median = weight.detach()[~semi_structured_mask(weight)].abs().median().item()
    for lr, warned in ((1.9 * median / 49, True), (2.1 * median / 49, False)):
        optimizer = SparseAdamW([weight], lr, l1=0.1, total_steps=50, pattern=(2, 4))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run(optimizer, weight, torch.zeros(2, 6, 8, dtype=torch.float64))
        texts = [str(w.message) for w in caught]
        assert [f"{decay_budget(lr, 50):.3g}" in text and f"{median:.3g}" in text for text in texts] == [True] * warned


def test_decay_budget():
    """Fails when it is not the sum of rates times shares."""
    assert decay_budget(0.1, 4) == pytest.approx(0.1 * (0 + 1 + 2 + 3) / 4)
    assert decay_budget(0.1, 2, linear(1.0, 0.0)) == pytest.approx(0.1 * 0.5 * 0.5)


@pytest.mark.filterwarnings("default:no parameter group")
def test_no_pattern_is_said():
    """Fails when an optimizer that will sparsify nothing keeps silent."""
    weight = matrix()
    optimizer = SparseAdamW([weight], 0.01, l1=0.1, total_steps=2)
    with pytest.warns(NoEffectWarning, match="param_groups"):
        run(optimizer, weight, gradients(1, weight.shape))


def test_nan_is_found_where_a_mask_is_drawn():
    """Fails when a comparison hides NaN: no order has a place for it. The weights are as before the step."""
    weight = matrix()
    weight.data[2, 3] = torch.nan
    before = weight.detach().clone()
    optimizer = SparseAdamW([weight], 0.01, l1=0.1, total_steps=2, pattern=(2, 4))
    with pytest.raises(NonFiniteLoss, match=r"\(6, 8\) holds NaN"):
        run(optimizer, weight, gradients(1, weight.shape))
    torch.testing.assert_close(weight.detach(), before, rtol=0, atol=0, equal_nan=True)
    assert optimizer.steps == 0
