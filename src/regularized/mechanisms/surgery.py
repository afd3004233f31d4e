"""What all techniques that operate on a model share: warnings, selection of submodules, stale optimizers."""

from collections.abc import Iterable, Iterator

import torch
from torch import nn

__all__ = ["NoEffectWarning", "check_optimizer_is_current", "select_modules", "tied_parameters"]


class NoEffectWarning(UserWarning):
    """A technique found nothing to work on, so it will not do anything."""


def select_modules(
    model: nn.Module, include: tuple[type[nn.Module], ...], exclude: Iterable[str] = ()
) -> Iterator[tuple[str, nn.Module]]:
    """Submodules of given types, by name, in the order of ``named_modules``.

    Args:
        model: searched through; itself included, under the name ``""``.
        include: types to select.
        exclude: dotted names to leave out, each with everything below it.

    Raises:
        ValueError: a name in ``exclude`` is no submodule.

    Examples:
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> [name for name, _ in select_modules(model, (nn.Linear,), exclude=["2"])]
        ['0']
    """
    names = {name for name, _ in model.named_modules()}
    left_out = tuple(exclude)
    for name in left_out:
        if name not in names:
            raise ValueError(f"exclude names {name!r}, which is no submodule; there are {sorted(names - {''})[:20]}")
    for name, module in model.named_modules():
        if isinstance(module, include) and not any(name == out or name.startswith(out + ".") for out in left_out):
            yield name, module


def tied_parameters(model: nn.Module) -> dict[int, list[str]]:
    """Parameters that several submodules share, as ``id -> names``.

    Examples:
        >>> model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        >>> model[1].weight = model[0].weight
        >>> list(tied_parameters(model).values())
        [['0.weight', '1.weight']]
    """
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {key: owners for key, owners in names.items() if len(owners) > 1}


def check_optimizer_is_current(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Make sure that the optimizer holds every trainable parameter of the model.

    An optimizer that was built before surgery still holds the old parameters: training would silently change nothing.

    Raises:
        ValueError: it lacks some; their number and the first names are given.

    Examples:
        >>> model = nn.Linear(3, 2)
        >>> check_optimizer_is_current(model, torch.optim.SGD(model.parameters(), lr=0.1))
    """
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in held]
    if missing:
        raise ValueError(
            f"the optimizer does not hold {len(missing)} trainable parameter(s) of the model, such as {missing[:3]}; "
            "it was probably built before the model was changed. Build it afterwards, or give Trainer a factory such "
            "as partial(torch.optim.SGD, lr=0.1)"
        )
