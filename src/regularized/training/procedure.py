"""What procedures are built of: optimizers that step together, epochs from a position, a state that is checked.

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
:class:`Epochs`, and with new :class:`Optimizers` where its optimizer does not go on.
"""

import copy
import math
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar, overload

import torch
from torch import Tensor, nn

from regularized.training.data import Source
from regularized.training.finite import NonFiniteLoss, PendingFlags, all_finite, largest_entries
from regularized.training.identity import changed_settings, differences, optimizer_settings
from regularized.training.progress import Coefficient, Progress, as_schedule
from regularized.training.randomness import generators, mix, preserved, rng_state, seed_all, set_rng_state

__all__ = ["Epochs", "Optimizers", "Part", "fit_epochs", "restore", "state_of"]


# -- steps --------------------------------------------------------------------------------------


class Optimizers(Sequence[torch.optim.Optimizer]):
    """Optimizers whose learning rates follow a schedule, and that take no gradient which is not finite.

    The rate of a parameter group is always that which it was built with times the schedule's factor: it does not
    compound. On the CPU a loss or gradient that is not finite raises before a weight has moved; on an accelerator
    looking would make the host wait, so it raises at the next step, or when :meth:`settle` or :meth:`state_dict` is
    called.

    Args:
        optimizers: one or more, in an order; they are called by their number.
        schedule: factor on the rates of all of them, a number or a function of
            :class:`~regularized.training.progress.Progress`; or a sequence with one for each. Default 1.
        names: what each of them trains, for messages; default ``network 0``, ``network 1``, ...
        remedy: end of the message where something is not finite.

    Attributes:
        steps: steps taken by each.

    Raises:
        ValueError: there is no optimizer, or not one name or schedule for each.

    Examples:
        >>> from regularized.training.progress import piecewise
        >>> layer = nn.Linear(2, 1)
        >>> optimizers = Optimizers([torch.optim.SGD(layer.parameters(), lr=0.5)], schedule=piecewise({0.5: 0.1}))
        >>> for step in range(4):
        ...     optimizers.minimise(layer(torch.ones(3, 2)).square().mean(), progress=Progress(step, 4))
        >>> optimizers.steps, optimizers[0].param_groups[0]["lr"]
        ([4], 0.05)
    """

    def __init__(
        self,
        optimizers: Sequence[torch.optim.Optimizer],
        *,
        schedule: Coefficient | Sequence[Coefficient] = 1.0,
        names: Sequence[str] | None = None,
        remedy: str = "lower the learning rate, or look for inputs that are not finite",
    ) -> None:
        self._optimizers = tuple(optimizers)
        count = len(self._optimizers)
        schedules = list(schedule) if isinstance(schedule, Sequence) else [schedule] * count
        self.names: list[str] = [f"network {number}" for number in range(count)] if names is None else list(names)
        if not count or len(schedules) != count or len(self.names) != count:
            raise ValueError(
                f"give at least one optimizer, and one name and one schedule for each: got {count} optimizers, "
                f"{len(schedules)} schedules and {len(self.names)} names"
            )
        self._schedules = [as_schedule(one, name="schedule") for one in schedules]
        self._remedy = remedy
        self.steps: list[int] = [0] * count
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                _built_rate(group)
        self._settings = [optimizer_settings(optimizer) for optimizer in self._optimizers]
        device = next((p.device for o in self._optimizers for p in _parameters(o)), torch.device("cpu"))
        self._deferred = device.type != "cpu"
        self._flags = PendingFlags()

    def __len__(self) -> int:
        """Number of optimizers."""
        return len(self._optimizers)

    @overload
    def __getitem__(self, number: int) -> torch.optim.Optimizer: ...

    @overload
    def __getitem__(self, number: slice) -> Sequence[torch.optim.Optimizer]: ...

    def __getitem__(self, number: int | slice) -> torch.optim.Optimizer | Sequence[torch.optim.Optimizer]:
        """One of the optimizers."""
        return self._optimizers[number]

    def minimise(self, loss: Tensor, *numbers: int, progress: Progress) -> None:
        """One step on a loss: fresh gradients, rates, and the step if all is finite.

        Args:
            loss: scalar with its graph.
            numbers: which optimizers step; default all of them, on this one backward pass.
            progress: position in the training, for the schedules.

        Raises:
            NonFiniteLoss: the loss, a gradient or a rate is not finite (on an accelerator: that of the step before).
        """
        numbers = numbers or tuple(range(len(self)))
        for number in numbers:
            self[number].zero_grad()
        loss.backward()
        self.step(*numbers, progress=progress, loss=loss)

    def step(self, *numbers: int, progress: Progress, loss: Tensor | None = None) -> None:
        """The second half of :meth:`minimise`, where something is added to the gradients in between.

        Args:
            numbers: which optimizers step; default all of them.
            progress: position in the training, for the schedules.
            loss: the loss, to be looked at as well.

        Raises:
            NonFiniteLoss: the loss, a gradient or a rate is not finite (on an accelerator: that of the step before).
        """
        numbers = numbers or tuple(range(len(self)))
        factors = [self._schedules[number](progress) for number in numbers]
        self._look(numbers, factors, loss, f"in epoch {progress.epoch}, optimizer step {self.steps[numbers[0]]}")
        for number, factor in zip(numbers, factors, strict=True):
            for group in self[number].param_groups:
                rate = _built_rate(group) * factor
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(rate)
                else:
                    group["lr"] = rate
            self[number].step()
            self.steps[number] += 1

    def _look(self, numbers: Sequence[int], factors: Sequence[float], loss: Tensor | None, when: str) -> None:
        """Raise if the step must not be taken, or on an accelerator if the one before should not have been."""

        def error(suspect: str) -> NonFiniteLoss:
            return NonFiniteLoss(f"{suspect} is not finite {when}; {self._remedy}")

        names = [self.names[number] for number in numbers]
        for name, factor in zip(names, factors, strict=True):
            if not math.isfinite(factor):
                raise error(f"the factor {factor} that its schedule gave {name}")
        whole = f"the loss of {' and '.join(names)}"
        grads = [[p.grad for p in _parameters(self[number]) if p.grad is not None] for number in numbers]
        if self._deferred:
            self._flags.settle()
            values = [] if loss is None else [(whole, loss.detach())]
            for name, own in zip(names, grads, strict=True):
                values += [(f"a gradient of {name}", entry) for entry in largest_entries(own)]
            if values:
                fine = torch.stack([value.to(torch.float32) for _, value in values]).isfinite()
                self._flags.send([suspect for suspect, _ in values], fine, error)
            return
        if loss is not None and not math.isfinite(loss.item()):
            raise error(whole)
        for name, own in zip(names, grads, strict=True):
            if not all_finite(own):
                raise error(f"a gradient of {name}")

    def settle(self) -> None:
        """Read what is still on its way from the device; call it at the end of an epoch.

        Raises:
            NonFiniteLoss: the last step was not finite.
        """
        self._flags.settle()

    def state_dict(self) -> dict[str, Any]:
        """State of the optimizers, with the rates and settings that they were built with.

        Raises:
            NonFiniteLoss: the last step, or a weight, is not finite.
        """
        self.settle()
        for name, optimizer in zip(self.names, self, strict=True):
            if not all_finite(_parameters(optimizer)):
                raise NonFiniteLoss(f"weights of {name} are not finite, so there is no state to save; {self._remedy}")
        return {
            "optimizers": [optimizer.state_dict() for optimizer in self],
            "settings": self._settings,
            "steps": list(self.steps),
        }

    def check_state(self, state: Mapping[str, Any], path: str = "optimizers") -> None:
        """Refuse the state of other optimizers. It is taken over whole, so nothing in it may be asked otherwise here.

        Raises:
            ValueError: number, class, settings or sizes of the parameter groups differ.
        """
        _check_keys(path, {"optimizers", "settings", "steps"}, state)
        _check_keys(f"{path}.optimizers", range(len(self)), range(len(state["optimizers"])))
        for number, (optimizer, own, saved, groups) in enumerate(
            zip(self, self._settings, state["settings"], state["optimizers"], strict=True)
        ):
            _check_optimizer(f"{path}[{number}]", optimizer, groups)
            words = differences({"class": saved["class"]}, {"class": own["class"]})
            words += [
                f"{key} is {there} there and {here} here"
                for _, key, there, here in changed_settings(saved["groups"], own["groups"])
                if key not in _IMPLEMENTATION
            ]
            if words:
                raise ValueError(f"{path}[{number}] was built otherwise: {'; '.join(words)}; build it as it was there")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state of :meth:`state_dict`; what was pending is dropped."""
        self.check_state(state)
        for optimizer, saved in zip(self, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.steps = [int(steps) for steps in state["steps"]]
        self._flags.forget()


_IMPLEMENTATION = ("foreach", "fused", "capturable", "lr")  # how a step is computed; `initial_lr` is what lr was


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _built_rate(group: dict[str, Any]) -> float:
    """The learning rate that a group came with; it is kept in the group, and so saved with it."""
    rate: float = group.setdefault("initial_lr", float(group["lr"]))
    return rate


# -- epochs -------------------------------------------------------------------------------------


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
        _check_keys(path, {"seed", "done", "part", "batch", "sums", "left"}, state)
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
        >>> from regularized.training.data import TensorData
        >>> weight = nn.Parameter(torch.ones(()))
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


# -- state --------------------------------------------------------------------------------------


def state_of(owner: object, *names: str) -> dict[str, Any]:
    """What attributes of a procedure hold, and the generators inside its modules, as one dictionary.

    An attribute may be anything with a ``state_dict``, a ``torch.Generator``, a number, string, tensor or None; or a
    list, tuple or dictionary of such things. ``torch.load(..., weights_only=True)`` reads what ``torch.save`` writes of
    it. Modules and optimizers are loaded into, numbers and tensors replaced by copies.

    Args:
        owner: the procedure.
        names: its attributes.

    Returns:
        The values by attribute, and ``generators``. Tensors are those of the procedure, not copies.

    Raises:
        TypeError: an attribute is something else.
        NonFiniteLoss: a weight that the procedure's :class:`Optimizers` train is not finite.

    Examples:
        >>> from types import SimpleNamespace
        >>> pair = SimpleNamespace(networks=(nn.Linear(1, 1), nn.Linear(1, 1)), task=3)
        >>> state = state_of(pair, "networks", "task")
        >>> sorted(state), state["task"], list(state["networks"][1])
        (['generators', 'networks', 'task'], 3, ['weight', 'bias'])
        >>> pair.task = 4
        >>> restore(pair, state, "networks", "task")
        >>> pair.task
        3
    """
    state = {name: _pack(name, getattr(owner, name)) for name in names}
    return state | {"generators": {path: g.get_state() for path, g in _generators(owner, names).items()}}


def restore(owner: object, state: Mapping[str, Any], *names: str) -> None:
    """Put back what :func:`state_of` gave; all of it is compared before anything is changed.

    Args:
        owner: the procedure, built with the same settings.
        state: the state.
        names: the attributes that were named to :func:`state_of`.

    Raises:
        ValueError: parts are missing, unknown, or of another training; the message names the first.
    """
    _check_keys(f"the state of {type(owner).__name__}", {*names, "generators"}, state)
    for name in names:
        _check(name, getattr(owner, name), state[name])
    own = _generators(owner, names)
    if own.keys() != state["generators"].keys():
        raise ValueError(
            f"the state holds the generators {sorted(state['generators'])}, {type(owner).__name__} has {sorted(own)}; "
            "build it in the same way before loading (modules that draw from a generator of their own, draw_together)"
        )
    for name in names:
        setattr(owner, name, _unpack(getattr(owner, name), state[name]))
    for path, generator in own.items():
        generator.set_state(state["generators"][path].cpu())


def _is_part(value: Any) -> bool:
    return isinstance(value, torch.Generator) or (hasattr(value, "state_dict") and hasattr(value, "load_state_dict"))


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(map(_is_plain, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str | Tensor)


def _items(value: Any) -> list[tuple[Any, Any]] | None:
    """Key and content of a container that holds parts, None of anything else."""
    if _is_part(value) or _is_plain(value):
        return None
    if isinstance(value, Mapping):
        return list(value.items())
    return list(enumerate(value)) if isinstance(value, list | tuple) else None


def _pack(path: str, value: Any) -> Any:
    if isinstance(value, torch.Generator):
        return value.get_state()
    if _is_part(value):
        return value.state_dict()
    if _is_plain(value):
        return value
    inside = _items(value)
    if inside is None:
        raise TypeError(f"{path} is a {type(value).__name__}, of which a state cannot be made; give it a state_dict")
    packed = {key: _pack(f"{path}[{key!r}]", content) for key, content in inside}
    return packed if isinstance(value, Mapping) else list(packed.values())


def _unpack(value: Any, saved: Any) -> Any:
    if isinstance(value, torch.Generator):
        value.set_state(saved.cpu())
        return value
    if _is_part(value):
        value.load_state_dict(saved)
        return value
    inside = _items(value)
    for key, content in inside or ():
        _unpack(content, saved[key])
    return copy.deepcopy(saved) if inside is None else value


def _generators(owner: object, names: Sequence[str]) -> dict[str, torch.Generator]:
    """Generators inside the modules of these attributes, by path; a generator that two modules share occurs twice."""
    found: dict[str, torch.Generator] = {}

    def search(path: str, value: Any) -> None:
        if isinstance(value, nn.Module):
            found.update({f"{path}.{name}": generator for name, generator in generators(value).items()})
        for key, content in _items(value) or ():
            search(f"{path}.{key}", content)

    for name in names:
        search(name, getattr(owner, name))
    return found


def _check(path: str, value: Any, saved: Any) -> None:
    """Compare a saved value with the place that it is to be loaded into."""
    if (saved is None and _is_part(value)) or (value is None and isinstance(saved, Mapping)):
        here, there = ("a " + type(one).__name__ if one is not None else "None" for one in (value, saved))
        raise ValueError(f"{path} is {here} here and {there} in the state; build it as it was there before loading")
    if hasattr(value, "check_state"):
        value.check_state(saved, path)
    elif isinstance(value, nn.Module):
        _check_module(path, value, saved)
    elif isinstance(value, torch.optim.Optimizer):
        _check_optimizer(path, value, saved)
    elif (inside := _items(value)) is not None:
        keys = {key for key, _ in inside}
        _check_keys(path, keys, saved if isinstance(value, Mapping) else range(len(saved)))
        for key, content in inside:
            _check(f"{path}[{key!r}]", content, saved[key])


def _check_keys(path: str, needed: Collection[Any], there: Collection[Any]) -> None:
    missing, unknown = [sorted(map(str, set(a) - set(b))) for a, b in ((needed, there), (there, needed))]
    if missing or unknown:
        raise ValueError(
            f"{path} does not fit: missing {missing[:3]} ({len(missing)} in all), unknown {unknown[:3]} "
            f"({len(unknown)} in all); build the same procedure before loading"
        )


def _check_module(path: str, module: nn.Module, saved: Mapping[str, Any]) -> None:
    own = module.state_dict()
    _check_keys(path, own, saved)
    for key, value in own.items():
        if isinstance(value, Tensor) and isinstance(saved[key], Tensor) and value.shape != saved[key].shape:
            raise ValueError(
                f"{path} does not fit: {key!r} has shape {tuple(saved[key].shape)} in the state and "
                f"{tuple(value.shape)} here; build the same network before loading"
            )


def _check_optimizer(path: str, optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    there, here = ([len(g["params"]) for g in groups] for groups in (saved["param_groups"], optimizer.param_groups))
    if there != here:
        raise ValueError(
            f"{path} does not fit: its parameter groups have {there} tensors in the state and {here} here; build the "
            "same networks and optimizers before loading"
        )
