"""State of a procedure: what its attributes hold, as one dictionary, compared whole before it changes anything."""

import copy
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from regularized.training.randomness import generators

__all__ = ["check_keys", "check_optimizer", "restore", "state_of"]


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
        NonFiniteLoss: a weight that its :class:`~regularized.training.optimizers.Optimizers` train is not finite.

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
    check_keys(f"the state of {type(owner).__name__}", {*names, "generators"}, state)
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
        check_optimizer(path, value, saved)
    elif (inside := _items(value)) is not None:
        keys = {key for key, _ in inside}
        check_keys(path, keys, saved if isinstance(value, Mapping) else range(len(saved)))
        for key, content in inside:
            _check(f"{path}[{key!r}]", content, saved[key])


def check_keys(path: str, needed: Collection[Any], there: Collection[Any]) -> None:
    """Make sure that a state has the keys that it needs, and no other.

    Args:
        path: what the state is of, for the message.
        needed: keys that must be there.
        there: keys that are there.

    Raises:
        ValueError: some are missing or unknown.

    Examples:
        >>> check_keys("the state", {"steps"}, {"steps": 3})
    """
    missing, unknown = [sorted(map(str, set(a) - set(b))) for a, b in ((needed, there), (there, needed))]
    if missing or unknown:
        raise ValueError(
            f"{path} does not fit: missing {missing[:3]} ({len(missing)} in all), unknown {unknown[:3]} "
            f"({len(unknown)} in all); build the same procedure before loading"
        )


def _check_module(path: str, module: nn.Module, saved: Mapping[str, Any]) -> None:
    own = module.state_dict()
    check_keys(path, own, saved)
    for key, value in own.items():
        if isinstance(value, Tensor) and isinstance(saved[key], Tensor) and value.shape != saved[key].shape:
            raise ValueError(
                f"{path} does not fit: {key!r} has shape {tuple(saved[key].shape)} in the state and "
                f"{tuple(value.shape)} here; build the same network before loading"
            )


def check_optimizer(path: str, optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Make sure that the state of an optimizer has parameter groups of its sizes.

    Args:
        path: which optimizer, for the message.
        optimizer: the one that is to take it over.
        saved: its ``state_dict``.

    Raises:
        ValueError: the groups differ.

    Examples:
        >>> sgd = torch.optim.SGD([torch.ones(2)], lr=0.1)
        >>> check_optimizer("optimizer", sgd, sgd.state_dict())
    """
    there, here = ([len(g["params"]) for g in groups] for groups in (saved["param_groups"], optimizer.param_groups))
    if there != here:
        raise ValueError(
            f"{path} does not fit: its parameter groups have {there} tensors in the state and {here} here; build the "
            "same networks and optimizers before loading"
        )
