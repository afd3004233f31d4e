"""Diagonal Fisher information of a classifier, from the gradient of each sample.

``exact``: ``F = E_x sum_c p(c|x) (d log p(c|x) / d theta)^2``, the expectation over the model's own labels: a backward
pass for each class. ``empirical``: the given label in place of that expectation, one backward pass; it vanishes where
the training data are fitted, which is why it protects little after long training.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from regularized.mechanisms.ranges import Choice, allowed, count
from regularized.training.step import Batch, call_model

__all__ = ["FisherKind", "diagonal_fisher"]

FisherKind: TypeAlias = Literal["exact", "empirical"]
"""Over the model's own labels, or at the given ones."""


@allowed(kind=Choice("exact", "empirical"), chunk_size=count(1))
def diagonal_fisher(
    model: nn.Module,
    batches: Iterable[object],
    names: Sequence[str],
    *,
    columns: Tensor | None = None,
    kind: FisherKind = "exact",
    chunk_size: int = 64,
) -> dict[str, Tensor]:
    """Mean over the samples of squared gradients of the log-probability of labels.

    The model is in evaluation mode meanwhile, and as it was afterwards. Gradients of single samples come from
    ``torch.func.vmap``.

    Args:
        model: maps inputs to logits (B, C).
        batches: of the task that was just learnt: ``(x, y)`` or :class:`~regularized.training.step.Batch`.
        names: parameters of which it is wanted, as in ``named_parameters``.
        columns: positions of the logits that count, (C',) int64; targets are positions among them. Default all.
        kind: ``"exact"`` (default) or ``"empirical"``.
        chunk_size: samples whose gradients are held at a time; default 64.

    Returns:
        For each name a tensor of the parameter's shape, float32 or wider.

    Raises:
        ValueError: there is no sample; an unknown kind; or nothing reaches a parameter, so all is zero.

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> model, data = nn.Linear(3, 2), [(torch.randn(5, 3), torch.tensor([0, 1, 1, 0, 1]))]
        >>> fisher = diagonal_fisher(model, data, ["weight"])
        >>> fisher["weight"].shape, bool((fisher["weight"] > 0).all())
        (torch.Size([2, 3]), True)
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        return _fisher(model, batches, names, columns, kind, chunk_size)
    finally:
        for module, mode in modes.items():
            module.training = mode


def _fisher(
    model: nn.Module,
    batches: Iterable[object],
    names: Sequence[str],
    columns: Tensor | None,
    kind: FisherKind,
    chunk_size: int,
) -> dict[str, Tensor]:
    known = {name: p.detach() for name, p in model.named_parameters()}
    wanted = {name: known[name] for name in names}
    rest = {**{k: v for k, v in known.items() if k not in wanted}, **dict(model.named_buffers())}
    device = next(iter(wanted.values())).device
    sums = {name: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for name, p in wanted.items()}

    def log_p(weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
        def forward(inputs: Tensor) -> Tensor:
            logits: Tensor = call_model(lambda *a: functional_call(model, {**rest, **weights}, a), inputs)
            return logits

        logits = forward(x[None])[0]
        return F.log_softmax(logits if columns is None else logits[columns], dim=0)

    def of_label(weights: Mapping[str, Tensor], x: Tensor, label: Tensor) -> Tensor:
        return log_p(weights, x).gather(0, label[None])[0]

    each = vmap(grad(of_label), in_dims=(None, 0, 0))
    probabilities = vmap(log_p, in_dims=(None, 0))
    total = 0
    for raw in batches:
        batch = Batch.of(raw).map(lambda tensor: tensor.to(device))
        if batch.targets is None:
            raise ValueError("Fisher information needs labelled batches: (x, y), or a mapping with `targets`")
        for x, y in zip(batch.inputs.split(chunk_size), batch.targets.split(chunk_size), strict=True):
            total += len(x)
            if kind == "empirical":
                _add(sums, each(wanted, x, y), None)
                continue
            with torch.no_grad():
                p = probabilities(wanted, x).exp()
            for label in range(p.shape[1]):
                _add(sums, each(wanted, x, torch.full_like(y, label)), p[:, label])
    if not total:
        raise ValueError("Fisher information needs at least one sample; the data of the task are empty")
    if all(not bool(value.any()) for value in sums.values()):
        raise ValueError(
            "the Fisher information is zero for every weight: no gradient reaches them from the logits. Is the output "
            "detached, or are these weights not used?"
        )
    return {name: value / total for name, value in sums.items()}


def _add(sums: Mapping[str, Tensor], gradients: Mapping[str, Tensor], shares: Tensor | None) -> None:
    """Add the squares of per-sample gradients (B, ...), each with its sample's share."""
    for name, value in gradients.items():
        squares = value.square().flatten(1)
        summed = squares.sum(dim=0) if shares is None else shares.to(squares) @ squares
        sums[name].add_(summed.view_as(sums[name]))
