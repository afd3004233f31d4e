"""Codes and files: what is written comes back bit for bit, and what was not written is refused."""

import json
import lzma
import tracemalloc
import zlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from regularized.compression.generalized_gaussian import (
    code_length,
    golomb_decode,
    golomb_encode,
    golomb_lengths,
    load_compressed,
    quantize,
    save_compressed,
)
from regularized.compression.generalized_gaussian.coding import Coded, decode, encode
from regularized.mechanisms.sealed_files import load_sealed, save_sealed

CODERS = ("range", "golomb", "lzma")


def model(seed=0):
    torch.manual_seed(seed)
    layers = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(32, 40), nn.ReLU(), nn.Linear(40, 32)
    )
    layers.append(nn.Linear(32, 40, bias=False))
    layers[-1].weight = layers[3].weight  # tied
    return layers


# -- exponential Golomb -------------------------------------------------------------------------


def test_golomb_lengths():
    """Fails for another code: 1, 3, 3, 5, 5, 5, 5 bits of order 0, and 2, 2, 4, 4, 4, 4, 6 of order 1."""
    assert golomb_lengths(torch.arange(7)).tolist() == [1, 3, 3, 5, 5, 5, 5]
    assert golomb_lengths(torch.arange(7), order=1).tolist() == [2, 2, 4, 4, 4, 4, 6]


@given(st.lists(st.integers(0, 2**20), max_size=50), st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_golomb_round_trip(ranks, order):
    """Fails when a code word is the beginning of another, or the lengths are not those that are written."""
    given_ranks = torch.tensor(ranks, dtype=torch.int64)
    data = golomb_encode(given_ranks, order=order)
    assert golomb_decode(data, len(ranks), order=order).tolist() == ranks
    assert len(data) == -(-int(golomb_lengths(given_ranks, order=order).sum()) // 8)


def test_code_length():
    """Fails when the mean length is below the entropy, or equal weights take more than a bit."""
    w = torch.randn(5000, generator=torch.Generator().manual_seed(0)) * 0.1
    length = code_length([w])
    assert length.mean_bits >= length.entropy
    assert int(length.counts.sum()) == 5000
    assert code_length([torch.full((9,), 0.5)]).mean_bits == 1.0
    assert code_length([torch.full((9,), 0.5)]).entropy == 0.0


# -- coders -------------------------------------------------------------------------------------


@given(
    st.lists(
        st.lists(st.integers(-(2**31) + 1, 2**31 - 1) | st.integers(-3, 3), min_size=1, max_size=30),
        min_size=1,
        max_size=4,
    )
)
@settings(max_examples=40, deadline=None)
def test_coders_round_trip(groups):
    """Fails for numbers that a coder mixes up: large ones, negative ones, a single one, several groups."""
    tensors = [torch.tensor(group, dtype=torch.int64) for group in groups]
    for coder in CODERS:
        coded = encode(tensors, coder=coder)
        back = decode(coded, [len(t) for t in tensors], coder=coder)
        assert all(torch.equal(a, b) for a, b in zip(tensors, back, strict=True))


def test_range_coder_reaches_the_entropy():
    """Fails when the coder wastes more than a hundredth over the entropy, its table included."""
    w = torch.randn(100_000, generator=torch.Generator().manual_seed(0)) * 0.05
    numbers = torch.round(w * 256).long()
    coded = encode([numbers])
    assert 8 * (len(coded.stream) + len(coded.tables)) / len(w) < 1.01 * code_length([w]).entropy
    sizes = {coder: len(encode([numbers], coder=coder).stream) for coder in CODERS}
    assert sizes["range"] < sizes["lzma"] < sizes["golomb"]


def test_own_tables_pay_where_layers_differ():
    """Fails when layers of different spread share a table although tables of their own make a smaller file."""
    generator = torch.Generator().manual_seed(0)
    groups = [torch.round(scale * torch.randn(5000, generator=generator)).long() for scale in (1.0, 50.0)]
    alone = sum(len(part) for group in groups for part in encode([group]))
    together = encode(groups)
    assert len(together.stream) + len(together.tables) < alone + 8
    alike = [groups[0][:100], groups[0][100:200]]
    assert len(encode(alike).tables) < len(encode(alike[:1]).tables) + len(encode(alike[1:]).tables)


def _write(*values):
    data = bytearray()
    for value in values:
        while value >= 128:
            data.append(value & 127 | 128)
            value >>= 7
        data.append(value)
    return zlib.compress(bytes(data))


@pytest.mark.parametrize("coder", ["range", "golomb"])
@pytest.mark.parametrize(
    ("tables", "says"),
    [
        (b"no zlib", "damaged"),
        (b"", "damaged"),
        (_write(1, 2, 0, 1, 50, 50)[:-3], "end early"),
        (_write(1, 2, 0, 1, 50, 50) + b"x", "longer"),
        (zlib.compress(bytes(10**7)), "longer"),
        (_write(3, 1, 0, 100), "3 for 1"),
        (_write(1, 0, 0), "0 entries"),
        (_write(1, 2**40, 0), "entries"),
        (_write(1, 2, 0, 1, 50, 49), "do not add up"),
        (_write(1, 2, 0, 0, 50, 50), "out of range"),
        (_write(1, 2, 0, 1, 100, 0), "out of range"),
        (_write(1, 2, 2**40, 1, 50, 50), "out of range"),
        (_write(1, 2, 0, 1, 50, 50, 7), "follows"),
        (_write(1, 2, 0, 1, 50), "end early"),
        (_write(1, 1, 2**80, 100), "64 bits"),
        (zlib.compress(b"\x81"), "within a number"),
    ],
)
def test_hostile_tables(coder, tables, says):
    """Fails when a damaged or hostile table takes memory, hangs, or ends in another error than one that says so."""
    with pytest.raises(ValueError, match=says):
        decode(Coded(b"\0" * 16, tables), [100], coder=coder)


def test_hostile_streams():
    """Fails when a stream that is too short, no code, or a bomb ends in another error than one that says so."""
    tables = _write(1, 2, 0, 1, 50, 50)
    with pytest.raises(ValueError, match="whole number of words"):
        decode(Coded(b"\0" * 5, tables), [100])
    with pytest.raises(ValueError, match="ends or breaks after 0 of 100"):
        decode(Coded(b"\0" * 40, tables), [100], coder="golomb")
    with pytest.raises(ValueError, match="its tables do not have"):
        decode(Coded(b"\x12" * 400, tables), [100], coder="golomb")
    for stream in (b"", b"nothing", lzma.compress(bytes(10**7)), lzma.compress(bytes(150)), lzma.compress(bytes(50))):
        with pytest.raises(ValueError, match="damaged"):
            decode(Coded(stream, b""), [100], coder="lzma")


def test_a_bomb_takes_no_memory():
    """Fails when a small stream is unpacked to whatever size it says."""
    small = [{"id": lzma.FILTER_LZMA2, "dict_size": 4096}]  # the reader takes as much as this, too
    bomb = lzma.compress(bytes(10**7), filters=small)
    tracemalloc.start()
    with pytest.raises(ValueError, match="damaged"):
        decode(Coded(bomb, b""), [100], coder="lzma")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10**6


@given(st.binary(max_size=64))
@settings(max_examples=40, deadline=None)
def test_any_bytes_are_refused_or_decoded(data):
    """Fails when bytes of no code hang, crash, or give numbers of another size or outside of the tables."""
    for coder in CODERS:
        try:
            (numbers,) = decode(Coded(data, _write(1, 2, 0, 1, 50, 50)), [100], coder=coder)
        except ValueError:
            continue
        assert numbers.shape == (100,)
        if coder != "lzma":
            assert set(numbers.tolist()) <= {0, 1}


# -- files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("coder", CODERS)
@pytest.mark.parametrize("step", [2.0**-8, 0.01])
def test_file_gives_the_rounded_model(tmp_path, coder, step):
    """Fails when a weight comes back with another bit, or what is not rounded is, or a buffer is forgotten."""
    written, read = model(0), model(1)
    written[1].running_mean.fill_(0.123)
    written[1].num_batches_tracked.fill_(7)
    size = save_compressed(tmp_path, written, step=step, coder=coder)
    load_compressed(tmp_path, read)
    state = read.state_dict()
    for key, tensor in written.state_dict().items():
        assert torch.equal(state[key], quantize(tensor, step) if tensor.ndim > 1 else tensor), key
    assert size.files == sum(file.stat().st_size for file in tmp_path.iterdir())
    distinct = {id(t): t for t in written.state_dict(keep_vars=True).values()}.values()
    assert size.weights == sum(t.numel() for t in distinct)
    assert size.plain == sum(t.nbytes for t in distinct)
    assert size.bits == pytest.approx(8 * size.files / size.weights)
    assert read[3].weight is read[6].weight


def test_half_precision(tmp_path):
    """Fails when bfloat16 weights cannot be written, or come back in another type or value."""
    written, read = model(0).bfloat16(), model(1).bfloat16()
    save_compressed(tmp_path, written, coder="golomb")
    load_compressed(tmp_path, read)
    assert torch.equal(read[3].weight, quantize(written[3].weight, 2.0**-8))
    assert torch.equal(read[3].bias, written[3].bias)


def test_equal_weights_take_no_room(tmp_path):
    """Fails when a layer of zeros cannot be coded: its table has one entry, and its stream none."""
    written = nn.Sequential(nn.Linear(300, 300))
    nn.init.zeros_(written[0].weight)
    for coder in ("range", "golomb"):
        size = save_compressed(tmp_path, written, coder=coder)
        read = nn.Sequential(nn.Linear(300, 300))
        load_compressed(tmp_path, read)
        assert not read[0].weight.any()
        assert size.stream <= 90_000 / 8


def test_order_of_layers_is_the_files(tmp_path):
    """Fails when a model that has the same layers in another order gets the weights of another layer."""

    class Pair(nn.Module):
        def __init__(self, *names):
            super().__init__()
            for name in names:
                setattr(self, name, nn.Linear(6, 6 if name == "a" else 4))

    written, read = Pair("a", "b"), Pair("b", "a")
    save_compressed(tmp_path, written)
    load_compressed(tmp_path, read)
    assert torch.equal(read.a.weight, quantize(written.a.weight, 2.0**-8))


def spoiled(tmp_path, change):
    """A written file after a change of its settings and tensors, sealed again."""
    save_compressed(tmp_path, model(), coder="golomb")
    saved, tensors = load_sealed(tmp_path, "weights", version=1)
    change(saved, tensors)
    del saved["checksum"], saved["format"]
    save_sealed(tmp_path, "weights", tensors, saved, version=1)


def _stretch(saved, tensors):
    saved["rounded"]["3.weight"] = [10**9, 10**9]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_stretch, "another model: 3.weight is"),
        (lambda s, t: s.update(rounded=[1, 2]), "names no weights"),
        (lambda s, t: s["rounded"].pop("0.weight"), "0.weight is not there"),
        (lambda s, t: s.update(coder="pickle"), "coder must be"),
        (lambda s, t: s.update(coder=None), "coder must be"),
        (lambda s, t: s.update(coder="lzma"), "damaged"),
        (lambda s, t: s.update(step=-1), "step must be"),
        (lambda s, t: s.update(step="1"), "step must be"),
        (lambda s, t: s.update(digest="0"), "do not decode to those"),
        (lambda s, t: t.pop("kept.1.bias"), "tensors of another model"),
        (lambda s, t: t.update(stream=torch.zeros(3)), "tensors of another model"),
        (lambda s, t: t.update({"kept.1.bias": torch.zeros(9)}), "1.bias has shape"),
        (lambda s, t: t.update({"kept.1.bias": torch.zeros(8).double()}), "1.bias has shape"),
        (lambda s, t: t.update(stream=t["stream"][:-100]), "ends or breaks"),
    ],
)
def test_hostile_files(tmp_path, change, says):
    """Fails when a file of valid checksum and wrong content is believed, or changes the model before it is refused."""
    spoiled(tmp_path, change)
    read = model(1)
    before = {key: tensor.clone() for key, tensor in read.state_dict().items()}
    with pytest.raises(ValueError, match=says):
        load_compressed(tmp_path, read)
    assert all(torch.equal(before[key], tensor) for key, tensor in read.state_dict().items())


def test_damage(tmp_path):
    """Fails when a flipped bit in either file is not seen."""
    for ending in ("safetensors", "json"):
        save_compressed(tmp_path, model())
        file = tmp_path / f"weights.{ending}"
        data = bytearray(file.read_bytes())
        place = data.index(b"range") if ending == "json" else len(data) - 40
        data[place] ^= 1
        file.write_bytes(bytes(data))
        with pytest.raises(ValueError, match=r"checksum|damaged"):
            load_compressed(tmp_path, model(1))


def test_settings_are_json(tmp_path):
    """Fails when the settings hold what other programs cannot read."""
    save_compressed(tmp_path, model(), name="small")
    assert json.loads((tmp_path / "small.json").read_text())["coder"] == "range"
