"""SVFit. Golden vectors, contract and bad input are checked in tests/test_contract.py, PEFT in test_svfit_peft.py."""

import copy
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tests.fine_tuning.svfit.quantised import Int8Linear
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from regularized.fine_tuning.svfit import files
from regularized.fine_tuning.svfit.files import load_svfit_state_dict, svfit_lora, svfit_state_dict
from regularized.fine_tuning.svfit.identity import basis_witness, check_basis, relative_gap, weight_fingerprint
from regularized.fine_tuning.svfit.layer import SingularValueShift, SVFitLayer, svfit_rank
from regularized.fine_tuning.svfit.model import (
    inject_svfit,
    merge_svfit,
    svfit_layers,
    svfit_param_groups,
    unload_svfit,
)
from regularized.fine_tuning.svfit.product import folding_pays, shifted_forward, shifted_weight
from regularized.fine_tuning.svfit.term import SVFit
from regularized.mechanisms.surgery import NoEffectWarning


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=generator(seed), dtype=dtype)


def layers(dtype=torch.float64):
    """A linear layer, transformers' form of one, and convolutions with stride, padding and dilation."""
    torch.manual_seed(0)
    made = [
        (nn.Linear(7, 5), (4, 7)),
        (nn.Linear(7, 5, bias=False), (2, 3, 7)),
        (nn.Conv2d(3, 6, 3, stride=2, padding=1), (2, 3, 8, 9)),
        (nn.Conv2d(3, 4, (3, 2), dilation=2, padding="same", padding_mode="reflect", bias=False), (2, 3, 8, 9)),
    ]
    return [(layer.to(dtype), randn(*shape, dtype=dtype)) for layer, shape in made]


def adapted(layer, seed=5, **kwargs):
    """The layer with shifts that are not zero."""
    new = SVFitLayer.of(copy.deepcopy(layer), **kwargs)
    d = new.directions
    d.set_shift(randn(len(d.values), seed=seed, dtype=d.values.dtype))
    return new


def forced(monkeypatch, fold):
    monkeypatch.setattr("regularized.fine_tuning.svfit.product.folding_pays", lambda *a, **k: fold)


# -- the mathematics ----------------------------------------------------------------------------


@pytest.mark.parametrize("decay", ["shift", "sigma"])
def test_start_is_the_base_layer(decay):
    """Bit for bit; fails when the retained part is added to the whole weight instead of the residual."""
    for layer, x in layers(torch.float32):
        for rank in (2, "full"):
            new = SVFitLayer.of(copy.deepcopy(layer), rank, decay=decay)
            assert torch.equal(new(x), layer(x))
            assert torch.equal(new.weight, layer.weight)


@pytest.mark.parametrize("fold", [False, True])
def test_gradient_is_the_diagonal_in_the_singular_basis(monkeypatch, fold):
    """Against the dense gradient, u_k^T G v_k, in both forms; and the gradient of the input and of a trained bias.

    Fails for a mean, a missing vector, or a gradient of the input that is only the base layer's.
    """
    forced(monkeypatch, fold)
    for layer, x in layers():
        new = adapted(layer, rank=3)
        d = new.directions
        if layer.bias is not None:
            new.base_layer.bias.requires_grad_(True)
        x = x.clone().requires_grad_(True)
        y = new(x)
        g = randn(*y.shape, seed=3)
        y.backward(g)
        dense = copy.deepcopy(layer)
        with torch.no_grad():
            dense.weight.copy_(new.weight)
        x_dense = x.detach().clone().requires_grad_(True)
        dense(x_dense).backward(g)
        expected = (d.left.T @ dense.weight.grad.flatten(1) @ d.right.T).diagonal()
        torch.testing.assert_close(y, dense(x), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(d.trained.grad, expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(x.grad, x_dense.grad, rtol=1e-10, atol=1e-10)
        if layer.bias is not None:
            torch.testing.assert_close(new.base_layer.bias.grad, dense.bias.grad, rtol=1e-10, atol=1e-10)
        assert new.base_layer.weight.grad is None
        assert not d.left.requires_grad
        assert not d.right.requires_grad


@pytest.mark.parametrize("fold", [False, True])
def test_finite_differences(monkeypatch, fold):
    forced(monkeypatch, fold)
    layer = nn.Linear(5, 4).double().requires_grad_(False)
    d = SingularValueShift.of(layer.weight, 3)
    x, shift = randn(6, 5).requires_grad_(True), randn(3, seed=1).requires_grad_(True)
    assert torch.autograd.gradcheck(lambda x, s: shifted_forward(layer, x, d.left, s, d.right), (x, shift))


@given(o=st.integers(1, 6), i=st.integers(1, 6), seed=st.integers(0, 99))
@settings(max_examples=30)
def test_scaled_and_emptied(o, i, seed):
    """sigma = c sigma_0 at full rank is c W; sigma = 0 leaves the residual W_e (the sheet's limits)."""
    weight = randn(o, i, seed=seed)
    full = SingularValueShift.of(weight)
    full.set_shift(1.7 * full.values - full.values)
    torch.testing.assert_close(full(weight), 1.7 * weight, rtol=1e-9, atol=1e-12)
    one = SingularValueShift.of(weight, 1, decay="sigma")
    with torch.no_grad():
        one.trained.zero_()
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    torch.testing.assert_close(one(weight), (u[:, 1:] * s[1:]) @ v[1:], rtol=1e-9, atol=1e-10)


def test_flipped_signs_change_nothing():
    """u_k and v_k flip together; fails when only one of them enters somewhere."""
    layer, x = layers()[0]
    new = adapted(layer)
    flipped = copy.deepcopy(new)
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0, -1.0], dtype=torch.float64)
    flipped.directions.left.mul_(signs)
    flipped.directions.right.mul_(signs[:, None])
    for one in (new, flipped):
        one(x).sum().backward()
    torch.testing.assert_close(flipped(x), new(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(flipped.directions.trained.grad, new.directions.trained.grad, rtol=1e-12, atol=1e-12)
    a, b = (basis_witness(one.directions.left, one.directions.right) for one in (new, flipped))
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_change_has_rank_r_and_keeps_the_vectors():
    """rank(W_new - W) <= r, and W_new has the singular vectors of W; fails when a vector is trained or mixed."""
    layer, _ = layers()[0]
    new = adapted(layer, rank=2)
    change = new.weight - layer.weight
    assert int(torch.linalg.matrix_rank(change, atol=1e-10)) == 2
    full = SVFitLayer.of(copy.deepcopy(layer)).directions
    full.set_shift(torch.tensor([0.5, 0.1, 0.3, 0.2, 0.1], dtype=torch.float64))
    in_old_basis = full.left.T @ full(layer.weight) @ full.right.T
    off_diagonal = in_old_basis - in_old_basis.diagonal().diag()
    assert off_diagonal.abs().max() < 1e-12
    torch.testing.assert_close(in_old_basis.diagonal(), full.values + full.shift)


def test_weight_decay_pulls_to_the_form_it_is_told():
    """One step of pure decay: the shift form stays at the pretrained weight, the sigma form shrinks the values."""
    for decay, expected in (("shift", 0.0), ("sigma", -0.1)):
        layer = SVFitLayer.of(nn.Linear(6, 4), decay=decay)
        d = layer.directions
        d.trained.grad = torch.zeros_like(d.trained)
        torch.optim.SGD([d.trained], lr=1.0, weight_decay=0.1).step()
        torch.testing.assert_close(d.shift, expected * d.values)


# -- which form ---------------------------------------------------------------------------------


def test_the_cheaper_form_is_chosen():
    """Counted multiply-adds of both forms, by hand; fails when training and inference are swapped."""
    assert not folding_pays(1, 768, 768, 768, training=False)
    assert folding_pays(385, 768, 768, 8, training=False)
    assert not folding_pays(10_000, 768, 768, 8, training=True)  # thin: no gradient by the whole weight
    assert not folding_pays(512, 768, 768, 768, training=True)
    assert folding_pays(800, 768, 768, 768, training=True)


def test_both_forms_agree_and_only_the_thin_one_runs_on_half_precision(monkeypatch):
    """Fails when a bfloat16 weight is folded, where a small shift is lost to rounding."""
    for layer, x in layers():
        new = adapted(layer)
        forced(monkeypatch, False)
        thin = new(x)
        forced(monkeypatch, True)
        torch.testing.assert_close(new(x), thin, rtol=1e-11, atol=1e-11)
        with torch.no_grad():
            torch.testing.assert_close(new(x), thin, rtol=1e-11, atol=1e-11)
    layer = SVFitLayer.of(nn.Linear(16, 16).bfloat16())
    layer.directions.set_shift(torch.full((16,), 1e-3))
    x = randn(64, 16, dtype=torch.bfloat16)
    assert layer.directions.trained.dtype == torch.float32
    assert layer.directions.left.dtype == torch.bfloat16
    assert not torch.equal(layer(x), layer.base_layer(x))
    layer(x).float().square().sum().backward()
    assert layer.directions.trained.grad.abs().min() > 0


def test_autocast_folds_in_full_precision():
    """Fails when autocast rounds the summands before they are added, or the backward pass meets two types."""
    layer = adapted(nn.Linear(16, 16))
    x = randn(200, 16, dtype=torch.float32).requires_grad_(True)
    assert folding_pays(200, 16, 16, 16, training=True)
    exact = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        low = layer(x)
        with torch.no_grad():
            assert layer(x).dtype == torch.bfloat16
    assert low.dtype == torch.bfloat16
    assert (low.float() - exact).abs().max() < 0.05 * exact.abs().max()
    low.float().sum().backward()
    assert x.grad.dtype == layer.directions.trained.grad.dtype == torch.float32


def test_folded_form_keeps_no_weight_for_the_backward_pass():
    """What autograd saves is the input and what is there anyway; fails when the summed weight is kept."""
    layer, x = adapted(nn.Linear(32, 32)), randn(100, 32, dtype=torch.float32)
    own = {t.untyped_storage().data_ptr() for t in [*layer.parameters(), *layer.buffers(), x]}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    assert saved
    assert all(t.untyped_storage().data_ptr() in own for t in saved)


# -- rank ---------------------------------------------------------------------------------------


@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=8), st.floats(0.01, 1.0))
@settings(max_examples=40)
def test_rank_by_information(values, share):
    """The fewest values that hold the share: one less does not. Fails for an off-by-one, or squares for sums."""
    values = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
    for which, held in (("energy", values.square()), ("nuclear", values)):
        r = svfit_rank(values, **{which: share})
        assert held[:r].sum() >= held.sum() * share * (1 - 1e-9)
        assert r == 1 or held[: r - 1].sum() < held.sum() * share
    assert svfit_rank(values, energy=1.0) <= len(values)


# -- a whole model ------------------------------------------------------------------------------


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 3))


def shifted(model, **kwargs):
    inject_svfit(model, **{"target_modules": ["0", "2"], **kwargs})
    for k, (_, layer) in enumerate(svfit_layers(model)):
        layer.directions.set_shift(0.3 * randn(len(layer.directions.values), seed=k, dtype=torch.float32))
    return model


def test_only_singular_values_are_trained():
    """The count is the sum of the ranks (and a head where asked for); everything else is frozen."""
    model = network()
    inject_svfit(model, rank="full", target_modules=["0", "2"])
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 6 + 8
    with_head = network()
    inject_svfit(with_head, rank=4, also_train=["4"])
    assert sum(p.numel() for p in with_head.parameters() if p.requires_grad) == 4 + 4 + 8 * 3 + 3


def test_training_moves_the_values_alone_and_learns():
    """It bites: what another adapter of the same base says is learned; at a rate of almost 0 nothing moves."""
    x = randn(64, 6, dtype=torch.float32)
    y = shifted(network()).requires_grad_(False)(x)

    def losses(lr):
        model = network()
        inject_svfit(model)
        start = {name: b.clone() for name, b in model.named_buffers()}
        frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
        optimizer = torch.optim.Adam(svfit_param_groups(model, lr=lr))
        history = []
        for _ in range(60):
            loss = F.mse_loss(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            history.append(float(loss.detach()))
        assert all(torch.equal(b, start[name]) for name, b in model.named_buffers())
        assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
        return history

    fast = losses(0.1)
    assert fast[-1] < 0.1 * fast[0]
    with pytest.warns(UserWarning, match="barely moves"):
        slow = losses(1e-9)
    assert abs(slow[-1] - slow[0]) < 1e-4


def test_merged_unloaded_and_lora_agree():
    """Merged = unmerged = the LoRA added by hand, to 1e-6; unloaded = the base, bit for bit."""
    base, x = network(), randn(40, 6, dtype=torch.float32)
    model = shifted(copy.deepcopy(base))
    y = model(x)
    assert (y - base(x)).abs().max() > 1e-2
    by_hand = copy.deepcopy(base)
    for name, (a, b) in svfit_lora(model).items():
        by_hand.get_submodule(name).weight.data += b @ a
    torch.testing.assert_close(by_hand(x), y, rtol=1e-5, atol=1e-6)
    off = copy.deepcopy(model)
    assert unload_svfit(off) == ["0", "2"]
    assert torch.equal(off(x), base(x))
    assert merge_svfit(model) == ["0", "2"]
    torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-6)
    assert set(model.state_dict()) == set(base.state_dict())
    assert merge_svfit(model) == []


def test_merging_unties_a_shared_weight():
    """Fails when the merge writes into a weight that an embedding shares."""
    embedding, head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
    head.weight = embedding.weight
    model = nn.ModuleDict({"embedding": embedding, "head": head})
    before = embedding.weight.detach().clone()
    shifted(model, target_modules=["head"])
    merge_svfit(model)
    assert torch.equal(embedding.weight, before)
    assert not torch.equal(model["head"].weight, before)


def test_code_that_reads_the_weight_gets_the_shifted_one():
    """Attention and fused kernels read `weight` instead of calling the layer; fails when they see the base."""
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    x = randn(2, 3, 8, dtype=torch.float32)
    shifted(attention, target_modules=["out_proj"])
    y, _ = attention(x, x, x)
    y.sum().backward()
    assert attention.out_proj.directions.trained.grad.abs().max() > 0
    merge_svfit(attention)
    torch.testing.assert_close(attention(x, x, x)[0], y, rtol=1e-5, atol=1e-6)


def test_parametrization_equals_layer():
    """The other form: same outputs, and gradients, for a linear weight and a convolution's."""
    for layer, x in layers():
        new = adapted(layer, rank=3)
        plain = copy.deepcopy(layer).requires_grad_(False)
        form = SingularValueShift.of(plain.weight, 3, reshape=True)
        form.set_shift(new.directions.shift)
        parametrize.register_parametrization(plain, "weight", form)
        for one in (new, plain):
            one(x).square().sum().backward()
        torch.testing.assert_close(plain(x), new(x), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(form.trained.grad, new.directions.trained.grad, rtol=1e-9, atol=1e-9)


def test_failed_injection_leaves_the_model_alone():
    """Fails when layers are replaced before all of them were looked at."""
    model = network()
    with pytest.raises(ValueError, match=r"'4'.*at most 3"):
        inject_svfit(model, rank=5)
    assert not list(svfit_layers(model))
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="itself the layer"):
        inject_svfit(nn.Linear(3, 2))
    with pytest.raises(ValueError, match=r"write \['0'\]"):
        inject_svfit(model, target_modules="0")
    with pytest.warns(NoEffectWarning, match="no linear layer"):
        inject_svfit(nn.Sequential(nn.ReLU()))


def test_weight_decay_on_the_shift_is_fine():
    model = network()
    inject_svfit(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (group,) = svfit_param_groups(model, lr=1e-2, weight_decay=0.1)
    assert group["weight_decay"] == 0.1
    assert svfit_param_groups(network()) == []


def test_term_is_the_same_surgery():
    model = network()
    term = SVFit(rank=2, target_modules=["0"], lr=1e-2)
    term.attach(model)
    (group,) = term.param_groups(model)
    assert [p.numel() for p in group["params"]] == [2]
    assert group["lr"] == 1e-2


def test_quantised_base_with_its_dequantised_weight():
    """The shift form leaves the integers alone; output = quantised layer + branch, and the shift learns."""
    torch.manual_seed(0)
    quantised = Int8Linear(nn.Linear(6, 4))
    layer = SVFitLayer.of(quantised, 3, weight=quantised.dequantised())
    x = randn(50, 6, dtype=torch.float32)
    assert torch.equal(layer(x), quantised(x))
    layer.directions.set_shift(torch.tensor([0.3, -0.2, 0.1]))
    expected = F.linear(x, layer.directions(quantised.dequantised()), quantised.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)
    layer(x).sum().backward()
    assert layer.directions.trained.grad.abs().max() > 0


# -- tiny files ---------------------------------------------------------------------------------


@pytest.mark.parametrize("basis", [False, True])
def test_file_gives_the_same_model(tmp_path, basis):
    """Through safetensors onto a fresh base: equal outputs, and training goes on from there in either form."""
    base, x = network(), randn(10, 6, dtype=torch.float32)
    model = shifted(copy.deepcopy(base), rank=3)
    file = tmp_path / "adapter.safetensors"
    save_file(svfit_state_dict(model, basis=basis), file)
    for decay in ("shift", "sigma"):
        fresh = copy.deepcopy(base)
        assert load_svfit_state_dict(fresh, load_file(file), decay=decay) == ["0", "2"]
        torch.testing.assert_close(fresh(x), model(x), rtol=1e-5, atol=1e-6)
        assert sum(p.numel() for p in fresh.parameters() if p.requires_grad) == 6
        torch.testing.assert_close(svfit_state_dict(fresh)["0.shift"], svfit_state_dict(model)["0.shift"])


def test_file_is_tiny():
    model = nn.Sequential(nn.Linear(128, 128))
    inject_svfit(model)
    state = svfit_state_dict(model)
    size = sum(t.numel() * t.element_size() for t in state.values()) - state["checksum"].numel()
    assert size <= 128 * 4 + 32 + 5 * 8
    assert state["checksum"].numel() == 32


def test_file_with_basis_decomposes_nothing(monkeypatch):
    """Fails when loading a stored basis decomposes the weight again, or does not use what is stored."""
    base = nn.Sequential(nn.Linear(4, 4))
    nn.init.eye_(base[0].weight)  # all values equal: the basis is anybody's guess
    model, x = copy.deepcopy(base), randn(10, 4, dtype=torch.float32)
    shifted(model, rank=2, target_modules=["0"])
    turn = torch.linalg.qr(randn(4, 4, dtype=torch.float32))[0]
    d = model[0].directions
    d.left.copy_(turn[:, :2])
    d.right.copy_(turn[:, :2].T)
    state = svfit_state_dict(model, basis=True)
    monkeypatch.setattr("torch.linalg.svd", lambda *a, **k: pytest.fail("decomposed"))
    load_svfit_state_dict(base, state)
    torch.testing.assert_close(base(x), model(x))
    with pytest.raises(ValueError, match="nearly equal"):
        svfit_state_dict(base)


def test_file_of_another_model_is_refused_and_changes_nothing():
    """One changed bit of the base weight, another layer, a basis that turned: each is an error."""
    base = network()
    state = svfit_state_dict(shifted(copy.deepcopy(base)))
    other = copy.deepcopy(base)
    other[2].weight.data[0, 0] += 1e-6
    with pytest.raises(ValueError, match=r"'2'.*fingerprint"):
        load_svfit_state_dict(other, state)
    assert not list(svfit_layers(other))
    with pytest.raises(ValueError, match="does not have"):
        load_svfit_state_dict(nn.Sequential(nn.ReLU()), state)
    with pytest.raises(ValueError, match="adapted already"):
        load_svfit_state_dict(shifted(copy.deepcopy(base)), state)
    witness = state["0.witness"].clone()
    witness[0] += 0.1
    turned = {name: t for name, t in state.items() if name != "checksum"} | {"0.witness": witness}
    with pytest.raises(ValueError, match="other singular vectors"):
        load_svfit_state_dict(base, {**turned, "checksum": files._checksum(turned)})


@pytest.mark.parametrize("basis", [False, True])
def test_damaged_numbers_are_refused(basis):
    """Fails when a flipped bit, a rounded type or a lost entry of the file is another adapter, silently."""
    base = network()
    state = svfit_state_dict(shifted(copy.deepcopy(base)), basis=basis)
    for name, tensor in state.items():
        flipped = tensor.clone()
        flipped.reshape(-1).view(torch.uint8)[-1] ^= 1
        with pytest.raises(ValueError, match=r"checksum is missing or differs.*again"):
            load_svfit_state_dict(base, {**state, name: flipped})
    for other in ({k: t for k, t in state.items() if k != "checksum"}, {**state, "0.shift": state["0.shift"].double()}):
        with pytest.raises(ValueError, match="checksum is missing or differs"):
            load_svfit_state_dict(base, other)
    assert not list(svfit_layers(base))


def test_witness_sees_directions_that_turned_into_each_other():
    """By a tenth of a radian in one pair of many; rounding of float32 goes unseen. Fails for a witness of sums only."""
    d = SingularValueShift.of(randn(64, 48))
    witness = basis_witness(d.left, d.right)
    turn = torch.eye(48, dtype=torch.float64)
    c, s = torch.cos(torch.tensor(0.1)), torch.sin(torch.tensor(0.1))
    turn[7:9, 7:9] = torch.tensor([[c, -s], [s, c]])
    with pytest.raises(ValueError, match="other singular vectors"):
        check_basis(witness, d.left @ turn, turn.T @ d.right, gap=1.0, name="x")
    turned = basis_witness(d.left @ turn, turn.T @ d.right)
    assert (turned - witness)[:-1].abs().max() > 1e-3 * witness[-1]
    check_basis(witness, d.left.float(), d.right.float(), gap=1.0, name="x")


def test_fingerprint_sees_values_and_shape_not_the_type_they_are_kept_in():
    weight = randn(4, 6).bfloat16()
    assert weight_fingerprint(weight) == weight_fingerprint(weight.float())
    assert weight_fingerprint(weight) != weight_fingerprint(weight.view(6, 4))
    assert weight_fingerprint(weight) != weight_fingerprint(weight.T)
    assert weight_fingerprint(weight.T) == weight_fingerprint(weight.T.contiguous())
    assert relative_gap(torch.zeros(3), 1) == 0.0


def test_model_state_goes_on_bit_for_bit():
    """The ordinary state_dict of an injected model holds the basis: nothing depends on decomposing again."""
    model = shifted(network())
    twin = network()
    inject_svfit(twin, target_modules=["0", "2"])
    twin.load_state_dict(model.state_dict())
    x = randn(10, 6, dtype=torch.float32)
    assert torch.equal(twin(x), model(x))
    assert torch.equal(copy.deepcopy(model)(x), model(x))


def test_weight_is_summed_in_float32():
    """A shift of a thousandth on a bfloat16 weight is rounded once, at the end."""
    weight = randn(32, 32).bfloat16()
    d = SingularValueShift.of(weight.double())
    exact = shifted_weight(weight.double(), d.left, torch.full((32,), 0.05, dtype=torch.float64), d.right)
    rounded = shifted_weight(weight, d.left.float(), torch.full((32,), 0.05), d.right.float())
    assert torch.equal(rounded, exact.bfloat16())
