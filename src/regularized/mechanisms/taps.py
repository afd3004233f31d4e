"""Read hidden states during a forward pass, once for all who ask."""

import difflib
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any

from torch import Tensor, nn

__all__ = ["Taps"]


class Taps:
    """Forward hooks that keep the outputs of named submodules until the next forward pass.

    Args:
        model: the model whose submodules are read.
        names: dotted names as in ``model.named_modules()``; a repeated name is tapped once.

    Raises:
        ValueError: a name is not a submodule; the nearest ones are named.

    Examples:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> with Taps(model, ["0"]) as taps:
        ...     _ = model(torch.zeros(5, 3))
        ...     taps.states["0"].shape
        torch.Size([5, 4])
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        self._states: dict[str, Tensor] = {}
        self._handles = []
        modules = dict(model.named_modules())
        for name in dict.fromkeys(names):
            if name not in modules:
                near = difflib.get_close_matches(name, modules, n=3)
                raise ValueError(f"the model has no submodule {name!r}" + (f"; did you mean {near}?" if near else ""))
            self._handles.append(modules[name].register_forward_hook(self._keep(name)))

    def _keep(self, name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            self._states[name] = output if isinstance(output, Tensor) else output[0]

        return hook

    @property
    def states(self) -> Mapping[str, Tensor]:
        """Outputs by name; the first element where a submodule returns a tuple."""
        return self._states

    def clear(self) -> None:
        """Forget the states, so that no graph outlives its step."""
        self._states.clear()

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.clear()

    def __enter__(self) -> "Taps":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()
