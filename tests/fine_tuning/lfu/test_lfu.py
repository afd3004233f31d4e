"""Learning from the Undesirable: golden vectors are in the contract; here what the formulas must obey."""

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from regularized.evidence.processes import run_in_processes
from regularized.fine_tuning.lfu.penalty import hidden_state_consistency, logit_consistency
from regularized.fine_tuning.lfu.regularizer import LfU
from regularized.fine_tuning.lfu.steps import AuxiliaryLoRA, Steering, steer
from regularized.fine_tuning.lfu.term import LfUTerm
from regularized.mechanisms.ascent import global_norm
from regularized.mechanisms.distributed import leave_process_group
from regularized.papers.lfu.contract import TinyLM
from regularized.training import CrossEntropy, TensorData, Trainer

AUX = ("self", "lora", "steering")


def batch(n: int = 4, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(11, (n, 5), generator=generator)
    labels = ids.roll(-1, 1)
    labels[:, -1] = -100
    labels[0, 2] = -100
    return ids, labels


def model(seed: int = 0) -> TinyLM:
    torch.manual_seed(seed)
    return TinyLM().double()


def loss_of(net: nn.Module, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(net(ids).flatten(0, 1), labels.flatten())


def gradients(net: nn.Module) -> dict[str, torch.Tensor]:
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in net.named_parameters()}


def step(net: nn.Module, lfu: LfU, ids: torch.Tensor, labels: torch.Tensor, **settings: object) -> torch.Tensor:
    with lfu.record(mask=labels != -100):
        loss = loss_of(net, ids, labels)
    loss.backward()
    return lfu.backward(**settings)


def plain_gradients(ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    net = model()
    loss_of(net, ids, labels).backward()
    return gradients(net)


# -- the formula --------------------------------------------------------------------------------------


@pytest.mark.parametrize("aux", AUX)
@pytest.mark.parametrize("n", [1, 3])
def test_second_derivation(aux, n):
    """Loss and gradient from a slow computation with explicit weights, the whole total differentiated at once.

    Fails when the clean side is not detached, when the step is (or the sign of either is turned), when the norm is that
    of each tensor, when masked tokens or layers are averaged wrongly.
    """
    ids, labels = batch(n)
    alpha, lam = 0.3, 2.0
    net = model()
    lora = AuxiliaryLoRA(rank=2, scale=0.7, targets=["blocks.0.linear", "blocks.1.linear"])
    lfu = LfU(net, aux=lora if aux == "lora" else aux, alpha=alpha, strength=lam)
    penalty = step(net, lfu, ids, labels)

    p = {name: t.detach().clone().requires_grad_() for name, t in model().named_parameters()}
    width = p["head.weight"].shape[1]
    a = [t.detach() for t in lora.A]
    b = [torch.zeros(width, 2, dtype=torch.double, requires_grad=True) for _ in range(2)]
    d = [torch.zeros(width, dtype=torch.double, requires_grad=True) for _ in range(2)]

    def forward(p, b, d):
        h, states = p["embedding.weight"][ids], []
        for i in range(2):
            mean = torch.stack([h[:, : t + 1].mean(1) for t in range(h.shape[1])], 1)
            out = mean @ p[f"blocks.{i}.linear.weight"].T + p[f"blocks.{i}.linear.bias"]
            if aux == "lora":
                out = out + 0.7 * mean @ a[i].T @ b[i].T
            h = h + torch.tanh(out)
            if aux == "steering":
                h = h + d[i]
            states.append(h)
        return h @ p["head.weight"].T + p["head.bias"], states

    logits, clean = forward(p, b, d)
    valid = [(s, t) for s in range(n) for t in range(5) if labels[s, t] != -100]
    loss = -sum(logits[s, t].log_softmax(-1)[labels[s, t]] for s, t in valid) / len(valid)
    which = {"self": list(p.values()), "lora": b, "steering": d}[aux]
    g = torch.autograd.grad(loss, which, retain_graph=True)
    norm = sum(x.square().sum() for x in g).sqrt()
    moved = [x + alpha * y / norm for x, y in zip(which, g, strict=True)]
    if aux == "self":
        _, other = forward(dict(zip(p, moved, strict=True)), b, d)
    else:
        _, other = forward(p, moved if aux == "lora" else b, moved if aux == "steering" else d)
    total = sum(
        (h.detach()[s, t] - h2[s, t]).square().mean() for h, h2 in zip(clean, other, strict=True) for s, t in valid
    )
    expected = total / (2 * len(valid))
    torch.testing.assert_close(penalty, expected.detach(), rtol=1e-10, atol=1e-14)
    wanted = torch.autograd.grad(loss + lam * expected, list(p.values()))
    for ours, theirs in zip(gradients(net).values(), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("aux", AUX)
def test_same_batch_needs_no_pass_for_the_direction(aux):
    """The gradient of the clean pass is the ascent gradient. Fails when variables are not at rest in the clean pass."""
    ids, labels = batch()
    found = []
    for separate in (False, True):
        net = model()
        lfu = LfU(net, aux=aux)
        if separate:
            ascent = lfu.ascend(lambda m: loss_of(m, ids, labels))
            torch.testing.assert_close(ascent, loss_of(net, ids, labels).detach())
            assert all(p.grad is None for p in net.parameters()), "ascend must not touch .grad"
        found.append((step(net, lfu, ids, labels), gradients(net)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-14)


def test_two_forwards_and_two_backwards():
    """The floor of the same-batch case, and one graph at a time. Fails when a pass is made for the direction alone."""
    ids, labels = batch()
    net = model()
    calls = {"forward": 0, "backward": 0}

    def forward(*_):
        calls["forward"] += 1

    def backward(*_):
        calls["backward"] += 1

    net.blocks[0].register_forward_hook(forward)
    net.blocks[0].register_full_backward_hook(backward)
    step(net, LfU(net), ids, labels)
    assert calls == {"forward": 2, "backward": 2}


def test_linear_model_in_closed_form():
    """One layer h = W x: the penalty is alpha^2 |g x|^2 / |g|^2. Fails when alpha or the norm enters wrongly."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3, bias=False)).double()
    x, y = torch.randn(7, 4, dtype=torch.double), torch.randint(3, (7,))
    lfu = LfU(net, layers=["0"], alpha=0.2, reduction="sum")
    with lfu.record():
        loss = F.cross_entropy(net(x), y)
    loss.backward()
    g = net[0].weight.grad.clone()
    penalty = lfu.backward(strength=0.5)
    unit = g / g.norm()
    torch.testing.assert_close(penalty, (0.2 * x @ unit.T).square().sum(-1).mean())
    # d/dW of |W' x - sg[W x]|^2 with W' = W + step: 2 (step x) x^T.
    torch.testing.assert_close(net[0].weight.grad, g + 0.5 * 2 * (0.2 * x @ unit.T).T @ x / 7)


def test_quadratic_in_alpha_and_uphill():
    """Penalty / alpha^2 tends to a constant; the loss rises by alpha |g|. Fails when the step goes downhill."""
    ids, labels = batch()
    net = model()
    start = loss_of(net, ids, labels)
    ratios, rises = [], []
    for alpha in (1e-3, 1e-4):
        lfu = LfU(net, alpha=alpha)
        lfu.ascend(lambda m: loss_of(m, ids, labels))
        with torch.no_grad():
            raised = F.cross_entropy(lfu.undesirable(ids).flatten(0, 1), labels.flatten())
        rises.append(float((raised - start.detach()) / (alpha * lfu.norm)))
        ratios.append(float(step(net, lfu, ids, labels)) / alpha**2)
    assert ratios[0] == pytest.approx(ratios[1], rel=1e-2)
    assert rises[1] == pytest.approx(1.0, abs=1e-2)


@pytest.mark.parametrize("aux", AUX)
def test_length_of_the_step(aux):
    """Its global norm is alpha, whatever factor the loss has. Fails when each tensor is normalised, or none."""
    ids, labels = batch()
    steps = []
    for factor in (1.0, 1000.0):
        lfu = LfU(model(), aux=aux, alpha=0.3)
        lfu.ascend(lambda m, factor=factor: factor * loss_of(m, ids, labels))
        steps.append(lfu.displacement())
        assert float(global_norm(list(steps[-1].values()))) == pytest.approx(0.3, rel=1e-9)
    torch.testing.assert_close(steps[0], steps[1])


def test_reductions_and_masks():
    """Sum is d times mean; ignored tokens do not matter, whatever stands there; nothing valid gives 0.

    Fails when the mask is a factor (nan * 0), or the count that of all tokens.
    """
    torch.manual_seed(0)
    clean, moved = torch.randn(3, 2, 3, 5, 4).unbind(0)[:2]
    mask = torch.rand(3, 5) < 0.5
    clean, moved = list(clean), list(moved)
    value = hidden_state_consistency(clean, moved, mask)
    torch.testing.assert_close(hidden_state_consistency(clean, moved, mask, reduction="sum"), 4 * value)
    slow = [
        (h[s, t] - o[s, t]).square().mean()
        for h, o in zip(clean, moved, strict=True)
        for s in range(3)
        for t in range(5)
        if mask[s, t]
    ]
    torch.testing.assert_close(value, torch.stack(slow).mean())
    spoilt = [torch.where(mask[..., None], o, torch.nan).requires_grad_() for o in moved]
    again = hidden_state_consistency(clean, spoilt, mask)
    again.backward()
    torch.testing.assert_close(again.detach(), value)
    assert all(torch.isfinite(o.grad).all() for o in spoilt)
    assert hidden_state_consistency(clean, moved, torch.zeros_like(mask)) == 0


def test_clean_side_is_a_constant():
    """No gradient into the clean states or logits. Fails when a detach is missing."""
    clean, moved = (torch.randn(2, 3, 4, requires_grad=True) for _ in range(2))
    for value in (hidden_state_consistency(clean, moved), logit_consistency(clean, moved)):
        value.backward()
    assert clean.grad is None
    assert moved.grad.abs().sum() > 0


def test_logits_divergence():
    """KL(clean || moved) against torch's. Fails when the two are exchanged."""
    clean, moved = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    p, q = clean.log_softmax(-1), moved.log_softmax(-1)
    expected = F.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(logit_consistency(clean, moved), expected.mean())
    mask = torch.tensor([[True, False, True], [False, False, True]])
    torch.testing.assert_close(logit_consistency(clean, moved, mask), expected[mask].mean())


def test_steering_keeps_the_length():
    """The normalised kind turns and does not stretch; the plain kind adds. Fails when |h| or alpha is left out."""
    h, d = torch.randn(2, 3, 8), torch.randn(8)
    turned = steer(h, d, mix=0.3)
    torch.testing.assert_close(turned.norm(dim=-1), h.norm(dim=-1))
    assert (F.cosine_similarity(turned, d, dim=-1) > F.cosine_similarity(h, d, dim=-1)).all()
    torch.testing.assert_close(steer(h, d), h + d)
    ids, labels = batch()
    penalties = []
    for kind in ("plain", "normalised"):
        net = model()
        penalties.append(step(net, LfU(net, aux=Steering(kind=kind), alpha=0.2), ids, labels))
    assert penalties[0] > 0
    assert penalties[1] > 0
    assert penalties[0] != penalties[1]


# -- what is left alone ---------------------------------------------------------------------------------


@pytest.mark.parametrize("aux", AUX)
def test_weights_and_hooks_stay(aux):
    """Every parameter has its bits and no hook stays. Fails on an edit in place, or a hook that is forgotten."""
    ids, labels = batch()
    net = model()
    before = {name: (p.clone(), p.data_ptr(), p._version) for name, p in net.named_parameters()}
    lfu = LfU(net, aux=aux)
    step(net, lfu, ids, labels)
    for name, p in net.named_parameters():
        value, pointer, version = before[name]
        assert torch.equal(p, value)
        assert (p.data_ptr(), p._version) == (pointer, version)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert isinstance(net.head.weight, nn.Parameter)


@pytest.mark.parametrize("aux", AUX)
def test_strength_zero_is_plain_training(aux):
    """Bit for bit, and without a further pass. Fails when the pass is made and its gradient multiplied by 0."""
    ids, labels = batch()
    net = model()
    count = []
    net.register_forward_hook(lambda *_: count.append(1))
    assert step(net, LfU(net, aux=aux, strength=0.0), ids, labels) == 0
    assert len(count) == 1
    plain = plain_gradients(ids, labels)
    assert all(torch.equal(g, plain[name]) for name, g in gradients(net).items())


def test_dropout_masks_and_random_state():
    """With a tiny step both passes agree under dropout, and the random state is that of one pass.

    Fails when the second pass draws masks of its own: the penalty would measure dropout.
    """
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(64, 3)).double()
    x, y = torch.randn(8, 4, dtype=torch.double), torch.randint(3, (8,))
    lfu = LfU(net, layers=["1", "3"], alpha=1e-6)
    torch.manual_seed(1)
    with lfu.record():
        loss = F.cross_entropy(net(x), y)
    after = torch.get_rng_state()
    loss.backward()
    assert 0 < lfu.backward() < 1e-10
    assert torch.equal(torch.get_rng_state(), after)


def test_running_statistics_see_the_batch_once():
    """Batch normalisation moves by the clean pass alone. Fails when the displaced pass counts, too."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
    twin = copy.deepcopy(net)
    x, y = torch.randn(8, 4), torch.randint(3, (8,))
    lfu = LfU(net, layers=["2"])
    with lfu.record():
        loss = F.cross_entropy(net(x), y)
    loss.backward()
    assert lfu.backward() > 0
    twin(x)
    assert torch.equal(net[1].running_mean, twin[1].running_mean)
    assert net[1].num_batches_tracked == 1


def test_frozen_parameters_get_no_gradient():
    """Only what is trained steps and learns. Fails when the frozen base is displaced."""
    ids, labels = batch()
    net = model()
    net.embedding.requires_grad_(False)
    net.blocks[0].requires_grad_(False)
    lfu = LfU(net, alpha=0.3)
    lfu.ascend(lambda m: loss_of(m, ids, labels))
    assert set(lfu.displacement()) == {"blocks.1.linear.weight", "blocks.1.linear.bias", "head.weight", "head.bias"}
    step(net, lfu, ids, labels)
    assert net.embedding.weight.grad is None
    # States below the first trained layer do not move, and count in the mean.
    assert net.blocks[0].linear.weight.grad is None


# -- loops ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("aux", AUX)
def test_term_is_the_plain_loop(aux):
    """Our Trainer with the term, accumulating, takes the steps of the loop by hand over the whole batch.

    Fails when each micro-batch has a step of its own, or its penalty is a mean of means.
    """
    ids, labels = batch(8)
    by_hand, trained = model().float(), model().float()
    lfu = LfU(by_hand, aux=aux, alpha=0.3, strength=3.0)
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.1)
    trainer = Trainer(
        trained,
        terms={"task": CrossEntropy(), "lfu": LfUTerm(aux=aux, alpha=0.3, weight=3.0)},
        optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1),
        accumulate=4,
    )
    trainer.fit(TensorData(ids, labels, batch_size=2, shuffle=False), epochs=3)
    for _ in range(3):
        penalty = step(by_hand, lfu, ids, labels)
        optimizer.step()
        optimizer.zero_grad()
    for ours, theirs in zip(trained.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(trainer.objective.terms["lfu"].consistency, penalty, rtol=1e-4, atol=1e-7)


def test_scheduled_strength():
    """A schedule of the weight is followed; where it is 0 the step is plain. Fails when lambda is read once."""
    ids, labels = batch(4)
    nets = []
    for weight in (lambda progress: 0.0 if progress.step == 0 else 4.0, 0.0, 4.0):
        net = model().float()
        trainer = Trainer(
            net,
            terms={"task": CrossEntropy(), "lfu": LfUTerm(weight=weight, alpha=0.5)},
            optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1),
        )
        data = TensorData(ids, labels, batch_size=4)
        trainer.fit(data, epochs=2, max_steps=1)
        first = copy.deepcopy(net)
        trainer.fit(data, epochs=2)
        nets.append((first, net))
    assert torch.equal(nets[0][0].head.weight, nets[1][0].head.weight)
    assert not torch.equal(nets[0][1].blocks[0].linear.weight, nets[1][1].blocks[0].linear.weight)
    assert not torch.equal(nets[1][0].blocks[0].linear.weight, nets[2][0].blocks[0].linear.weight)


def test_scaled_gradients():
    """Under a gradient scaler the penalty's gradient is scaled like the loss's. Fails when it is added unscaled."""
    ids, labels = batch()
    found = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=1024.0)):
        net = model().float()
        lfu = LfU(net, alpha=0.3)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        with lfu.record(mask=labels != -100):
            loss = loss_of(net, ids, labels)
        (loss if scaler is None else scaler.scale(loss)).backward()
        lfu.backward(scaler=scaler)
        if scaler is not None:
            scaler.unscale_(optimizer)
        found.append(gradients(net))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match="clip it yourself"):
        LfU(model(), clip_norm=1.0).backward(scaler=torch.amp.GradScaler("cpu"))


def test_mixed_precision_is_that_of_the_clean_pass():
    """Called outside autocast, the displaced pass still runs in it. Fails when a rounding error becomes the penalty."""
    ids, labels = batch()
    net = model().float()
    lfu = LfU(net, alpha=1e-4)
    with torch.autocast("cpu", torch.bfloat16), lfu.record(mask=labels != -100):
        loss = loss_of(net, ids, labels)
    loss.backward()
    assert lfu.backward() < 1e-6


def test_clip_norm_bounds_both():
    """The whole gradient is clipped, after the addition. Fails when the penalty's part comes on top."""
    ids, labels = batch()
    net = model()
    step(net, LfU(net, alpha=0.5, strength=50.0, clip_norm=0.1), ids, labels)
    assert float(global_norm(list(gradients(net).values()))) == pytest.approx(0.1, rel=1e-5)


def test_accumulated_by_hand():
    """Two recorded halves are the whole. Fails when the second record forgets the first."""
    ids, labels = batch(4)
    whole, halves = model(), model()
    step(whole, LfU(whole, alpha=0.3), ids, labels)
    lfu = LfU(halves, alpha=0.3)
    valid = (labels != -100).sum()
    for part in (slice(0, 2), slice(2, 4)):
        with lfu.record(mask=labels[part] != -100):
            logits = halves(ids[part])
        (F.cross_entropy(logits.flatten(0, 1), labels[part].flatten(), reduction="sum") / valid).backward()
    lfu.backward()
    torch.testing.assert_close(gradients(whole), gradients(halves), rtol=1e-9, atol=1e-12)


def test_copies_belong_to_no_model():
    """A deep copy of the term does not drag the model along, and still works. Fails when hooks follow a copy."""
    term = LfUTerm()
    net = model().float()
    term.attach(net)
    twin = copy.deepcopy(term)
    assert twin._lfu is None
    twin.attach(model().float())
    lfu = LfU(net)
    ids, labels = batch()
    with lfu.record(mask=labels != -100):
        copied = copy.deepcopy(net)
        copied(ids)  # an average, say, in training mode
        loss = loss_of(net, ids, labels)
    assert len(lfu._window) == 1
    loss.backward()
    lfu.backward()


# -- several processes ------------------------------------------------------------------------------------


def _half(rank: int, world: int, folder: str) -> None:
    """One step in a plain loop over a DDP wrapper, with the direction from a batch of its own, accumulated in two."""
    torch.manual_seed(0)
    model = TinyLM()
    wrapped = DistributedDataParallel(model) if world > 1 else model
    generator = torch.Generator().manual_seed(4)
    ids, other = torch.randint(11, (2, 8, 5), generator=generator).unbind(0)
    lfu = LfU(wrapped, alpha=0.3, strength=3.0)
    mine = ids.chunk(world)[rank].chunk(2)
    lfu.ascend(lambda m: F.cross_entropy(m(other.chunk(world)[rank]).flatten(0, 1), other.chunk(world)[rank].flatten()))
    for i, part in enumerate(mine):
        wrapped.require_backward_grad_sync = i == len(mine) - 1
        with lfu.record():
            loss = F.cross_entropy(wrapped(part).flatten(0, 1), part.flatten()) / len(mine)
        loss.backward()
    penalty = lfu.backward()
    saved = {"penalty": penalty, "gradients": [p.grad for p in model.parameters()]}
    torch.save(saved, Path(folder) / f"{world}-{rank}.pt")


def _worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    _half(rank, 2, folder)
    leave_process_group()


def test_plain_loop_over_ddp(tmp_path):
    """Two processes with different data give the gradient of one: direction, norm, count and penalty are global.

    Fails when a process normalises its own direction, or divides by its own count.
    """
    _half(0, 1, str(tmp_path))
    run_in_processes(_worker, str(tmp_path))
    one, *two = (torch.load(tmp_path / name, weights_only=True) for name in ("1-0.pt", "2-0.pt", "2-1.pt"))
    for process in two:
        torch.testing.assert_close(process, one, rtol=1e-4, atol=1e-7)


# -- what it is for ---------------------------------------------------------------------------------------


def test_it_bites():
    """Trained with the penalty, hidden states move less under a harmful step than without; with its sign turned, more.

    Fails when the penalty's gradient goes the wrong way or vanishes.
    """
    ids, labels = batch(16)
    moved = []
    for strength in (0.0, 3.0, -3.0):
        net = model(3)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.2)
        lfu = LfU(net, alpha=0.2)
        for _ in range(30):
            with lfu.record(mask=labels != -100):
                loss = loss_of(net, ids, labels)
            loss.backward()
            last = lfu.backward(strength=strength or 1e-9)
            optimizer.step()
            optimizer.zero_grad()
        moved.append(float(last))
    assert moved[1] < 0.7 * moved[0]
    assert moved[2] > 1.1 * moved[0]
