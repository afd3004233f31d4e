"""Annealed layers, their schedule in a loop, freezing, packing and files of `hestia`."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from regularized.compression.hestia import (
    Annealer,
    Annealing,
    Hestia,
    PackedLinear,
    anneal,
    anneal_weights,
    annealed_weights,
    freeze_weights,
    latent_weights,
    load_packed,
    pack_codes,
    pack_weights,
    quantize_weight,
    save_packed,
    size_in_bytes,
    soft_evaluation,
    temperature_factors,
    unpack_codes,
    unpack_weights,
)
from regularized.evidence.models import mlp
from regularized.training.data import TensorData
from regularized.training.terms import CrossEntropy
from regularized.training.trainer import Trainer


def network(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return mlp([16, 24, 4]).to(dtype)


def annealed(**options):
    model = network()
    anneal_weights(model, group_size=8, **options)
    return model


def data(n=32):
    g = torch.Generator().manual_seed(1)
    return torch.randn(n, 16, generator=g), torch.randint(4, (n,), generator=g)


def trained(model, steps=8, **options):
    x, y = data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    annealer = Annealer(model, total_steps=steps, **options)
    for step in range(steps):
        annealer.step(step)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return annealer


# -- surgery ----------------------------------------------------------------------------------------


def test_parameters_stay_the_optimizers():
    """Fails when surgery makes new parameters: an optimizer built before would train nothing."""
    model = network()
    before = [id(p) for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    anneal_weights(model, group_size=8)
    assert sorted(before) == sorted(id(p) for p in model.parameters())
    x, y = data()
    F.cross_entropy(model(x), y).backward()
    start = latent_weights(model)["0"].clone()
    optimizer.step()
    assert not torch.equal(start, latent_weights(model)["0"])


def test_training_and_evaluation_compute_with_what_they_should():
    """Fails when evaluation is soft, the bias dropped (both as in the official layer), or pressure 0 is not plain."""
    model, plain = annealed(), network()
    x, _ = data()
    assert torch.equal(model(x), plain(x))
    hard = network()
    for layer in (hard[0], hard[2]):
        layer.weight.data = quantize_weight(layer.weight, group_size=8)
    assert torch.equal(model.eval()(x), hard(x))
    with soft_evaluation(model):
        assert torch.equal(model(x), plain(x))
    assert torch.equal(model(x), hard(x))
    annealed_weights(model)["0"].set(pressure=0.5, temperature=0.3)
    expected = anneal(plain[0].weight, temperature=0.3, pressure=0.5, group_size=8)
    assert torch.equal(model.train()[0].weight, expected)


def test_nothing_is_kept_for_the_backward_pass_but_the_latent_weight():
    """Fails when the forward pass saves z, the softmax or the soft weight: memory of 3 to 5 weights a layer."""
    model = nn.Sequential(nn.Linear(64, 32, bias=False))
    anneal_weights(model, group_size=32)
    annealed_weights(model)["0"].set(pressure=0.5, temperature=0.3)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        x = torch.randn(4, 64, requires_grad=True)
        model(x)
    own = [t for t in kept if t.numel() >= 64 * 32]
    latent = latent_weights(model)["0"]
    assert sum(t.data_ptr() == latent.data_ptr() for t in own) == 1
    assert len(own) == 2  # the linear layer keeps the weight that it multiplied with


def test_state_carries_the_point_of_the_schedule():
    """Fails when a loaded or copied model starts its schedule anew."""
    model = annealed()
    Annealer(model, total_steps=10).step(7)
    at = annealed_weights(model)["0"]
    other = annealed()
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    for again in (annealed_weights(other)["0"], annealed_weights(copy.deepcopy(model))["0"]):
        assert (again.pressure, again.temperature) == (at.pressure, at.temperature) != (0.0, 0.0)


# -- schedule ---------------------------------------------------------------------------------------


def test_each_layer_follows_its_factor():
    """Fails when all layers share a temperature in spite of their traces, or the pressure hangs on them."""
    model = annealed()
    factors = temperature_factors({"0": 100.0, "2": 1.0})
    annealer = Annealer(model, total_steps=10, annealing=Annealing(temperature=0.3), factors=factors)
    annealer.step(1)
    first, last = annealed_weights(model).values()
    assert first.pressure == last.pressure == 0.5
    assert first.temperature == pytest.approx(0.3 * factors["0"])
    assert last.temperature == pytest.approx(0.3 * factors["2"])
    annealer.finish()
    assert first.is_hard
    assert last.is_hard


def test_temperature_zero_is_straight_through_training():
    """Fails when the baseline differs from rounding with an identity gradient."""
    model = annealed()
    trained(model, annealing=Annealing(compress=0.0, temperature=0.0))
    x, y = data()
    reference = network()
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.2)
    for _ in range(8):
        optimizer.zero_grad()
        h = x
        for layer in reference:
            if isinstance(layer, nn.Linear):
                hard = quantize_weight(layer.weight, group_size=8)
                h = F.linear(h, layer.weight + (hard - layer.weight).detach(), layer.bias)
            else:
                h = layer(h)
        F.cross_entropy(h, y).backward()
        optimizer.step()
    for ours, theirs in zip(latent_weights(model).values(), (reference[0].weight, reference[2].weight), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_term_moves_as_the_loop_of_ones_own():
    """Fails when the term is a step late or early, or does not end hard."""
    seen = []

    class Watched(Hestia):
        def _move(self, step, total_steps):
            super()._move(step, total_steps)
            at = annealed_weights(self._model[0])["0"]
            seen.append((at.pressure, at.temperature))

    x, y = data()
    model = network()
    trainer = Trainer(
        model,
        terms={"task": CrossEntropy(), "hestia": Watched(group_size=8)},
        optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1),
    )
    trainer.fit(TensorData(x, y, batch_size=8), epochs=2)
    own = annealed()
    annealer = Annealer(own, total_steps=8)
    expected = []
    for step in range(9):
        annealer.step(step)
        at = annealed_weights(own)["0"]
        expected.append((at.pressure, at.temperature))
    assert list(dict.fromkeys(seen)) == expected
    assert all(weight.is_hard for weight in annealed_weights(model).values())


# -- the end ----------------------------------------------------------------------------------------


def test_frozen_model_is_what_was_evaluated():
    """Fails when freezing rounds otherwise than evaluation, or leaves parametrizations."""
    model = annealed()
    trained(model).finish()
    x, _ = data()
    hard = model.eval()(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert freeze_weights(model) == ["0", "2"]
    assert torch.equal(model(x), hard)
    assert set(model.state_dict()) == set(network().state_dict())
    for group in model[0].weight.detach().reshape(-1, 8):
        assert len(group.unique()) <= 3
    assert freeze_weights(model) == []  # once: a second time there is nothing to freeze


def test_freezing_early_says_what_it_costs():
    """Fails when the gap is that of one model, or looking leaves another mode behind."""
    model = annealed()
    x, y = data()

    def loss(m):
        return F.cross_entropy(m(x), y)

    soft = loss(model).item()
    hard = loss(model.eval()).item()
    model.train()
    with pytest.warns(UserWarning, match=f"{soft:.4g} .soft. to {hard:.4g} .hard."):
        freeze_weights(model, loss=loss)
    assert model.training
    assert model[0].training


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("width", [1, 7, 8, 13])
def test_packing_is_exact(bits, width):
    """Fails for codes in the wrong place, rows that are not filled up, or signed shifts."""
    codes = torch.randint(2**bits, (3, 2, width), generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)
    packed = pack_codes(codes, bits)
    assert packed.shape == (3, 2, -(-width * bits // 8))
    assert torch.equal(unpack_codes(packed, width, bits), codes)


def test_place_of_a_code_in_its_byte():
    """Fails when the format on disk changes: the first code is in the lowest bits."""
    assert pack_codes(torch.tensor([3, 0, 1, 2], dtype=torch.uint8)).tolist() == [0b10010011]


@pytest.mark.parametrize("codebook", ["binary", "ternary", "quaternary", (-2.0, -0.5, 0.0, 0.7, 1.0)])
@pytest.mark.parametrize("group_size", [0, -1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_layer_computes_the_same_bits(codebook, group_size, dtype):
    """Fails when the table of bytes, the scales, or the rows that were filled up are misread."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 3, bias=False)).to(dtype).eval()
    anneal_weights(model, codebook=codebook, group_size=group_size, exclude=["2"] if group_size == 4 else [])
    x = torch.randn(7, 12, dtype=dtype)
    expected = model(x)
    pack_weights(model)
    assert isinstance(model[0], PackedLinear)
    assert torch.equal(model(x), expected)
    unpack_weights(model)
    assert type(model[0]) is nn.Linear
    assert torch.equal(model(x), expected)


def test_packed_model_trains_what_is_left_and_moves():
    """Fails when gradients stop at a packed layer, or casting the model rounds its scales."""
    model = annealed()
    pack_weights(model)
    x = data()[0].requires_grad_()
    model(x).sum().backward()
    assert x.grad is not None
    assert model[0].bias.grad is not None
    expected = model[0].weight
    model.to(torch.bfloat16)
    assert torch.equal(model[0].weight, expected)
    assert model(x.bfloat16()).dtype == torch.bfloat16


def test_size():
    """Fails when something of full precision stays: two bits a weight and a float32 for each group."""
    model = nn.Sequential(nn.Linear(256, 64, bias=False))
    anneal_weights(model)
    pack_weights(model)
    assert size_in_bytes(model) == 64 * 256 // 4 + 64 * 2 * 4


def test_file_round_trip_with_tied_weights(tmp_path):
    """Fails when a tied embedding is written twice or refused, or the loaded model differs in a bit."""

    def build():
        torch.manual_seed(0)
        model = nn.ModuleDict(
            {"embed": nn.Embedding(11, 8), "mix": nn.Linear(8, 8), "head": nn.Linear(8, 11, bias=False)}
        )
        model["head"].weight = model["embed"].weight
        return model

    def outputs(model):
        return model["head"](torch.tanh(model["mix"](model["embed"](torch.arange(11)))))

    model = build().eval()
    anneal_weights(model, group_size=-1, exclude=["head"])
    pack_weights(model)
    save_packed(model, tmp_path)
    fresh = build().eval()
    with torch.no_grad():
        fresh["embed"].weight.zero_()
    load_packed(fresh, tmp_path)
    assert torch.equal(outputs(fresh), outputs(model))
    assert fresh["head"].weight is fresh["embed"].weight
    assert (tmp_path / "packed.safetensors").stat().st_size < 2 * size_in_bytes(model) + 1024


def test_annealing_learns():
    """Fails when the gradient does not train the hard model: it must leave chance far behind."""
    torch.manual_seed(0)
    x = torch.randn(512, 16)
    y = x[:, :4].argmax(1)
    model = mlp([16, 48, 4])
    anneal_weights(model, group_size=-1)
    annealer = Annealer(model, total_steps=150)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for step in range(150):
        annealer.step(step)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    annealer.finish()
    assert float((model.eval()(x).argmax(1) == y).float().mean()) > 0.8
