"""Sparse models on disk and on kernels that skip their zeros."""

import copy

import pytest
import torch
from tests.bad_input import assert_refused
from torch import nn

from regularized.compression.cast import (
    load_sparse,
    pack_sparse,
    save_sparse,
    semi_structured_mask,
    to_semi_structured,
    unpack_sparse,
)


def weight(pattern=(2, 4), shape=(32, 64), dtype=torch.float32):
    dense = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    return dense.masked_fill(~semi_structured_mask(dense, pattern), 0.0)


def network(pattern=(2, 4)):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Linear(64, 64))
    model[0].weight.data = weight(pattern, (64, 64))
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pattern", [(2, 4), (1, 4), (3, 8), (2, 16), (1, 2), (3, 32)])
def test_packed_and_unpacked(pattern, dtype):
    """Fails when a place is written in too few bits, or bytes are read in another order; rows need not fill bytes."""
    sparse = weight(pattern, (3, 32), dtype)
    sparse[0, : pattern[1]] = 0.0  # fewer than N
    values, places = pack_sparse(sparse, pattern)
    assert values.shape == (3, 32 * pattern[0] // pattern[1])
    assert torch.equal(unpack_sparse(values, places, pattern), sparse)


def test_places_are_two_bits_a_value():
    """Fails when the form grows: half of the values, and a bit for each entry of the dense weight."""
    values, places = pack_sparse(weight())
    assert (values.numel(), len(places)) == (32 * 64 // 2, 32 * 64 // 8)


def test_saved_and_loaded(tmp_path):
    """Fails when a weight comes back otherwise, or the file holds what it need not: bytes are counted on disk."""
    model = network()
    assert save_sparse(model, tmp_path) == ["0.weight"]
    other = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Linear(64, 64))
    assert load_sparse(other, tmp_path) is other
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name
    dense = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    saved = (tmp_path / "sparse.safetensors").stat().st_size
    assert saved - (dense - 64 * 64 * 4 * 15 // 32) < 1200  # the names and places of 12 tensors


def test_tied_weights_are_saved_once(tmp_path):
    """Fails when a weight of two names cannot be saved, or only one of them is filled."""

    def tied():
        model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False))
        model[1].weight = model[0].weight
        return model

    model, other = tied(), tied()
    model[0].weight.data = weight((2, 4), (64, 64))
    save_sparse(model, tmp_path)
    load_sparse(other, tmp_path)
    assert torch.equal(other[1].weight, model[0].weight)


def test_files_of_something_else_are_refused(tmp_path):
    """Fails when a dense weight is packed, or a damaged or foreign file is loaded."""
    dense = nn.Linear(8, 4)
    assert_refused(lambda: pack_sparse(dense.weight), ValueError, ("(4, 8)", "2:4", "finalize()"))
    assert_refused(lambda: save_sparse(dense, tmp_path), ValueError, ("2:4", "finalize()"))
    values, places = pack_sparse(weight())
    assert_refused(lambda: unpack_sparse(values, places[1:]), ValueError, ("(32, 32)", "255 bytes"))
    assert_refused(lambda: to_semi_structured(dense), ValueError, ("Linear", "finalize()", "semi_structured_mask"))
    save_sparse(network(), tmp_path)
    assert_refused(lambda: load_sparse(nn.Linear(64, 64), tmp_path), ValueError, ("another architecture", "Linear"))
    content = bytearray((tmp_path / "sparse.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "sparse.safetensors").write_bytes(content)
    assert_refused(lambda: load_sparse(network(), tmp_path), ValueError, ("checksum",))


@pytest.mark.skipif(torch.cuda.is_available(), reason="not applicable: there may be sparse kernels")
def test_without_kernels_it_stays_dense():
    """Fails when a layer is lost or changed where nothing can run it, or a layer without the pattern is reported."""
    model = network().eval()
    x = torch.randn(5, 64)
    before = model(x)
    done = to_semi_structured(model)
    assert done.sparse == ()
    assert list(done.dense) == ["0"]
    assert "cpu is not supported" in done.dense["0"]
    assert torch.equal(model(x), before)


def test_weights_are_what_the_kernels_take():
    """Fails when the pattern lies along the other axis: torch's own packing must give the weight back."""
    forms = pytest.importorskip("torch.sparse._semi_structured_conversions")
    sparse = weight(dtype=torch.bfloat16)
    values, meta = forms.sparse_semi_structured_from_dense_cutlass(sparse)
    assert torch.equal(forms.sparse_semi_structured_to_dense_cutlass(values, meta), sparse)
    assert torch.equal(values, pack_sparse(sparse)[0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with sparse kernels")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sparse_kernels_compute_the_dense_result(dtype):
    """Fails when the kernels' product is not that of the dense weight up to rounding."""
    model = network().eval().to("cuda", dtype)
    dense, x = copy.deepcopy(model), torch.randn(16, 64, device="cuda", dtype=dtype)
    assert to_semi_structured(model).sparse == ("0",)
    torch.testing.assert_close(model(x), dense(x), rtol=2e-2, atol=2e-2)
