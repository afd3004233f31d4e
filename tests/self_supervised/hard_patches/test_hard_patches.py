"""Hard patches mining. Golden vectors, contract and bad input are checked in tests/test_contract.py."""

import copy
import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from regularized.mechanisms.patches import patch_vectors, random_split, take
from regularized.papers.hard_patches.contract import small_autoencoder
from regularized.self_supervised.hard_patches import (
    HardPatchMining,
    MaskedAutoencoder,
    PatchTransformer,
    TimmEncoder,
    absolute_loss,
    epoch_decay,
    grid_positions,
    hard_patch_split,
    hidden_patches,
    reconstruction_losses,
    relative_loss,
)
from regularized.self_supervised.pretraining import Pretraining
from regularized.training.data import TensorData
from regularized.training.progress import Progress, linear

LAST = Progress(step=0, total_steps=1, epoch=9, total_epochs=10)
EARLY = Progress(step=0, total_steps=1, epoch=0, total_epochs=100)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def images(count=4, seed=0):
    return torch.randn(count, 2, 8, 12, generator=seeded(seed))


def mining(**settings):
    torch.manual_seed(0)
    return HardPatchMining(small_autoencoder(), **{"decay": 0.9, **settings})


# -- losses -------------------------------------------------------------------------------------


@pytest.mark.parametrize("eps", [0.0, 1e-6])
def test_the_relative_loss_is_that_of_two_loops(eps):
    """Fails when a pair counts twice, a tie counts, or the harder patch is pushed down."""
    q = torch.randn(3, 6, dtype=torch.float64, generator=seeded(), requires_grad=True)
    t = torch.randint(4, (3, 6), generator=seeded(1)).double()
    losses = [
        -torch.log(torch.sigmoid(q[b, i] - q[b, j]) + eps)
        for b in range(3)
        for i in range(6)
        for j in range(6)
        if t[b, i] > t[b, j]
    ]
    assert len(losses) < 3 * 15  # there are ties
    expected = torch.stack(losses).mean()
    ours = relative_loss(q, t, eps=eps)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-14)
    for a, b in zip(torch.autograd.grad(ours, q), torch.autograd.grad(expected, q), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-14)


def test_known_values_of_the_relative_loss():
    """Fails when eps is inside another place than the logarithm, or the perfect order costs something."""
    t = torch.arange(5.0, dtype=torch.float64)[None]
    same = torch.zeros(1, 5, dtype=torch.float64)
    assert float(relative_loss(same, t)) == pytest.approx(math.log(2), abs=1e-15)
    assert float(relative_loss(same, t, eps=1e-6)) == pytest.approx(-math.log(0.5 + 1e-6), abs=1e-15)
    assert float(relative_loss(100 * t, t)) < 1e-40
    assert float(relative_loss(-100 * t, t)) > 100  # no saturation: each wrong pair costs its margin
    pair = torch.tensor([[0.3, -0.4]], dtype=torch.float64)
    one = F.binary_cross_entropy_with_logits(pair[:, 0] - pair[:, 1], torch.ones(1, dtype=torch.float64))
    assert float(relative_loss(pair, torch.tensor([[2.0, 1.0]]))) == pytest.approx(float(one), abs=1e-15)


def test_only_the_order_within_an_image_counts():
    """Fails when values, or pairs of two images, enter: a constant in a row, or a monotone change, would be seen."""
    q = torch.randn(3, 6, dtype=torch.float64, generator=seeded(), requires_grad=True)
    t = torch.randn(3, 6, dtype=torch.float64, generator=seeded(1))
    loss = relative_loss(q, t)
    (gradient,) = torch.autograd.grad(loss, q)
    torch.testing.assert_close(gradient.sum(dim=1), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-15)
    shift = torch.tensor([[5.0], [-3.0], [0.5]], dtype=torch.float64)
    torch.testing.assert_close(relative_loss(q + shift, t), loss, rtol=0, atol=1e-14)
    torch.testing.assert_close(relative_loss(q, t.exp() + shift), loss, rtol=0, atol=0)


def test_a_batch_of_ties_is_zero_with_a_graph():
    """Fails when no pair gives 0 / 0, as in the official code, or a loss that cannot be differentiated."""
    q = torch.randn(2, 4, requires_grad=True)
    loss = relative_loss(q, torch.ones(2, 4))
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert q.grad.abs().max() == 0.0


def test_the_target_is_constant_in_both_losses():
    """Fails when the autoencoder could make its own errors easier to guess."""
    for loss in (relative_loss, absolute_loss):
        t = torch.randn(2, 4, requires_grad=True)
        loss(torch.randn(2, 4, requires_grad=True), t).backward()
        assert t.grad is None
    target = torch.randn(2, 4, 3, requires_grad=True)
    reconstruction_losses(torch.randn(2, 4, 3, requires_grad=True), target).sum().backward()
    assert target.grad is None


def test_losses_of_half_precision_are_finite():
    """Fails when the margin is exponentiated in the precision of the network."""
    q = torch.tensor([[300.0, -300.0]], dtype=torch.bfloat16, requires_grad=True)
    loss = relative_loss(q, torch.tensor([[0.0, 1.0]], dtype=torch.bfloat16))
    loss.backward()
    assert loss.dtype == torch.float32
    assert float(loss.detach()) == pytest.approx(600, rel=0.01)
    assert bool(q.grad.isfinite().all())


# -- masks --------------------------------------------------------------------------------------


def test_hard_patches_are_always_hidden_and_the_rest_equally_often():
    """Fails when k is counted otherwise (73 of 147 at the end), a hard one is seen, or the rest is not uniform."""
    assert hidden_patches(196, 0.75) == 147
    scores = torch.randn(196, generator=seeded())
    hard = linear(0.0, 0.5, unit="epoch")(Progress(0, 1, epoch=199, total_epochs=200))
    split = hard_patch_split(scores.expand(4000, 196), hard=hard, generator=seeded(1))
    masks = split.mask
    assert masks.sum(dim=1).unique().tolist() == [147]
    always = masks.all(dim=0)
    assert always.nonzero().flatten().tolist() == scores.topk(73).indices.sort().values.tolist()
    often = masks[:, ~always].double().mean(dim=0)
    torch.testing.assert_close(often, torch.full_like(often, 74 / 123), rtol=0, atol=0.04)  # five deviations


def test_without_a_hard_patch_the_mask_is_random():
    """Fails when scores are looked at although int(M * hard) is 0, or the draws are not random_split's."""
    scores = torch.full((3, 16), torch.nan)
    split = hard_patch_split(scores, hard=0.05, generator=seeded())
    assert torch.equal(split.hidden, random_split(3, 16, 12, generator=seeded()).hidden)


def test_ties_of_scores_hide_as_many():
    """Fails when equal scores make rows of different lengths."""
    assert hard_patch_split(torch.zeros(5, 16), hard=0.5).hidden.shape == (5, 12)


# -- the autoencoder ----------------------------------------------------------------------------


def test_the_encoder_sees_visible_patches_alone():
    """Fails when a hidden pixel reaches a prediction."""
    model = small_autoencoder().eval()
    x = images().requires_grad_()
    split = random_split(4, 24, 18, generator=seeded())
    out = model(x, split)
    (gradient,) = torch.autograd.grad(out.patches.sum() + out.predicted.sum(), x)
    seen = patch_vectors(gradient, 2).abs().amax(dim=2)
    assert take(seen, split.hidden).max() == 0
    assert take(seen, split.visible).min() > 0


def test_predictions_belong_to_the_patches_of_their_places():
    """Fails when the order of decoder tokens and that of the targets are not the same: visible, then hidden, raster."""
    model = small_autoencoder().double()
    x = images().double()
    split = random_split(4, 24, 18, generator=seeded())
    tokens = model._decoder_tokens(x, split)
    empty = model.mask_token + take(model.positions, split.hidden)
    torch.testing.assert_close(tokens[:, -18:], empty, rtol=0, atol=0)
    hidden = patch_vectors(x, 2)[split.mask].view(4, 18, 8)
    assert torch.equal(model.targets(x, split), hidden)
    # A decoder that reads nothing but the place learns what stands there in every image.
    torch.manual_seed(0)
    model = small_autoencoder()
    same = images(1).expand(8, -1, -1, -1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(150):
        split = random_split(8, 24, 18)
        loss = reconstruction_losses(model(same, split).patches, model.targets(same, split)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.3 * float(same.square().mean())


def test_scores_come_from_the_whole_image_without_the_reconstructor():
    """Fails when scoring hides a patch, or pays for the decoder that it does not need."""
    model = small_autoencoder()
    called = []
    model.reconstructor.register_forward_hook(lambda *_: called.append(1))
    x = images().requires_grad_()
    scores = model.scores(x)
    assert scores.shape == (4, 24)
    (gradient,) = torch.autograd.grad(scores.sum(), x)
    assert patch_vectors(gradient, 2).abs().amax(dim=2).min() > 0
    assert not called


def test_positions_are_those_of_the_official_code():
    """Fails when row and column, sine and cosine, or the frequencies are exchanged."""
    table = grid_positions((2, 3), 8)
    for row in range(2):
        for column in range(3):
            expected = [
                f(where / 10000 ** (i / 2))
                for where, f in ((column, math.sin), (column, math.cos), (row, math.sin), (row, math.cos))
                for i in range(2)
            ]
            torch.testing.assert_close(table[3 * row + column], torch.tensor(expected), rtol=0, atol=1e-6)


def test_the_predictor_starts_as_a_mean_of_drawn_rows():
    """Fails when the scalar head starts as wide as a drawn row: the official one is a mean of P P C of them."""
    torch.manual_seed(0)
    model = MaskedAutoencoder(PatchTransformer(32, patch_size=8, width=32, depth=1, heads=2), decoder_width=256)
    bound = math.sqrt(6 / (256 + 192))
    expected = bound / math.sqrt(3) / math.sqrt(192)
    assert float(model.predictor.head.weight.detach().std()) == pytest.approx(expected, rel=0.2)


class TimmLike(nn.Module):
    """The attributes of timm's VisionTransformer that the adapter reads, and its forward pass."""

    def __init__(self, registers=0, no_embed_class=False):
        super().__init__()
        self.embed_dim, self.no_embed_class = 12, no_embed_class
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, 12, 4, stride=4)
        self.patch_embed.forward = lambda x: self.patch_embed.proj(x).flatten(2).mT
        self.patch_embed.patch_size, self.patch_embed.grid_size = (4, 4), (2, 3)
        self.cls_token = nn.Parameter(torch.randn(1, 1, 12))
        self.reg_token = nn.Parameter(torch.randn(1, registers, 12)) if registers else None
        self.num_prefix_tokens = 1 + registers
        self.pos_embed = nn.Parameter(torch.randn(1, 6 + (0 if no_embed_class else 1 + registers), 12))
        self.norm_pre = nn.Identity()
        self.blocks = nn.Sequential(nn.TransformerEncoderLayer(12, 2, 24, dropout=0.0, batch_first=True))
        self.norm = nn.LayerNorm(12)

    def forward_features(self, x):
        x = self.patch_embed.forward(x)
        prefix = [t.expand(len(x), -1, -1) for t in (self.cls_token, self.reg_token) if t is not None]
        if self.no_embed_class:
            x = torch.cat([*prefix, x + self.pos_embed], dim=1)
        else:
            x = torch.cat([*prefix, x], dim=1) + self.pos_embed
        return self.norm(self.blocks(self.norm_pre(x)))


@pytest.mark.parametrize(("registers", "no_embed_class"), [(0, False), (3, False), (2, True)])
def test_a_timm_model_gives_its_own_features(registers, no_embed_class):
    """Fails when positions land on another token than timm puts them on, or the prefix has another length."""
    vit = TimmLike(registers, no_embed_class)
    encoder = TimmEncoder(vit)
    x = torch.randn(2, 3, 8, 12)
    torch.testing.assert_close(encoder.encode(encoder.embed(x)), vit.forward_features(x))
    model = MaskedAutoencoder(encoder, decoder_width=8, decoder_depth=1, decoder_heads=2)
    out = HardPatchMining(model, mask_ratio=0.5)(x, LAST)
    out.loss.backward()
    assert vit.pos_embed.grad is not None
    assert vit.patch_embed.proj.weight.grad.abs().max() > 0


# -- mining -------------------------------------------------------------------------------------


def test_switched_off_it_is_a_masked_autoencoder_bit_for_bit():
    """Fails when the ranking, or a draw of its own, reaches a run without weight and hard patches."""

    def trained(loss):
        model = copy.deepcopy(start)
        optimizer = torch.optim.AdamW([p for n, p in model.named_parameters() if "predictor" not in n], lr=1e-2)
        step = loss(model)
        for number in range(4):
            step(images(seed=number)).backward()
            optimizer.step()
            optimizer.zero_grad()
        return model.state_dict()

    start = small_autoencoder()

    def ours(model):
        method = HardPatchMining(model, hard=0.0, weight=0.0, generator=seeded())
        return lambda x: method(x, LAST).loss

    def plain(model):
        draws = seeded()

        def loss(x):
            split = random_split(4, 24, 18, generator=draws)
            tokens = model._decoder_tokens(x, split)
            return F.mse_loss(model.reconstructor(tokens, 18), model.targets(x, split), reduction="none").mean(2).mean()

        return loss

    for (name, a), b in zip(trained(ours).items(), trained(plain).values(), strict=True):
        assert torch.equal(a, b), name


def test_the_copy_does_not_run_while_nothing_is_chosen():
    """Fails when a pass of the copy is paid for that cannot change the mask."""
    method = mining()
    calls = []
    method.teacher.module.predictor.register_forward_hook(lambda *_: calls.append(1))
    method(images(), EARLY)  # int(18 * 0.5 / 100) is 0
    assert not calls
    method(images(), LAST)
    assert calls == [1]
    assert mining(hard=0.0).teacher is None  # nor does it exist


def test_the_copy_chooses_what_is_hidden():
    """Fails when the student scores itself, or the wrong end of the scores is taken."""
    method = mining()
    for p in method.model.predictor.parameters():
        nn.init.zeros_(p)
    x = images()
    hardest = method.teacher.module.scores(x).topk(9, dim=1).indices
    split = method.choose(x, LAST)
    assert bool(take(split.mask, hardest).all())


def test_the_copy_follows_and_takes_no_gradient():
    """Fails when a gradient reaches it, its decay is not that of the epoch, or 0 does not copy."""
    method = mining(decay=epoch_decay(0.5, 0.7, epochs=2))
    before = {n: p.clone() for n, p in method.teacher.module.named_parameters()}
    out = method(images(), LAST)
    out.loss.backward()
    assert all(p.grad is None for p in method.teacher.parameters())
    with torch.no_grad():
        for p in method.model.parameters():
            p += 1
    for epoch, decay in ((0, 0.5), (1, 0.6), (7, 0.7)):
        method.after_step(Progress(0, 1, epoch=epoch, total_epochs=8))
        for name, p in method.teacher.module.named_parameters():
            student = method.model.get_parameter(name)
            torch.testing.assert_close(p, decay * before[name] + (1 - decay) * student.detach(), rtol=0, atol=1e-5)
        before = {n: p.clone() for n, p in method.teacher.module.named_parameters()}
    method.decay = lambda progress: 0.0
    method.after_step(LAST)
    assert all(torch.equal(p, method.model.get_parameter(n)) for n, p in method.teacher.module.named_parameters())


def test_the_copy_stays_in_evaluation_mode():
    """Fails when train() of a module around it switches dropout on in the copy."""
    method = mining()
    around = nn.ModuleList([method]).train()
    assert method.model.training
    assert not any(part.training for part in method.teacher.modules())
    around.eval()
    assert not method.model.training


def test_the_gradient_of_the_ranking_reaches_the_encoder():
    """Fails when the loss predictor is detached from the encoder, as it is not in the official code."""
    method = mining()
    x, gradients = images(), []
    for weight in (0.0, 1.0):
        method.weight, method.generator = weight, seeded()
        method.zero_grad()
        method(x, EARLY).loss.backward()
        gradients.append(method.model.encoder.patch_embedding.weight.grad.clone())
    assert float((gradients[0] - gradients[1]).abs().max()) > 1e-6


def test_it_learns_which_patches_are_hard():
    """Fails when the predictor's sign is turned round, or its target belongs to other patches.

    Half of each image is noise, which nobody can reconstruct, the other half flat.
    """
    torch.manual_seed(0)
    x = torch.zeros(64, 2, 8, 12)
    x[..., 6:] = torch.randn(64, 2, 8, 6)
    model = small_autoencoder()
    training = Pretraining(HardPatchMining(model, decay=0.9), optimizer=partial(torch.optim.AdamW, lr=1e-2))
    records = training.fit(TensorData(x, batch_size=16), epochs=15)
    assert records[-1]["ranking"] < 0.45 < math.log(2)
    scores = model.scores(x).view(64, 4, 6)
    assert float((scores[..., 3:].mean((1, 2)) > scores[..., :3].mean((1, 2))).float().mean()) > 0.9
    assert sorted(records[0]) == ["loss", "ranking", "reconstruction"]
    assert all(math.isfinite(value) for record in records for value in record.values())


def test_a_whole_run_in_bfloat16_is_finite():
    """Fails when a part of it computes in a type that the others do not have."""
    method = mining()
    with torch.autocast("cpu", torch.bfloat16):
        out = method(images(), LAST)
    out.loss.backward()
    assert out.loss.dtype == torch.float32
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in method.model.parameters())
