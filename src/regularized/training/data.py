"""Batches for the loop, in an order that is known beforehand.

The order of an epoch is a pure function of (seed, epoch). So a run can be resumed in the middle of any epoch, any
number of times, by starting at the right batch; and several processes each take their part of the *same* global batch,
which makes them compute what one process would.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
)

from regularized.mechanisms.ranges import allowed, count
from regularized.training.identity import fingerprint
from regularized.training.randomness import mix, preserved, seed_all
from regularized.training.step import Batch

__all__ = ["IndexedDataset", "Source", "TensorData", "as_source", "epoch_order", "share"]


@runtime_checkable
class Source(Protocol):
    """What the loop reads: a fixed number of batches an epoch, from any position on.

    Two methods more are used where a source has them: ``state_dict`` with ``load_state_dict``, which go into
    checkpoints; and ``identity() -> dict``, plain values by which a run that is resumed makes sure that it has the data
    of the checkpoint.
    """

    def __len__(self) -> int:
        """Number of (micro-)batches an epoch."""
        ...

    def batches(self, epoch: int, *, start: int = 0, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """The batches of an epoch from number ``start`` on, of each the part of process ``rank`` of ``world``."""
        ...


def share(size: int, rank: int, world: int) -> slice:
    """The contiguous part of a batch that one process takes; the first ``size % world`` processes take one more.

    Examples:
        >>> [share(5, rank, 2) for rank in range(2)]
        [slice(0, 3, None), slice(3, 5, None)]
    """
    each, rest = divmod(size, world)
    start = rank * each + min(rank, rest)
    return slice(start, start + each + (rank < rest))


def epoch_order(size: int, *, seed: int, epoch: int, shuffle: bool = True) -> Tensor:
    """Order of the samples in an epoch, (size,) int64: a pure function of its arguments.

    Examples:
        >>> epoch_order(3, seed=0, epoch=0, shuffle=False)
        tensor([0, 1, 2])
        >>> torch.equal(epoch_order(9, seed=0, epoch=4), epoch_order(9, seed=0, epoch=4))
        True
    """
    if not shuffle:
        return torch.arange(size)
    return torch.randperm(size, generator=torch.Generator().manual_seed(mix(seed, epoch)))


class TensorData:
    """A data set in memory, served as batches by index: no collation, no workers.

    A batch costs one ``index_select`` for each tensor. Every batch carries the ``index`` of its samples.

    Args:
        inputs: (N, ...) tensor, or a mapping of such tensors that is fed to the model as keyword arguments.
        targets: (N, ...) tensor, or None.
        extras: further (N, ...) tensors by name, for terms that ask for them in ``batch.extras``.
        batch_size: samples in a (micro-)batch, over all processes together.
        shuffle: a new order each epoch; default True.
        drop_last: leave out a last batch that is not full; default False. Models with batch normalisation need it where
            the last batch may leave a process without samples.
        seed: of the order; default 0.

    Raises:
        ValueError: the tensors differ in length, there is no sample, or not one whole batch with ``drop_last``.

    Examples:
        >>> data = TensorData(torch.arange(10.0).reshape(5, 2), torch.arange(5), batch_size=2, shuffle=False)
        >>> len(data)
        3
        >>> [batch.index.tolist() for batch in data.batches(epoch=0)]
        [[0, 1], [2, 3], [4]]
    """

    @allowed(batch_size=count(1))
    def __init__(
        self,
        inputs: Tensor | Mapping[str, Tensor],
        targets: Tensor | None = None,
        *,
        batch_size: int,
        extras: Mapping[str, Tensor] | None = None,
        shuffle: bool = True,
        drop_last: bool = False,
        seed: int = 0,
    ) -> None:
        named = dict(inputs) if isinstance(inputs, Mapping) else {"inputs": inputs}
        if targets is not None:
            named["targets"] = targets
        named.update(extras or {})
        for name, tensor in named.items():
            if not isinstance(tensor, Tensor) or tensor.ndim == 0:
                raise TypeError(f"{name} must be a tensor (N, ...), got {type(tensor).__name__}; use torch.as_tensor")
        lengths = {name: len(tensor) for name, tensor in named.items()}
        self.size: int = next(iter(lengths.values()), 0)
        if len(set(lengths.values())) != 1 or self.size == 0:
            raise ValueError(f"all tensors must have the same number of samples, at least one; got {lengths}")
        if drop_last and self.size < batch_size:
            raise ValueError(
                f"{self.size} samples do not fill one batch of {batch_size}, and drop_last leaves nothing; "
                "lower batch_size or set drop_last=False"
            )
        self.inputs = inputs
        self.targets = targets
        self.extras: dict[str, Tensor] = dict(extras or {})
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.seed = seed

    def __len__(self) -> int:
        """Number of batches an epoch."""
        return self.size // self.batch_size if self.drop_last else -(-self.size // self.batch_size)

    def to(self, device: torch.device | str) -> "TensorData":
        """The same data with its tensors on a device; a small data set belongs on the GPU as a whole."""
        inputs = self.inputs
        return TensorData(
            {name: t.to(device) for name, t in inputs.items()} if isinstance(inputs, Mapping) else inputs.to(device),
            None if self.targets is None else self.targets.to(device),
            batch_size=self.batch_size,
            extras={name: t.to(device) for name, t in self.extras.items()},
            shuffle=self.shuffle,
            drop_last=self.drop_last,
            seed=self.seed,
        )

    def identity(self) -> dict[str, Any]:
        """What tells this data and its order from others."""
        tensors = self.inputs.values() if isinstance(self.inputs, Mapping) else [self.inputs]
        return {
            "kind": "TensorData",
            "samples": self.size,
            "batch_size": self.batch_size,
            "shuffle": self.shuffle,
            "drop_last": self.drop_last,
            "seed": self.seed,
            "content": fingerprint(
                [*tensors, *([] if self.targets is None else [self.targets]), *self.extras.values()]
            ),
        }

    def batches(self, epoch: int, *, start: int = 0, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """The batches of an epoch from number ``start`` on, of each the part of process ``rank`` of ``world``."""
        inputs, targets, extras = self.inputs, self.targets, self.extras
        device = inputs.device if isinstance(inputs, Tensor) else next(iter(inputs.values())).device
        order = epoch_order(self.size, seed=self.seed, epoch=epoch, shuffle=self.shuffle).to(device)
        for rows in torch.split(order, self.batch_size)[start : len(self)]:
            mine = rows[share(len(rows), rank, world)] if world > 1 else rows
            yield Batch(
                inputs.index_select(0, mine)
                if isinstance(inputs, Tensor)
                else {name: tensor.index_select(0, mine) for name, tensor in inputs.items()},
                None if targets is None else targets.index_select(0, mine),
                mine,
                {name: tensor.index_select(0, mine) for name, tensor in extras.items()} if extras else {},
                len(rows) if world > 1 else None,
            )


class IndexedDataset(Dataset[Any]):
    """A map-style data set whose samples also carry their index, for terms that keep something for each sample.

    Inside :class:`~regularized.training.trainer.Trainer` it is not needed (the loop knows the index of what it asked
    for); in other loops it is.

    Args:
        dataset: samples ``(x, y)`` become ``(x, y, index)``; a mapping gets the key ``index``; a bare ``x`` becomes a
            mapping of ``inputs`` and ``index``.

    Raises:
        TypeError: the data set is an iterable one, where samples have no index.

    Examples:
        >>> data = torch.utils.data.TensorDataset(torch.zeros(3, 2), torch.tensor([5, 6, 7]))
        >>> IndexedDataset(data)[1]
        (tensor([0., 0.]), tensor(6), 1)
    """

    def __init__(self, dataset: Dataset[Any]) -> None:
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
            raise TypeError(
                f"{type(dataset).__name__} has no __getitem__, so its samples have no index; yield it yourself, "
                "as (x, y, index)"
            )
        self.dataset = dataset

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        """Sample and index."""
        return _with_index(self.dataset[index], index)

    def __getitems__(self, indices: list[int]) -> list[Any]:
        """Several samples, by the data set's own batched access where it has one."""
        fetch = getattr(self.dataset, "__getitems__", None)
        samples = fetch(indices) if fetch else [self.dataset[i] for i in indices]
        return [_with_index(sample, i) for sample, i in zip(samples, indices, strict=True)]


def _with_index(sample: Any, index: int) -> Any:
    if isinstance(sample, Mapping):
        return {**sample, "index": index}
    if isinstance(sample, tuple | list):
        return (*sample, index)
    return {"inputs": sample, "index": index}


def as_source(data: Any, *, seed: int, length: int | None = None) -> Source:
    """Anything that can be trained on, as a :class:`Source`.

    - A source, such as :class:`TensorData`, passes.
    - A ``DataLoader`` over a map-style data set keeps its data set, workers and collation. A random or sequential
      sampler is replaced by the seeded order; any other sampler is asked for its whole order once an epoch, at the
      start, with the generators seeded by (seed, epoch), and its order is kept in checkpoints. Each batch gets the
      ``index`` of its samples unless it has one. What worker processes draw at random (augmentation) begins anew
      after an interruption, and is then not exact; what the main process draws (``num_workers=0``) is. A run that is
      resumed makes sure that it has the same data: of a ``TensorDataset``, also in a ``Subset``, by its content; of
      another data set by its length, unless it has a method ``fingerprint()`` that returns a string.
    - Any other iterable of batches is read from its beginning and skipped to the right position. It resumes exactly if
      its order is fixed when the iteration begins. With several processes it must yield the same batches in each.

    Args:
        data: see above.
        seed: of the order.
        length: number of batches an epoch of an iterable that does not know it.

    Raises:
        TypeError: not iterable, or a data set: it yields samples, and no batches.
        ValueError: the number of batches is unknown, or not positive.

    Examples:
        >>> dataset = torch.utils.data.TensorDataset(torch.zeros(5, 2), torch.zeros(5))
        >>> source = as_source(DataLoader(dataset, batch_size=2, shuffle=True), seed=0)
        >>> sorted(i for batch in source.batches(0) for i in batch.index.tolist())
        [0, 1, 2, 3, 4]
    """
    source: Source
    if isinstance(data, DataLoader) and not isinstance(data.dataset, IterableDataset) and _splits(data):
        source = _LoaderSource(data, seed)
    elif isinstance(data, Source):
        source = data
    elif isinstance(data, Mapping):
        raise TypeError(f"data is a mapping; give one of its parts, {sorted(map(str, data))}, in a DataLoader")
    elif _yields_samples(data):
        raise TypeError(
            f"{type(data).__name__} yields samples, and no batches; give DataLoader(dataset, batch_size=..., "
            "shuffle=True), or TensorData(x, y, batch_size=...)"
        )
    elif isinstance(data, Iterable):
        try:
            length = len(data) if length is None else length  # type: ignore[arg-type]
        except TypeError:
            raise ValueError(
                f"the number of batches of {type(data).__name__} is unknown; give fit(..., batches_per_epoch=...)"
            ) from None
        source = _IterableSource(data, length)
    else:
        raise TypeError(f"data must be a TensorData, a DataLoader or an iterable of batches, got {type(data).__name__}")
    if len(source) < 1:
        raise ValueError("the data has no batch; is the data set empty, or smaller than one batch with drop_last?")
    return source


def _yields_samples(data: Any) -> bool:
    """Whether this is a map-style data set: torch's has no ``__iter__``, Hugging Face's iterates over samples."""
    return hasattr(data, "__getitems__") or (isinstance(data, Dataset) and not hasattr(data, "__iter__"))


def _splits(loader: DataLoader[Any]) -> bool:
    """Whether the loader asks its data set for lists of indices, which can be split over processes."""
    return loader.batch_sampler is not None or isinstance(loader.sampler, BatchSampler)


def _content(dataset: Any) -> str | None:
    """Fingerprint of a data set whose samples stand in memory; None of one that would have to be read."""
    if callable(own := getattr(dataset, "fingerprint", None)):
        return str(own())
    if isinstance(dataset, TensorDataset):
        return fingerprint(dataset.tensors)
    if isinstance(dataset, IndexedDataset):
        return _content(dataset.dataset)
    if isinstance(dataset, Subset):
        within = _content(dataset.dataset)
        return within and f"{fingerprint([torch.as_tensor(list(dataset.indices))])}/{within}"
    if isinstance(dataset, ConcatDataset):
        parts = [_content(part) for part in dataset.datasets]
        return None if None in parts else "/".join(map(str, parts))
    return None


class _GivenBatches:
    """A batch sampler that yields what it was given last: batches by their numbers, each made when it is asked for."""

    def __init__(self) -> None:
        self.numbers = range(0)
        self.batch: Callable[[int], list[int]] = lambda number: []

    def __iter__(self) -> Iterator[list[int]]:
        return map(self.batch, self.numbers)

    def __len__(self) -> int:
        return len(self.numbers)


class _LoaderSource:
    """A DataLoader whose order is ours."""

    def __init__(self, loader: DataLoader[Any], seed: int) -> None:
        self._batched = loader.batch_sampler is not None
        self._sampler: Any = loader.batch_sampler if self._batched else loader.sampler
        self._dataset = loader.dataset
        self._seed = seed
        self._given = _GivenBatches()
        self._generator = torch.Generator()
        self._order: tuple[int, list[list[int]]] | None = None
        inner = getattr(self._sampler, "sampler", None)
        self._shuffle = isinstance(inner, RandomSampler)
        self._plain = type(self._sampler) is BatchSampler and (
            type(inner) is SequentialSampler
            or (type(inner) is RandomSampler and not inner.replacement and inner.num_samples == len(self._dataset))  # type: ignore[arg-type]
        )
        ours: dict[str, Any] = (
            {"batch_sampler": self._given} if self._batched else {"sampler": self._given, "batch_size": None}
        )
        workers: dict[str, Any] = (
            {"prefetch_factor": loader.prefetch_factor, "multiprocessing_context": loader.multiprocessing_context}
            if loader.num_workers
            else {}
        )
        self._loader = DataLoader(
            loader.dataset,
            num_workers=loader.num_workers,
            collate_fn=loader.collate_fn,
            pin_memory=loader.pin_memory,
            timeout=loader.timeout,
            worker_init_fn=loader.worker_init_fn,
            persistent_workers=loader.persistent_workers,
            generator=self._generator,  # seeds the workers, and leaves the global generator alone
            **ours,
            **workers,
        )

    def __len__(self) -> int:
        return len(self._sampler)

    def _epoch(self, epoch: int) -> tuple[int, Callable[[int], list[int]]]:
        """How many batches an epoch has, and the samples of each."""
        if self._plain:
            size, step = len(self._dataset), self._sampler.batch_size  # type: ignore[arg-type]
            # As a tensor: ten million samples as Python's numbers cost a second before the first batch, and memory.
            order = epoch_order(size, seed=self._seed, epoch=epoch, shuffle=self._shuffle)
            return len(self), lambda number: order[number * step : (number + 1) * step].tolist()
        if self._order is None or self._order[0] != epoch:
            with preserved():
                seed_all(mix(self._seed, epoch))
                for sampler in (self._sampler, getattr(self._sampler, "sampler", None)):
                    if isinstance(own := getattr(sampler, "generator", None), torch.Generator):
                        own.manual_seed(mix(self._seed, epoch))
                    if callable(set_epoch := getattr(sampler, "set_epoch", None)):
                        set_epoch(epoch)
                self._order = (epoch, [[int(i) for i in batch] for batch in islice(self._sampler, len(self))])
        batches = self._order[1]
        return len(batches), batches.__getitem__

    def identity(self) -> dict[str, Any]:
        """What tells this data and its order from others."""
        return {
            "kind": f"DataLoader of {type(self._dataset).__name__}",
            "samples": len(self._dataset),  # type: ignore[arg-type]
            "batch_size": getattr(self._sampler, "batch_size", None),
            "drop_last": getattr(self._sampler, "drop_last", None),
            "sampler": type(getattr(self._sampler, "sampler", self._sampler)).__name__,
            "content": _content(self._dataset),
        }

    def state_dict(self) -> dict[str, Any]:
        """The order of the present epoch where it is the sampler's own (it may depend on what was learned so far)."""
        return {} if self._order is None else {"epoch": self._order[0], "order": self._order[1]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue in the order of the interrupted epoch."""
        self._order = (state["epoch"], state["order"]) if state else None

    def batches(self, epoch: int, *, start: int = 0, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        count, samples = self._epoch(epoch)

        def mine(number: int) -> list[int]:
            whole = samples(number)
            # Nothing cannot be collated: a process without a part loads one sample and drops it.
            return whole[share(len(whole), rank, world)] or whole[:1]

        self._given.numbers, self._given.batch = range(start, count), mine
        self._generator.manual_seed(mix(self._seed, epoch, rank))
        return self._indexed(iter(self._loader), map(samples, range(start, count)), rank, world)

    @staticmethod
    def _indexed(raw: Iterator[Any], samples: Iterable[list[int]], rank: int, world: int) -> Iterator[Batch]:
        for whole, batch in zip(samples, map(Batch.of, raw), strict=True):
            rows = whole[share(len(whole), rank, world)]
            batch.whole = len(whole) if world > 1 else None
            if not rows:
                batch = batch.map(lambda t: t[:0] if t.ndim else t)
            if batch.index is None and batch.size == len(rows):
                batch.index = torch.tensor(rows, dtype=torch.int64)
            yield batch


class _IterableSource:
    """Any iterable of batches: read from the beginning, skipped to where one was."""

    def __init__(self, iterable: Iterable[Any], length: int) -> None:
        self._iterable = iterable
        self._length = length

    def __len__(self) -> int:
        return self._length

    def identity(self) -> dict[str, Any]:
        """What tells this data from others; what is in it only where it is a list of batches."""
        tensors: list[Tensor] = []

        def keep(tensor: Tensor) -> Tensor:
            tensors.append(tensor)
            return tensor

        for raw in self._iterable if isinstance(self._iterable, list | tuple) else ():
            Batch.of(raw).map(keep)
        content = fingerprint(tensors) if tensors else None
        return {"kind": type(self._iterable).__name__, "batches": self._length, "content": content}

    def batches(self, epoch: int, *, start: int = 0, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        for owner in (self._iterable, getattr(self._iterable, "dataset", None)):
            if callable(set_epoch := getattr(owner, "set_epoch", None)):
                set_epoch(epoch)
        raw = iter(self._iterable)
        for _ in islice(raw, start):  # at once, not at the first request: the caller puts the random state back
            pass
        return (_part(Batch.of(item), rank, world) for item in islice(raw, self._length - start))


def _part(batch: Batch, rank: int, world: int) -> Batch:
    if world == 1:
        return batch
    size = batch.size
    rows = share(size, rank, world)
    cut: Callable[[Tensor], Tensor] = lambda t: t[rows] if t.ndim and len(t) == size else t  # noqa: E731
    part = batch.map(cut)
    part.whole = size
    return part
