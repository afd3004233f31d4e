import tracemalloc
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, TensorDataset

from regularized.training import IndexedDataset, TensorData
from regularized.training.data import as_source, epoch_order, share
from regularized.training.randomness import rng_state, seed_all, set_rng_state

X, Y = torch.arange(20.0).view(10, 2), torch.arange(10)
DATASET = TensorDataset(X, Y)


def indices(source, epoch=0, **position):
    return [batch.index.tolist() for batch in source.batches(epoch, **position)]


@given(st.integers(0, 100), st.integers(1, 9))
def test_shares_are_those_of_array_split(size, world):
    """Fails if parts overlap, leave a sample out, or are of another order than NumPy's."""
    ours = [list(range(size))[share(size, rank, world)] for rank in range(world)]
    assert ours == [part.tolist() for part in np.array_split(np.arange(size), world)]


@given(st.integers(1, 50), st.integers(0, 3), st.integers(0, 3))
def test_order_is_a_permutation_and_pure(size, seed, epoch):
    """Fails if the order depends on the global generator, or leaves a sample out."""
    first = epoch_order(size, seed=seed, epoch=epoch)
    torch.rand(3)
    assert torch.equal(first, epoch_order(size, seed=seed, epoch=epoch))
    assert sorted(first.tolist()) == list(range(size))


def test_orders_differ_between_epochs_and_seeds():
    """Fails if seed + epoch is all that counts, so that seed 0, epoch 1 is seed 1, epoch 0."""
    orders = {tuple(epoch_order(50, seed=s, epoch=e).tolist()) for s in range(5) for e in range(5)}
    assert len(orders) == 25


KINDS = {
    "tensors": lambda: TensorData(X, Y, batch_size=4),
    "loader": lambda: as_source(DataLoader(DATASET, batch_size=4, shuffle=True), seed=0),
    "indexed": lambda: as_source(DataLoader(IndexedDataset(DATASET), batch_size=4, shuffle=True), seed=0),
    "batched": lambda: as_source(
        DataLoader(DATASET, sampler=BatchSampler(RandomSampler(DATASET), 4, False), batch_size=None), seed=0
    ),
    "workers": lambda: as_source(
        DataLoader(DATASET, batch_size=4, shuffle=True, num_workers=1, persistent_workers=True), seed=0
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_data_has_the_same_order_from_any_position(kind):
    """Fails if a loader's order is not the seeded one, the index does not belong to its sample, or a start is off."""
    source, reference = KINDS[kind](), TensorData(X, Y, batch_size=4)
    assert len(source) == 3
    for epoch in (0, 2):
        assert indices(source, epoch) == indices(reference, epoch)
        for start in range(4):
            assert indices(source, epoch, start=start) == indices(reference, epoch)[start:]
    for batch in source.batches(1):
        assert torch.equal(batch.targets, batch.index)
        assert torch.equal(batch.inputs, X[batch.index])


@pytest.mark.parametrize("kind", ["tensors", "loader", "batched"])
@pytest.mark.parametrize("world", [2, 3, 4])
def test_processes_split_every_batch(kind, world):
    """Fails if several processes see other samples, or another order, than one; the last batch here has 2 samples."""
    whole = indices(KINDS[kind]())
    parts = [indices(KINDS[kind](), rank=rank, world=world) for rank in range(world)]
    assert [[row for part in parts for row in part[i]] for i in range(3)] == whole
    sizes = [len(part[2]) for part in parts]
    assert sizes == [1, 1, 0, 0][:world]


def test_an_empty_part_has_the_form_of_a_batch():
    """Fails if a process without samples gets something that a model cannot take."""
    for kind in ("tensors", "loader"):
        *_, last = KINDS[kind]().batches(0, rank=2, world=3)
        assert last.inputs.shape == (0, 2)
        assert last.targets.shape == last.index.shape == (0,)


def test_iterables_are_split_and_skipped():
    """Fails if an iterable is not read from the beginning, or each process gets all of a batch."""
    source = as_source([(X[i : i + 4], Y[i : i + 4]) for i in (0, 4, 8)], seed=0)
    got = [b.targets.tolist() for b in source.batches(0, start=1, rank=1, world=2)]
    assert got == [[6, 7], [9]]


def test_skipping_happens_at_once():
    """Fails if an iterable is skipped at the first request: its random draws would fall into the training."""
    drawn = []

    class Counting:
        def __iter__(self):
            for i in range(3):
                drawn.append(i)
                yield X[i : i + 2]

    source = as_source(Counting(), seed=0, length=3)
    source.batches(0, start=2)
    assert drawn == [0, 1]


@pytest.mark.parametrize("shuffle", [True, False])
def test_the_order_of_an_epoch_stays_a_tensor(shuffle):
    """Fails when all samples of a large data set become Python's numbers before the first batch."""
    size = 300_000
    dataset = TensorDataset(torch.zeros(size, 1))
    source = as_source(DataLoader(dataset, batch_size=1000, shuffle=shuffle), seed=0)
    tracemalloc.start()
    try:
        batches = source.batches(0)
        first = next(batches).index
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2 * size
    order = epoch_order(size, seed=0, epoch=0, shuffle=shuffle)
    seen = torch.cat([first, *(batch.index for batch in islice(batches, 9))])
    assert torch.equal(seen, order[: len(seen)])


def test_sampler_of_its_own_is_asked_once_an_epoch_and_kept():
    """Fails if a sampler whose order depends on what was learned gives another order after an interruption."""

    class Adaptive(torch.utils.data.Sampler):
        asked = 0
        epochs = ()

        def set_epoch(self, epoch):
            self.epochs = (*self.epochs, epoch)

        def __iter__(self):
            self.asked += 1
            return iter(torch.randperm(10).roll(self.asked).tolist())

        def __len__(self):
            return 10

    def source(sampler):
        return as_source(DataLoader(DATASET, batch_size=4, sampler=sampler), seed=0)

    sampler = Adaptive()
    first = source(sampler)
    order = indices(first, 1)
    assert indices(first, 1, start=1) == order[1:]
    assert (sampler.asked, sampler.epochs) == (1, (1,))
    other = Adaptive()
    other.asked = 5  # it has learned something since
    resumed = source(other)
    resumed.load_state_dict(first.state_dict())
    assert indices(resumed, 1, start=1) == order[1:]
    assert indices(resumed, 2) != indices(first, 1)


def test_sampler_with_a_generator_is_a_function_of_the_epoch():
    """Fails if the state of a sampler's own generator decides (it is lost at a restart)."""

    def source():
        sampler = RandomSampler(DATASET, replacement=True, generator=torch.Generator().manual_seed(3))
        return as_source(DataLoader(DATASET, batch_size=4, sampler=sampler), seed=0)

    one, two = source(), source()
    assert indices(one, 0) != indices(one, 1)
    assert indices(one, 1) == indices(two, 1)


def test_reading_leaves_the_global_generators_alone():
    """Fails if the order of the data depends on, or changes, what a model draws."""
    for make in KINDS.values():
        seed_all(1)
        source = make()
        before = torch.get_rng_state()
        list(source.batches(0))
        assert torch.equal(before, torch.get_rng_state())


def test_random_state_goes_round():
    """Fails if one of the generators is not restored."""
    import random

    seed_all(3)
    state = rng_state()
    draw = lambda: (random.random(), float(np.random.rand()), float(torch.rand(())))  # noqa: E731, NPY002
    first = draw()
    set_rng_state(state)
    assert draw() == first


def test_mapping_inputs_and_extras():
    """Fails if tensors of a batch are taken from different samples."""
    data = TensorData({"a": X, "b": X + 1}, extras={"weight": Y}, batch_size=3, drop_last=True)
    assert len(data) == 3
    for batch in data.to("cpu").batches(0):
        assert torch.equal(batch.inputs["b"], X[batch.index] + 1)
        assert torch.equal(batch.extras["weight"], batch.index)
        assert batch.targets is None
        assert batch.size == 3


def test_indexed_dataset_keeps_the_form_of_samples():
    """Fails if a mapping or a bare sample loses its form, or batched access its order."""

    class Batched(torch.utils.data.Dataset):
        def __getitems__(self, rows):
            return [{"x": row} for row in rows]

        def __getitem__(self, row):
            return {"x": row}

        def __len__(self):
            return 3

    assert IndexedDataset(Batched())[1] == {"x": 1, "index": 1}
    assert IndexedDataset(Batched()).__getitems__([2, 0]) == [{"x": 2, "index": 2}, {"x": 0, "index": 0}]
    assert IndexedDataset([10, 20])[1] == {"inputs": 20, "index": 1}
    assert len(IndexedDataset([10, 20])) == 2


class Stream(IterableDataset):
    def __iter__(self):
        return iter([0])


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: TensorData(X, Y[:3], batch_size=2), ValueError, "'targets': 3"),
        (lambda: TensorData(X[:0], batch_size=2), ValueError, "at least one"),
        (lambda: TensorData(X, batch_size=0), ValueError, "batch_size"),
        (lambda: TensorData(X, batch_size=11, drop_last=True), ValueError, "drop_last"),
        (lambda: TensorData(X.numpy(), batch_size=2), TypeError, "as_tensor"),
        (lambda: IndexedDataset(Stream()), TypeError, "yield it yourself"),
        (lambda: as_source(3, seed=0), TypeError, "int"),
        (lambda: as_source(iter([X]), seed=0), ValueError, "batches_per_epoch"),
        (lambda: as_source([], seed=0), ValueError, "no batch"),
        (lambda: as_source(DATASET, seed=0), TypeError, r"yields samples, and no batches; give DataLoader\("),
        (lambda: as_source(IndexedDataset(DATASET), seed=0), TypeError, "yields samples, and no batches"),
        (lambda: as_source({"train": DATASET}, seed=0), TypeError, r"one of its parts, \['train'\]"),
    ],
)
def test_bad_arguments(call, error, says):
    """Fails if a wrong argument is taken silently."""
    with pytest.raises(error, match=says):
        call()
