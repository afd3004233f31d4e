"""What procedures are built of: epochs from a position, with optimizers that step together and a checked state.

A procedure is training that no sum of terms describes: two networks that choose samples for each other, a generator
and its critic, tasks one after the other. It is a class of its own, with a step of its own; it holds these parts and
inherits nothing::

    class Pair:
        def __init__(self, first, second, *, optimizer, schedule=1.0, seed=0):
            self.networks = (first, second)
            self.optimizers = Optimizers([optimizer(n.parameters()) for n in self.networks], schedule=schedule)
            self.epochs = Epochs(seed)

        def training_step(self, batch, *, progress):
            losses = [...]
            for number, loss in enumerate(losses):
                self.optimizers.minimise(loss, number, progress=progress)
            return torch.stack(losses).detach()

        def fit(self, data, *, epochs):
            part = Part(as_source(data, seed=self.epochs.seed), self.training_step)
            return fit_epochs(self, [part], until=epochs, record=lambda means: means[0].tolist())

        def state_dict(self):
            return state_of(self, "networks", "optimizers", "epochs")

        def load_state_dict(self, state):
            restore(self, state, "networks", "optimizers", "epochs")

Tasks, rounds and stages are numbers that the procedure counts itself and names in its state; each begins with new
:class:`Epochs`, and with new :class:`~regularized.training.optimizers.Optimizers` where its optimizer does not go on.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar

from torch import Tensor

from regularized.training.data import Source
from regularized.training.identity import differences
from regularized.training.optimizers import Optimizers
from regularized.training.progress import Progress
from regularized.training.randomness import mix, preserved, rng_state, seed_all, set_rng_state
from regularized.training.state import check_keys

__all__ = ["Epochs", "Part", "fit_epochs"]


class Part(NamedTuple):
    """A pass over some data, which is all of an epoch or a part of it.

    Attributes:
        source: the batches, see :func:`~regularized.training.data.as_source`.
        step: called as ``step(batch, progress=progress)`` for each of them; returns a detached tensor to be averaged.
        stream: with the seed and the epoch it seeds what the pass draws at random.
    """

    source: Source
    step: Callable[..., Tensor]
    stream: tuple[int, ...] = ()


class Epochs:
    """Epochs over one or more sources, from wherever the last call or a loaded state left off.

    An epoch is a pass over each part, one after the other. All that is drawn from the global generators in a pass
    (dropout, augmentation) is a function of seed, epoch and the part's stream, and leaves no trace outside; so training
    that goes on from a saved state, also of the middle of a pass, ends as if it had never been interrupted. Pass ``p``
    of epoch ``e`` asks its source for ``batches(e * len(parts) + p)``.

    Args:
        seed: of what is drawn at random.

    Attributes:
        done: epochs done.

    Examples:
        >>> import torch
        >>> from regularized.training.data import TensorData
        >>> data = TensorData(torch.arange(4.0), batch_size=2, shuffle=False)
        >>> epochs = Epochs(seed=0)
        >>> part = Part(data, lambda batch, progress: batch.inputs.sum() + 10 * progress.step)
        >>> [float(means[0]) for means in epochs.run([part], until=2)]
        [8.0, 28.0]
        >>> epochs.done
        2
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.done: int = 0
        self._part = 0  # passes done in the present epoch
        self._batch = 0  # batches done in the present pass
        self._sums: list[Tensor] = []  # of what the steps returned, one for each pass of the epoch
        self._in_step = False
        self._source: Source | None = None  # while a pass runs
        self._left: dict[str, Any] = {}  # what else it takes to go on in a pass, from where it was left
        self._data: tuple[Source, dict[str, Any]] | None = None  # the last source that was asked what it is

    def run(
        self,
        parts: Sequence[Part],
        *,
        until: int,
        after_step: Callable[[], object] | None = None,
        stacklevel: int = 1,
    ) -> Iterator[list[Tensor]]:
        """Run epochs until ``until`` are done in all.

        Args:
            parts: what an epoch passes over; the same at each call.
            until: epochs in all, also for the schedules.
            after_step: called after each step; when it raises, the next call goes on behind that step.
            stacklevel: how many calls above the loop over the epochs a warning points to; default 1, who called the
                function that has the loop.

        Yields:
            After each epoch, which counts as done by then, for each part the mean of what its steps returned.

        Raises:
            ValueError: the position is in the middle of a pass over other data; or the data end early.

        Warns:
            UserWarning: the last call ended within a step (an error, an interrupt), which is made once more.
        """
        if self._in_step:
            warnings.warn(
                "the last step was left half-way and is made once more: what it had changed by then stays, so the "
                "result is not exactly that of an uninterrupted training. To be exact, load the last saved state",
                stacklevel=stacklevel + 2,
            )
        while self.done < until:
            for part in parts[self._part :]:
                self._pass(part, self.done * len(parts) + self._part, until, after_step)
                self._part, self._batch = self._part + 1, 0
            means = [total / len(part.source) for total, part in zip(self._sums, parts, strict=True)]
            self.done, self._part, self._sums = self.done + 1, 0, []
            yield means

    def _pass(self, part: Part, number: int, until: int, after_step: Callable[[], object] | None) -> None:
        source, length = part.source, len(part.source)
        if self._batch and (words := differences(self._left["data"], _identity(source))):
            raise ValueError(
                f"the training stands behind batch {self._batch} of an epoch of other data: {'; '.join(words)}. Give "
                "the same data, batch size and order; or load the state of the end of an epoch, where data may change"
            )
        with preserved():
            seed_all(mix(self.seed, self.done, *part.stream))
            if self._batch and self._left["source"]:
                source.load_state_dict(self._left["source"])  # type: ignore[attr-defined]
            batches = source.batches(number, start=self._batch)
            if self._batch:  # the data are drawn as at the start of the pass, the rest goes on as it was left
                set_rng_state(self._left["draws"])
            self._source = source
            try:
                for batch in batches:
                    self._in_step = True
                    progress = Progress(self.done * length + self._batch, until * length, self.done, until)
                    value = part.step(batch, progress=progress)
                    if self._batch:
                        self._sums[-1] = self._sums[-1] + value
                    else:
                        self._sums.append(value)
                    self._batch += 1
                    self._in_step = False
                    if after_step is not None:
                        after_step()
                if self._batch < length:
                    raise ValueError(f"the data ended after {self._batch} of {length} batches; correct their length")
            except BaseException:
                self._left = self._here(source)
                raise
            finally:
                self._source = None

    def _here(self, source: Source) -> dict[str, Any]:
        draws = rng_state()
        if self._data is None or self._data[0] is not source:  # a checksum of the content: once is enough
            self._data = (source, _identity(source))
        own = source.state_dict() if hasattr(source, "state_dict") else {}
        return {"data": self._data[1], "source": own, "draws": draws}

    def state_dict(self) -> dict[str, Any]:
        """The position, and in the middle of a pass all that goes with it.

        Raises:
            RuntimeError: a step is running, or was left half-way.
        """
        if self._in_step:
            raise RuntimeError(
                "a step was left half-way, and training would not go on exactly from this state; load the last saved "
                "one, or save between steps: in after_step or after_epoch"
            )
        left = self._left if self._source is None else self._here(self._source)
        position = {"seed": self.seed, "done": self.done, "part": self._part, "batch": self._batch}
        return {**position, "sums": list(self._sums), "left": left if self._batch else {}}

    def check_state(self, state: Mapping[str, Any], path: str = "epochs") -> None:
        """Refuse what is no position, or one of a training with another seed.

        Raises:
            ValueError: keys are missing or unknown, or the seed differs.
        """
        check_keys(path, {"seed", "done", "part", "batch", "sums", "left"}, state)
        if state["seed"] != self.seed:
            raise ValueError(
                f"{path}: the state was made with seed={state['seed']}, this training has seed={self.seed} and would "
                "draw other orders and masks; build it with the same seed"
            )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to the position of a state of :meth:`state_dict`."""
        self.check_state(state)
        self.done, self._part, self._batch = int(state["done"]), int(state["part"]), int(state["batch"])
        self._sums, self._left, self._in_step = list(state["sums"]), dict(state["left"]), False


class _Procedure(Protocol):
    @property
    def epochs(self) -> Epochs: ...

    @property
    def optimizers(self) -> Optimizers: ...


P = TypeVar("P", bound=_Procedure)
R = TypeVar("R")


def fit_epochs(
    owner: P,
    parts: Sequence[Part],
    *,
    until: int,
    record: Callable[[list[Tensor]], R],
    after_epoch: Callable[[P], object] | None = None,
    after_step: Callable[[P], object] | None = None,
) -> list[R]:
    """The ``fit`` of a procedure: its epochs, from where they stand, with what its callers want to see.

    Args:
        owner: the procedure, with its ``epochs`` and ``optimizers``.
        parts: what an epoch passes over, see :meth:`Epochs.run`.
        until: epochs in all, also for the schedules.
        record: from the mean of what each part's steps returned to the record of an epoch, which counts as done.
        after_epoch: called with the procedure behind that.
        after_step: called with the procedure after each step; when it raises, the next call goes on behind that step.

    Returns:
        A record for each epoch of this call.

    Raises:
        NonFiniteLoss: a loss or gradient is not finite.
        ValueError: as :meth:`Epochs.run`.

    Examples:
        >>> from types import SimpleNamespace
        >>> import torch
        >>> from regularized.training.data import TensorData
        >>> weight = torch.nn.Parameter(torch.ones(()))
        >>> training = SimpleNamespace(epochs=Epochs(0), optimizers=Optimizers([torch.optim.SGD([weight], lr=0.25)]))
        >>> def step(batch, *, progress):
        ...     loss = weight.square()
        ...     training.optimizers.minimise(loss, progress=progress)
        ...     return loss.detach()
        >>> part = Part(TensorData(torch.zeros(4), batch_size=4), step)
        >>> fit_epochs(training, [part], until=3, record=lambda means: means[0].item())
        [1.0, 0.25, 0.0625]
    """
    moment = None if after_step is None else partial(after_step, owner)
    records = []
    for means in owner.epochs.run(parts, until=until, after_step=moment, stacklevel=2):
        owner.optimizers.settle()
        records.append(record(means))
        if after_epoch is not None:
            after_epoch(owner)
    return records


def _identity(source: Source) -> dict[str, Any]:
    own = dict(source.identity()) if hasattr(source, "identity") else {"kind": type(source).__name__}
    return own | {"batches": len(source)}
