"""A network that is only looked at: no gradient reaches it, and nobody's ``train()`` changes its mode."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from regularized.mechanisms.ranges import Choice, allowed

__all__ = ["Frozen", "Statistics", "check_apart", "constant_parameters"]

Statistics: TypeAlias = Literal["running", "batch"]
"""What batch normalisation of a frozen network normalises with."""


class Frozen(nn.Module):
    """Holds a network that must never change, such as a teacher.

    The network is frozen in place: its parameters need no gradient, it is in evaluation mode, and it runs without
    gradient. ``train()`` of this module, or of one that contains it, is not passed on. Whoever holds the network itself
    can still change it; the next call notices.

    Args:
        module: the network; it is kept, not copied.
        statistics: what its batch normalisation uses: ``"running"``, the stored statistics (default), or ``"batch"``,
            those of the batch, as in training mode. Its buffers stay as they are in both cases; dropout is off.

    Attributes:
        module: the network.

    Raises:
        ValueError: an unknown ``statistics``.
        RuntimeError: at a call, when somebody has made the network trainable or changed its mode since.

    Examples:
        >>> model = nn.ModuleDict({"teacher": Frozen(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))})
        >>> _ = model.train()
        >>> teacher = model["teacher"]
        >>> teacher.training, teacher.module.training, teacher(torch.ones(3, 2)).requires_grad
        (True, False, False)
    """

    @allowed(statistics=Choice("running", "batch"))
    def __init__(self, module: nn.Module, *, statistics: Statistics = "running") -> None:
        super().__init__()
        self.statistics = statistics
        self.module: nn.Module = module.eval().requires_grad_(False)
        if statistics == "batch":
            for part in self._norms():
                part.training = True
                part.track_running_stats = False  # the batch's own are used then, and the buffers are left alone

    def _norms(self) -> list[_NormBase]:
        return [part for part in self.module.modules() if isinstance(part, _NormBase)]

    def train(self, mode: bool = True) -> "Frozen":
        """Change nothing but the flag of this module itself."""
        self.training = mode
        return self

    def check(self) -> None:
        """Make sure that the network is still frozen and in its mode.

        Raises:
            RuntimeError: it is not; the parameter or submodule is named.
        """
        if any(p.requires_grad for p in self.module.parameters()):
            name = next(name for name, p in self.module.named_parameters() if p.requires_grad)
            raise RuntimeError(
                f"parameter {name!r} of a frozen network requires a gradient: somebody called requires_grad_() on it "
                "after it was frozen. Give the optimizer the parameters of the other network only, and call "
                "requires_grad_(False) on this one"
            )
        batch = self.statistics == "batch"
        for name, part in self.module.named_modules():
            if part.training != (batch and isinstance(part, _NormBase)):
                mode = "train" if part.training else "eval"
                raise RuntimeError(
                    f"submodule {name!r} of a frozen network is in {mode} mode: somebody called {mode}() on it after "
                    "it was frozen. Call train() and eval() on the module that contains the frozen one, or on the "
                    "other network; wrap the network in Frozen once more to mend it"
                )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the network returns, without gradient."""
        if not torch.compiler.is_compiling():
            self.check()
        with torch.no_grad():
            return self.module(*args, **kwargs)

    def extra_repr(self) -> str:
        """Settings, for ``repr``."""
        return f"statistics={self.statistics!r}"


@contextmanager
def constant_parameters(module: nn.Module) -> Iterator[None]:
    """Parameters are constants inside, for who wants a gradient by the inputs alone; their flags come back afterwards.

    A backward pass by the inputs skips the gradients of weights in any case. Without their part of the graph it is a
    twentieth of a training step cheaper, and keeps less.

    Args:
        module: the network.

    Examples:
        >>> layer = nn.Linear(2, 1)
        >>> with constant_parameters(layer):
        ...     print(layer(torch.ones(1, 2)).requires_grad)
        False
        >>> layer.weight.requires_grad
        True
    """
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def check_apart(one: nn.Module, other: nn.Module, *, names: tuple[str, str] = ("one", "other")) -> None:
    """Refuse two networks that are the same object, or share memory, views included.

    Args:
        one: a network.
        other: another network.
        names: what they are called in the message.

    Raises:
        ValueError: they are not apart; the first shared tensor is named.

    Examples:
        >>> check_apart(nn.Linear(2, 2), nn.Linear(2, 2))
    """
    first, second = names
    if one is other:
        raise ValueError(f"{first} and {second} are the same object; build two, or use copy.deepcopy")
    owners = {}
    for name, tensor in [*one.named_parameters(), *one.named_buffers()]:
        owners[tensor.untyped_storage().data_ptr()] = name
    owners.pop(0, None)  # tensors without memory
    for name, tensor in [*other.named_parameters(), *other.named_buffers()]:
        pointer = tensor.untyped_storage().data_ptr()
        if pointer in owners:
            raise ValueError(
                f"{first} and {second} share memory: {owners[pointer]!r} of the {first} is {name!r} of the {second}; "
                "build two networks, or use copy.deepcopy"
            )
