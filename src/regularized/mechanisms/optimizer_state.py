"""An optimizer seen from outside: found by what it trains, and made to forget some of its parameters."""

import weakref
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

__all__ = ["Binds", "bind_at_first_step", "forget"]


class Binds(Protocol):
    """What waits for its optimizer: a technique that works around the steps of whatever trains its parameters."""

    def awaited(self) -> Iterable[Tensor]:
        """The parameters by which the optimizer is known; none once it is found."""
        ...

    def bind(self, optimizer: torch.optim.Optimizer) -> Any:
        """Take the optimizer, for good."""
        ...

    def before_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """What a bound optimizer calls before each step."""
        ...


def bind_at_first_step(owner: Binds) -> RemovableHandle:
    """Bind the first optimizer that steps one of the awaited parameters, just before that step.

    A loop shows its terms no optimizer; torch shows every one that is about to step.

    Args:
        owner: it is not kept alive by this.

    Returns:
        A handle; remove it once the optimizer is found.

    Examples:
        >>> class Owner:
        ...     waiting = [torch.nn.Parameter(torch.zeros(2))]
        ...
        ...     def awaited(self):
        ...         return self.waiting
        ...
        ...     def bind(self, optimizer):
        ...         print("found", type(optimizer).__name__)
        ...         self.waiting = []
        ...
        ...     def before_optimizer(self, optimizer):
        ...         print("before its first step")
        >>> owner = Owner()
        >>> handle = bind_at_first_step(owner)
        >>> torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1).step()  # trains something else
        >>> torch.optim.SGD(owner.waiting, lr=0.1).step()
        found SGD
        before its first step
        >>> handle.remove()
    """
    ask = weakref.ref(owner)

    def look(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        one = ask()
        if one is None:
            return
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if any(id(p) in held for p in one.awaited()):
            one.bind(optimizer)
            one.before_optimizer(optimizer)  # its own hooks of this step are past

    return register_optimizer_step_pre_hook(look)


def forget(optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor]) -> None:
    """Make an optimizer go on with parameters as if it had never stepped them: no moments, step 0.

    Args:
        optimizer: any of torch that keeps its state by parameter, with any implementation (foreach, fused).
        parameters: some of its parameters; what it does not know is skipped.

    Raises:
        ValueError: its state does not belong to single parameters (LBFGS).

    Examples:
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = torch.optim.Adam([weight], lr=0.1)
        >>> weight.sum().backward()
        >>> optimizer.step()
        >>> forget(optimizer, [weight])
        >>> dict(optimizer.state)
        {}
    """
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError("LBFGS keeps one history over all parameters, of which none can be forgotten; use Adam or SGD")
    chosen = {id(p): p for p in parameters}
    for group in optimizer.param_groups:
        for p in (p for p in group["params"] if id(p) in chosen and p in optimizer.state):
            if isinstance(optimizer, torch.optim.Adagrad):  # makes its state once, when it is built
                optimizer.state[p]["step"].zero_()
                optimizer.state[p]["sum"].fill_(group["initial_accumulator_value"])
            else:
                del optimizer.state[p]
