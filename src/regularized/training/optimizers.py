"""Optimizers of a procedure: they follow schedules, step together, and take no gradient which is not finite."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, overload

import torch
from torch import Tensor

from regularized.training.finite import NonFiniteLoss, PendingFlags, all_finite, largest_entries
from regularized.training.identity import changed_settings, differences, optimizer_settings
from regularized.training.progress import Coefficient, Progress, as_schedule
from regularized.training.sharded import check_whole
from regularized.training.state import check_keys, check_optimizer

__all__ = ["Optimizers"]


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
        ValueError: there is no optimizer, or not one name or schedule for each; or weights are in shards.

    Examples:
        >>> from regularized.training.progress import piecewise
        >>> layer = torch.nn.Linear(2, 1)
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
        for name, optimizer in zip(self.names, self._optimizers, strict=True):
            check_whole(_parameters(optimizer), name)
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
        check_keys(path, {"optimizers", "settings", "steps"}, state)
        check_keys(f"{path}.optimizers", range(len(self)), range(len(state["optimizers"])))
        for number, (optimizer, own, saved, groups) in enumerate(
            zip(self, self._settings, state["settings"], state["optimizers"], strict=True)
        ):
            check_optimizer(f"{path}[{number}]", optimizer, groups)
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
