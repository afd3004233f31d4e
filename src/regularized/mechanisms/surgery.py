"""What all techniques that operate on a model share: warnings, selection of submodules, stale optimizers."""

import difflib
from collections.abc import Iterable, Iterator

import torch
from torch import nn

__all__ = [
    "NoEffectWarning",
    "check_called",
    "check_optimizer_is_current",
    "close_names",
    "match_modules",
    "select_modules",
    "tied_parameters",
]


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


def match_modules(
    model: nn.Module,
    targets: Iterable[str] | None,
    *,
    kind: type[nn.Module] = nn.Linear,
    option: str = "target_modules",
) -> dict[str, nn.Module]:
    """Submodules by name or by the end of their name, as PEFT's ``target_modules``, in the order of ``named_modules``.

    Args:
        model: searched through; itself not included.
        targets: dotted names, or their last parts such as ``"q_proj"``; None takes every submodule of ``kind``.
        kind: what None takes; default ``nn.Linear``.
        option: what the user calls ``targets``, for errors.

    Raises:
        ValueError: a target that nothing matches, with close names; or one string instead of a list.

    Examples:
        >>> model = nn.ModuleDict({"block": nn.ModuleDict({"q_proj": nn.Linear(3, 4)}), "head": nn.Linear(4, 2)})
        >>> list(match_modules(model, ["q_proj"])), list(match_modules(model, None))
        (['block.q_proj'], ['block.q_proj', 'head'])
    """
    if isinstance(targets, str):
        raise ValueError(f"{option} must be a list of names, got the string {targets!r}; write [{targets!r}]")
    modules = {name: module for name, module in model.named_modules() if name}
    if targets is None:
        return {name: module for name, module in modules.items() if isinstance(module, kind)}
    wanted = tuple(targets)
    matched = {name: [t for t in wanted if name == t or name.endswith(f".{t}")] for name in modules}
    for target in wanted:
        if not any(target in by for by in matched.values()):
            raise ValueError(
                f"{option}: no module of {type(model).__name__} is called {target!r}; {close_names([target], modules)}"
            )
    return {name: modules[name] for name, by in matched.items() if by}


def close_names(asked: Iterable[str], known: Iterable[str]) -> str:
    """What an error says of names that are nowhere: those that may have been meant, else some that there are.

    Args:
        asked: the names that nothing matches; one with a dot is compared with whole names, others with last parts.
        known: dotted names that there are.

    Examples:
        >>> close_names(["q_proi"], ["block.q_proj", "head"]), close_names(["x"], ["block.q_proj", "head"])
        ("close names: ['q_proj']", "there are: ['head', 'q_proj']")
    """
    whole = sorted(known)
    last = sorted({name.rpartition(".")[2] for name in whole})
    close = {
        near for one in asked for near in difflib.get_close_matches(one, whole if "." in one else last, cutoff=0.4)
    }
    return f"close names: {sorted(close)}" if close else f"there are: {last[:20]}"


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


_READ = {nn.MultiheadAttention: ("out_proj",), nn.TransformerEncoderLayer: ("linear1", "linear2")}


def check_called(model: nn.Module, names: Iterable[str]) -> None:
    """Refuse layers whose weight is read by what they are part of, instead of calling them: an adapter is passed by.

    ``nn.MultiheadAttention`` reads ``out_proj`` always, ``nn.TransformerEncoderLayer`` its linear layers in evaluation.

    Args:
        model: what the layers are in.
        names: their dotted names.

    Raises:
        ValueError: one of them is such a layer.

    Examples:
        >>> check_called(nn.Sequential(nn.Linear(3, 4)), ["0"])
    """
    for name in names:
        owner, _, part = name.rpartition(".")
        kind = next(
            (k for k, parts in _READ.items() if isinstance(model.get_submodule(owner), k) and part in parts), None
        )
        if kind is not None:
            raise ValueError(
                f"layer {name!r} belongs to nn.{kind.__name__}, which reads its weight instead of calling it, so that "
                "an adapter would be passed by; leave it out of target_modules"
            )


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
