"""Lottery tickets: prune the smallest weights, rewind the rest to where they were, train again, and so on.

Masks keep the model as it is (same parameters, same names): the weights outside are set to zero and their gradients are
masked, so that any optimizer without coupling between weights leaves them at zero.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from regularized.mechanisms.ranges import allowed, between, count

__all__ = ["PruningRound", "density", "iterative_magnitude_pruning", "magnitude_masks", "pruned"]


def _weights(name: str, parameter: Tensor) -> bool:
    """Matrices and convolutions; biases and normalisation are few, and pruning them cuts whole units off."""
    return parameter.ndim > 1


@allowed(keep=between(0.0, 1.0, "(]", "the share of the weights that stays"))
@torch.no_grad()
def magnitude_masks(
    model: nn.Module,
    keep: float,
    *,
    masks: Mapping[str, Tensor] | None = None,
    prunable: Callable[[str, Tensor], bool] = _weights,
) -> dict[str, Tensor]:
    """Which weights are the largest in magnitude, over all layers together.

    Args:
        model: the trained model.
        keep: share of all prunable weights that stays, in (0, 1]; ``round(keep * n)`` of them, exactly, unless the
            given masks leave fewer.
        masks: of an earlier round; what is pruned stays pruned. None: nothing is.
        prunable: ``prunable(name, parameter)`` decides what may be pruned; default everything with at least two
            dimensions. The code of dinopl prunes biases and normalisation too: ``lambda name, p: True``.

    Returns:
        A bool mask for each prunable parameter, by name; True stays.

    Raises:
        ValueError: ``keep`` outside (0, 1], or nothing is prunable.

    Examples:
        >>> model = nn.Linear(4, 1)
        >>> model.weight.data = torch.tensor([[0.1, -3.0, 2.0, 0.0]])
        >>> magnitude_masks(model, 0.5)
        {'weight': tensor([[False,  True,  True, False]])}
    """
    chosen = {name: p for name, p in model.named_parameters() if prunable(name, p)}
    if not chosen:
        raise ValueError("there is nothing to prune: no parameter of the model is prunable")
    size = torch.cat([p.abs().flatten().float() for p in chosen.values()])
    if masks is not None:
        alive = torch.cat([masks[name].flatten() for name in chosen])
        size = size.masked_fill(~alive, -1.0)  # below every magnitude
    number = max(round(keep * size.numel()), 1)
    flat = torch.zeros_like(size, dtype=torch.bool)
    flat[size.topk(number).indices] = True  # exactly that many, where a threshold would keep or drop all equal ones
    flat &= size >= 0
    parts = flat.split([p.numel() for p in chosen.values()])
    return {name: part.view_as(p) for (name, p), part in zip(chosen.items(), parts, strict=True)}


def density(masks: Mapping[str, Tensor]) -> float:
    """Share of the prunable weights that is left.

    Examples:
        >>> density({"weight": torch.tensor([True, False, False, False])})
        0.25
    """
    return sum(int(m.sum()) for m in masks.values()) / sum(m.numel() for m in masks.values())


@contextmanager
def pruned(model: nn.Module, masks: Mapping[str, Tensor]) -> Iterator[nn.Module]:
    """Inside, the weights outside the masks are zero and stay zero while the model is trained.

    Gradients are masked as they are accumulated. Build the optimizer inside: older moments would move the weights.

    Args:
        model: changed in place; the zeros stay afterwards.
        masks: bool mask by name of the parameter; True stays.

    Raises:
        KeyError: a name is no parameter of the model.

    Examples:
        >>> model = nn.Linear(2, 1)
        >>> with pruned(model, {"weight": torch.tensor([[True, False]])}):
        ...     optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        ...     model(torch.ones(1, 2)).sum().backward()
        ...     optimizer.step()
        >>> bool(model.weight[0, 1] == 0)
        True
    """
    parameters = dict(model.named_parameters())
    if unknown := set(masks) - set(parameters):
        raise KeyError(f"the masks name {sorted(unknown)[:3]}, which are no parameters of the model")
    handles = []
    for name, mask in masks.items():
        parameter, where = parameters[name], mask.to(parameters[name].device)
        with torch.no_grad():
            parameter.mul_(where)
        handles.append(parameter.register_hook(lambda gradient, where=where: gradient * where))
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True, slots=True)
class PruningRound:
    """One round of iterative pruning.

    Args:
        density: share of the prunable weights that this round trained; 1 in the first.
        score: what ``evaluate`` said of the trained model; None without one.
        masks: which weights they were.
    """

    density: float
    score: float | None
    masks: Mapping[str, Tensor]


@allowed(rounds=count(0), rate=between(0.0, 1.0, "()", "the share of the remaining weights to remove"))
def iterative_magnitude_pruning(
    model: nn.Module,
    train: Callable[[nn.Module], None],
    *,
    rounds: int = 5,
    rate: float = 0.2,
    evaluate: Callable[[nn.Module], float] | None = None,
    rewind_to: Mapping[str, Tensor] | None = None,
    prunable: Callable[[str, Tensor], bool] = _weights,
) -> list[PruningRound]:
    """Train, prune the smallest weights, rewind the others to the checkpoint, and repeat.

    The checkpoint is what is under test: it contains a lottery ticket if the sparse network that starts from it trains
    as well as the dense one. It may be an initialisation, some epochs of training, or a self-supervised student.

    Args:
        model: trained in place; it is left as the last round's sparse network.
        train: trains the given model with the whole budget; it must build its optimizer itself.
        rounds: prunings after the first, dense training, so ``rounds + 1`` trainings; at least 0.
        rate: share of the remaining weights that each pruning removes, in (0, 1); default 0.2, the usual one
            (Frankle and Carbin 2019). After r rounds ``(1 - rate)^r`` of the weights are left.
        evaluate: a number that describes a trained model, such as its test accuracy.
        rewind_to: ``state_dict`` of the checkpoint; None is the model as given. Buffers are rewound too.
        prunable: see :func:`magnitude_masks`.

    Returns:
        ``rounds + 1`` rounds, the dense one first.

    Raises:
        ValueError: ``rounds`` negative, ``rate`` outside (0, 1), or nothing is prunable.

    Examples:
        >>> x, y = torch.randn(64, 4), torch.randn(64, 1)
        >>> def train(model):
        ...     optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        ...     for _ in range(5):
        ...         (model(x) - y).square().mean().backward()
        ...         optimizer.step()
        ...         optimizer.zero_grad()
        >>> found = iterative_magnitude_pruning(nn.Linear(4, 1), train, rounds=2, rate=0.5)
        >>> [r.density for r in found]
        [1.0, 0.5, 0.25]
    """
    checkpoint = {k: v.detach().clone() for k, v in (rewind_to or model.state_dict()).items()}
    masks = magnitude_masks(model, 1.0, prunable=prunable)
    found = []
    for number in range(rounds + 1):
        model.load_state_dict(checkpoint)
        with pruned(model, masks):
            train(model)
        found.append(PruningRound(density(masks), None if evaluate is None else evaluate(model), masks))
        if number < rounds:
            masks = magnitude_masks(model, (1.0 - rate) ** (number + 1), masks=masks, prunable=prunable)
    return found
