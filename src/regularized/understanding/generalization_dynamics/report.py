"""Which directions of a network's weights can learn at all: spectrum of each layer's inputs, and its frozen subspace.

A gradient step changes a linear layer's weights only along the inputs that it saw. Directions that no input has (dead
pixels, fewer samples than inputs) keep their random start for ever (Advani and Saxe 2017): harmless when it is small,
noise when it is large.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["LayerSpectrum", "frozen_drift", "frozen_subspace"]

_BETWEEN_MODES = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)


@dataclass(frozen=True, slots=True)
class LayerSpectrum:
    """What the inputs of one linear layer span.

    Args:
        layer: dotted name.
        width: inputs N of the layer.
        rows: input rows that were seen.
        eigenvalues: (N,) of ``H^T H / rows``, in falling order.
        rank: eigenvalues above ``tolerance * largest``.
        frozen_basis: (N, N - rank), orthonormal: the directions that no input has.
    """

    layer: str
    width: int
    rows: int
    eigenvalues: Tensor = field(repr=False)
    rank: int
    frozen_basis: Tensor = field(repr=False)

    @property
    def frozen_share(self) -> float:
        """Share of the weight directions that never learn."""
        return 1.0 - self.rank / self.width

    @property
    def condition(self) -> float:
        """Largest eigenvalue over the smallest one that learns: how many times slower the slowest direction is."""
        return float(self.eigenvalues[0] / self.eigenvalues[self.rank - 1]) if self.rank else float("nan")


@torch.no_grad()
def frozen_subspace(
    model: nn.Module, batches: Iterable[Any], *, layers: Sequence[str] | None = None, tolerance: float = 1e-6
) -> dict[str, LayerSpectrum]:
    """Spectrum and frozen subspace of the inputs of linear layers; costs one forward pass over the data.

    Args:
        model: in evaluation mode; nothing in it is changed.
        batches: tensors, or tuples whose first element is the model's input.
        layers: names of ``nn.Linear`` layers; default all.
        tolerance: eigenvalues below this share of the largest count as zero; default 1e-6.

    Returns:
        A :class:`LayerSpectrum` for each layer, by name.

    Raises:
        ValueError: batch normalisation or dropout is in training mode, a name is no linear layer, there is none, or
            there is no batch.

    Examples:
        >>> pixels = torch.rand(50, 6) * torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 0.0])   # two dead pixels
        >>> report = frozen_subspace(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)), [pixels])
        >>> report["0"].rank, round(report["0"].frozen_share, 3)
        (4, 0.333)
    """
    if moving := [name for name, m in model.named_modules() if m.training and isinstance(m, _BETWEEN_MODES)]:
        raise ValueError(
            f"{moving[:3]} behave differently in training mode, so the spectrum would change from pass to pass; call "
            "model.eval() first"
        )
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    wanted = list(linear) if layers is None else list(layers)
    if unknown := [name for name in wanted if name not in linear]:
        raise ValueError(f"no linear layer is called {unknown}; there are {sorted(linear)[:20]}")
    if not wanted:
        raise ValueError("the model has no nn.Linear layer to report on")
    grams: dict[str, Tensor] = {}
    rows: dict[str, int] = dict.fromkeys(wanted, 0)

    def collect(name: str) -> Any:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            h = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).double()
            gram = h.T @ h
            grams[name] = grams[name] + gram if name in grams else gram
            rows[name] += len(h)

        return hook

    handles = [linear[name].register_forward_pre_hook(collect(name)) for name in wanted]
    try:
        for batch in batches:
            model(batch if isinstance(batch, Tensor) else batch[0])
    finally:
        for handle in handles:
            handle.remove()
    if absent := [name for name in wanted if name not in grams]:
        raise ValueError(f"no input reached {absent[:3]}: the data are empty, or the forward pass leaves them out")
    return {name: _spectrum(name, grams[name], rows[name], tolerance) for name in wanted}


def _spectrum(name: str, gram: Tensor, rows: int, tolerance: float) -> LayerSpectrum:
    values, vectors = torch.linalg.eigh(gram / rows)
    values, vectors = values.flip(0).clamp(min=0.0), vectors.flip(1)
    rank = int((values > tolerance * values[0]).sum())
    return LayerSpectrum(name, len(values), rows, values, rank, vectors[:, rank:])


def frozen_drift(
    report: Mapping[str, LayerSpectrum], before: Mapping[str, Tensor], after: Mapping[str, Tensor]
) -> dict[str, float]:
    """How much of the change of each layer's weights lies in its frozen subspace: ``||P0 dW|| / ||dW||``.

    About 0 for a first layer under plain gradient descent, whose inputs do not change; 1 where all of the change does,
    as weight decay alone does it. Later layers' inputs move while they learn, so theirs need not be 0.

    Args:
        report: from :func:`frozen_subspace`.
        before: a ``state_dict`` from before training.
        after: one from afterwards.

    Returns:
        The share by layer; nan where the weights did not change.

    Raises:
        ValueError: a layer's weight is missing, or has another shape.

    Examples:
        >>> model = nn.Sequential(nn.Linear(2, 1))
        >>> report = frozen_subspace(model, [torch.tensor([[1.0, 0.0]])])
        >>> start = {"0.weight": torch.zeros(1, 2)}
        >>> frozen_drift(report, start, {"0.weight": torch.tensor([[3.0, 4.0]])})
        {'0': 0.8}
    """
    shares = {}
    for name, layer in report.items():
        key = f"{name}.weight" if name else "weight"
        shapes = [tuple(state[key].shape) if key in state else None for state in (before, after)]
        if None in shapes or shapes[0] != shapes[1]:
            raise ValueError(f"{key} must be in both states with the same shape, got {shapes}")
        moved = (after[key] - before[key]).double()
        within = torch.linalg.vector_norm(moved @ layer.frozen_basis.to(moved.device))
        shares[name] = round(float(within / torch.linalg.vector_norm(moved)), 12)
    return shares
