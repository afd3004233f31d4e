"""Networks for data whose owner brings none, and how a worker process gets the owner's."""

import hashlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from math import prod
from typing import Any, TypeAlias

from torch import Tensor, nn

from regularized.evidence.models import mlp, small_convnet

__all__ = ["Factory", "ModelSource", "default_model", "make", "source_of"]

Factory: TypeAlias = Callable[[], nn.Module]

_WIDTH = 128
_here: dict[str, Factory] = {}  # factories that no other process can import


def default_model(input_shape: tuple[int, ...], num_outputs: int) -> nn.Module:
    """A network that fits the kind of data: a perceptron for tables, convolutions for images.

    Args:
        input_shape: (F,) for a table; (C, H, W) for images.
        num_outputs: classes, or 1.

    Raises:
        ValueError: neither a table nor images.

    Examples:
        >>> default_model((3, 32, 32), 10)(__import__("torch").zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    if len(input_shape) == 1:
        return mlp([*input_shape, _WIDTH, _WIDTH, num_outputs])
    if len(input_shape) != 3:
        raise ValueError(
            f"there is no default network for inputs of shape {input_shape}: give make_model, or make them tables (F,) "
            "or images (C, H, W)"
        )
    channels, height, width = input_shape
    if channels == 1 and height == width and height % 4 == 0:
        return small_convnet(num_outputs, size=height)
    if min(height, width) < 8:
        return nn.Sequential(nn.Flatten(), mlp([prod(input_shape), _WIDTH, _WIDTH, num_outputs]))
    return nn.Sequential(
        *_convolution(channels, 32, stride=1),
        *_convolution(32, 64, stride=2),
        *_convolution(64, 128, stride=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(128, num_outputs),
    )


def describe_default(input_shape: tuple[int, ...]) -> str:
    """The default network in words."""
    if len(input_shape) == 1:
        return f"a perceptron with two hidden layers of {_WIDTH}"
    return "a small network of convolutions"


def _convolution(fan_in: int, fan_out: int, *, stride: int) -> tuple[nn.Module, ...]:
    return (
        nn.Conv2d(fan_in, fan_out, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(fan_out),
        nn.ReLU(),
    )


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where a process gets the network from.

    Args:
        reference: ``"module:function"``; ``""`` for the default; ``"here:..."`` for what only this process has.
        code: fingerprint of the source of the factory's module, or of the factory.
    """

    reference: str
    code: str

    @property
    def importable(self) -> bool:
        """Whether other processes can make it."""
        return not self.reference.startswith("here:")

    def to_dict(self) -> dict[str, str]:
        """For the settings of a run."""
        return {"reference": self.reference, "code": self.code}


def source_of(factory: Factory | None) -> ModelSource:
    """How a run's settings name a factory, so that a change of its code makes other runs.

    Args:
        factory: a function or class without arguments; None for the default network.

    Raises:
        TypeError: it is no callable without arguments.
    """
    if factory is None:
        return ModelSource("", "")
    if isinstance(factory, nn.Module) or not callable(factory):
        raise TypeError(
            f"make_model must be a function that makes a new network, got {type(factory).__name__}; give "
            "`lambda: MyNet()`: each run starts from new weights"
        )
    module, name = getattr(factory, "__module__", None), getattr(factory, "__qualname__", None)
    if module and name and module != "__main__" and "<" not in name and _imported(module, name) is factory:
        return ModelSource(f"{module}:{name}", _hash(_source(inspect.getmodule(factory))))
    code = _hash(_source(factory))
    _here[code] = factory
    return ModelSource(f"here:{code}", code)


def make(source: Mapping[str, str], input_shape: tuple[int, ...], num_outputs: int) -> nn.Module:
    """The network, new, of a source that :func:`source_of` gave."""
    reference = source["reference"]
    if not reference:
        return default_model(input_shape, num_outputs)
    if reference.startswith("here:"):
        return _here[source["code"]]()
    module, _, name = reference.partition(":")
    made: nn.Module = _imported(module, name)()
    return made


def check_output(model: nn.Module, inputs: Tensor, num_outputs: int) -> None:
    """Feed a network once.

    Raises:
        ValueError: it does not take the inputs, or gives something else than (B, outputs).
    """
    model.eval()
    try:
        output: Any = model(inputs)
    except (RuntimeError, ValueError, TypeError) as error:
        raise ValueError(f"the network does not take inputs of shape {tuple(inputs.shape)}: {error}") from error
    shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
    if shape != (len(inputs), num_outputs):
        raise ValueError(f"the network must give ({len(inputs)}, {num_outputs}) for these inputs, it gives {shape}")


def _imported(module: str, name: str) -> Any:
    found: Any = import_module(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return found


def _source(thing: Any) -> str:
    if isinstance(thing, partial):
        return f"{_source(thing.func)}{thing.args}{sorted(thing.keywords.items())}"
    try:
        return inspect.getsource(thing)
    except (OSError, TypeError):  # typed into an interpreter that keeps no source
        code = getattr(thing, "__code__", None)
        return repr((code.co_code, code.co_consts, code.co_names)) if code else repr(thing)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
