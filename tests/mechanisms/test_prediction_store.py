"""Stores of past predictions: stated errors, sizes, and what `.to()` may touch."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regularized.mechanisms.prediction_store import DenseStore, TopKStore

shapes = st.tuples(st.integers(1, 9), st.integers(2, 40), st.integers(0, 999), st.floats(0.01, 30.0))
HALVES = (torch.float16, torch.bfloat16)


def predictions(rows: int, classes: int, seed: int, sharpness: float) -> torch.Tensor:
    return (sharpness * torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed))).softmax(dim=1)


@given(shapes, st.sampled_from(HALVES))
@settings(max_examples=80)
def test_dense_error_is_bounded(shape, dtype):
    """Fails for a bound of the wrong exponent: the widest spacing in [0, 1] is that below 1."""
    p = predictions(*shape)
    store = DenseStore(len(p), p.shape[1], dtype)
    store.write(torch.arange(len(p)), p)
    assert float((store.read(torch.arange(len(p))).double() - p.double()).abs().max()) <= store.max_error
    exact = DenseStore(len(p), p.shape[1])
    exact.write(torch.arange(len(p)), p)
    assert torch.equal(exact.read(torch.arange(len(p))), p)


@pytest.mark.parametrize("dtype", HALVES)
def test_dense_error_is_reached(dtype):
    """The bound is tight: some probability is that far off (fails for a bound that is generous by 2)."""
    grid = torch.linspace(0.0, 1.0, 100_001)[:, None].repeat(1, 2)
    store = DenseStore(len(grid), 2, dtype)
    store.write(torch.arange(len(grid)), grid)
    worst = float((store.read(torch.arange(len(grid))).double() - grid.double()).abs().max())
    assert 0.95 * store.max_error < worst <= store.max_error


@given(shapes, st.data(), st.sampled_from((torch.float32, *HALVES)))
@settings(max_examples=80)
def test_top_k_error_is_bounded(shape, data, dtype):
    """Entries within max_error, half the L1 distance within the mass not kept, rows that sum to 1."""
    p = predictions(*shape)
    rows, classes = p.shape
    k = data.draw(st.integers(1, classes - 1))
    store = TopKStore(rows, classes, k, dtype)
    store.write(torch.arange(rows), p)
    read = store.read(torch.arange(rows))
    assert float((read - p).abs().max()) <= store.max_error + 1e-6
    rounding = (store.max_error - 1 / (k + 1)) * 2
    left = 1 - p.topk(k, dim=1).values.sum(dim=1)
    assert bool((0.5 * (read - p).abs().sum(dim=1) <= left + rounding + 1e-5).all())
    assert float((read.sum(dim=1) - 1).abs().max()) <= rounding + 1e-5
    assert float(store.spread()) == pytest.approx(float(left.mean()), abs=rounding + 1e-5)
    top = p.argmax(dim=1, keepdim=True)
    assert float((read.gather(1, top) - p.gather(1, top)).abs().max()) <= rounding + 1e-6


def test_top_k_of_what_was_never_written():
    """Zeros, not an even distribution: zeros mean that there is no history."""
    store = TopKStore(4, 6, k=2)
    assert not store.read(torch.arange(4)).any()
    store.write(torch.tensor([1]), torch.full((1, 6), 1 / 6))
    assert store.seen().tolist() == [False, True, False, False]
    torch.testing.assert_close(store.read(torch.tensor([1])), torch.full((1, 6), 1 / 6), rtol=0, atol=1e-3)


@pytest.mark.parametrize("store", [DenseStore(5, 3), TopKStore(5, 3, k=2, dtype=torch.float32)])
def test_last_of_equal_indices_wins(store):
    """And the other rows stay; small integer types address rows, too."""
    rows = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8], [0.9, 0.1, 0.0]])
    store.write(torch.tensor([4, 2, 4], dtype=torch.int32), rows)
    torch.testing.assert_close(store.read(torch.tensor([4, 2])), rows[[2, 1]])
    assert store.seen().tolist() == [False, False, True, False, True]
    store.reset()
    assert not store.seen().any()


def test_read_is_a_copy():
    """Fails when what a loss computes in place with the rows would change the table."""
    store = DenseStore(2, 2)
    store.write(torch.arange(2), torch.full((2, 2), 0.5))
    store.read(torch.arange(2)).zero_()
    assert bool(store.seen().all())


@pytest.mark.parametrize("make", [lambda: DenseStore(5, 3, torch.bfloat16), lambda: TopKStore(5, 300, k=2)])
def test_state(make):
    """All of it is in the state_dict, and a deep copy is independent."""
    store = make()
    p = predictions(2, store.num_classes, 0, 1.0)
    store.write(torch.tensor([3, 1]), p)
    fresh = make()
    fresh.load_state_dict(store.state_dict())
    copied = copy.deepcopy(store)
    store.reset()
    for other in (fresh, copied):
        assert float((other.read(torch.tensor([3, 1])).float() - p).abs().max()) <= other.max_error


def test_sizes():
    """The documentation's numbers for ImageNet."""
    with torch.device("meta"):
        sizes = [
            DenseStore(1_281_167, 1000).nbytes,
            DenseStore(1_281_167, 1000, torch.float16).nbytes,
            TopKStore(1_281_167, 1000, k=10).nbytes,
        ]
    assert [round(size / 1e9, 2) for size in sizes] == [5.12, 2.56, 0.05]
    assert TopKStore(2, 40_000, k=1).classes.dtype == torch.int32


def test_host_tables_stay():
    """`.to()` moves the table, unless it is to stay in host memory."""
    moved, stays = DenseStore(2, 2).to("meta"), DenseStore(2, 2, host=True).to("meta")
    assert (moved.device.type, stays.device.type) == ("meta", "cpu")
    stays.write(torch.tensor([1]), torch.tensor([[0.5, 0.5]]))
    assert stays.read(torch.tensor([1])).tolist() == [[0.5, 0.5]]
    owner = torch.nn.ModuleList([stays]).to("meta")
    assert owner[0].device.type == "cpu"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: DenseStore(0, 3), "num_samples must be at least 1"),
        (lambda: DenseStore(3, 1), "num_classes must be at least 2"),
        (lambda: DenseStore(3, 3, torch.int8), "float16, bfloat16 to hold probabilities, got torch.int8"),
        (lambda: TopKStore(3, 3, k=3), r"k must be in \[1, num_classes - 1\] = \[1, 2\], got 3; DenseStore"),
        (lambda: TopKStore(3, 3, k=0), "got 0"),
    ],
)
def test_errors(make, words):
    """Each says what was given and what is allowed."""
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("make", [lambda: DenseStore(3, 4), lambda: TopKStore(3, 4, k=2)])
def test_a_prediction_that_is_not_finite_is_not_written(make, bad):
    """Fails if a store keeps a NaN, or forgets what it had, after a step that a training stopped at."""
    p = predictions(3, 4, 0, 2.0)
    store = make()
    store.write(torch.tensor([1]), p[:1])
    before = store.read(torch.tensor([1]))
    spoilt = p[1:].clone()
    spoilt[0, 3] = bad
    store.write(torch.tensor([1, 2]), spoilt)
    assert torch.equal(store.read(torch.tensor([1])), before)
    assert store.seen().tolist() == [False, True, True]
    assert all(buffer.isfinite().all() for buffer in store.buffers())
