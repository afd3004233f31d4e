"""Random state as data: seeding, saving, restoring, and putting it back after a guest has drawn from it."""

import hashlib
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

__all__ = ["generators", "mix", "preserved", "rng_state", "seed_all", "set_rng_state"]


def mix(*parts: int) -> int:
    """One well spread 63-bit seed from several numbers, the same on every machine.

    Examples:
        >>> mix(0, 1) != mix(1, 0)
        True
    """
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def seed_all(seed: int) -> None:
    """Seed Python, NumPy and torch (all devices).

    Examples:
        >>> seed_all(0); first = torch.rand(1)
        >>> seed_all(0); bool(first == torch.rand(1))
        True
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  the global generator is what data transforms draw from
    torch.manual_seed(seed)


def rng_state() -> dict[str, Any]:
    """State of the global generators of Python, NumPy, torch and this process's GPU, as tensors and plain values.

    Examples:
        >>> sorted(rng_state().keys() - {"cuda"})
        ['numpy', 'python', 'torch']
    """
    numpy: Any = np.random.get_state(legacy=True)  # noqa: NPY002
    name, keys, position, has_gauss, cached = numpy
    state = {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(cached)),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Put a state from :func:`rng_state` back.

    Examples:
        >>> before = rng_state(); first = torch.rand(1)
        >>> set_rng_state(before); bool(first == torch.rand(1))
        True
    """
    random.setstate(state["python"])
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


@contextmanager
def preserved() -> Iterator[None]:
    """Whatever is drawn inside leaves no trace outside.

    Examples:
        >>> seed_all(0); expected = torch.rand(1)
        >>> seed_all(0)
        >>> with preserved():
        ...     _ = torch.rand(5)
        >>> bool(expected == torch.rand(1))
        True
    """
    state = rng_state()
    try:
        yield
    finally:
        set_rng_state(state)


def generators(module: nn.Module) -> dict[str, torch.Generator]:
    """The ``torch.Generator`` attributes of a module and its submodules, by dotted name.

    Examples:
        >>> module = nn.Linear(2, 2)
        >>> module.noise = torch.Generator()
        >>> list(generators(module))
        ['noise']
    """
    return {
        f"{prefix}.{name}".lstrip("."): value
        for prefix, part in module.named_modules()
        for name, value in vars(part).items()
        if isinstance(value, torch.Generator)
    }
