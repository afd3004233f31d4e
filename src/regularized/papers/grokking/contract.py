"""What the contract suite checks of the diagnostics."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from regularized.evidence.contract import DiagnosticSubject
from regularized.understanding.grokking.modular_arithmetic import (
    ModularArithmetic,
    ModularTransformer,
    QuadraticMLP,
)
from regularized.understanding.grokking.pruning import pruning_sweep
from regularized.understanding.grokking.report import MemorizationProbe, subset_accuracies

P = 7


def small_task() -> ModularArithmetic:
    """Addition modulo 7, a part of the answers wrong."""
    return ModularArithmetic(P, noise=0.4)


def small_mlp() -> nn.Module:
    """12 neurons, with everything that can be left in another mode."""
    return QuadraticMLP(P, width=12, dropout=0.2, norm="batch")


def _transformer() -> nn.Module:
    return ModularTransformer(P, width=8, heads=2)


def _probed(model: nn.Module) -> Mapping[str, Tensor]:
    probe = MemorizationProbe(small_task())
    scores = probe.scores(model)
    assert scores is not None
    return {name: torch.tensor(value) for name, value in probe(model).items()} | {"scores": scores}


def _swept(model: nn.Module) -> Mapping[str, Tensor]:
    probe = MemorizationProbe(small_task())
    scores = probe.scores(model)
    assert scores is not None
    records = pruning_sweep(model, probe, scores, fractions=(0.0, 0.5), norm="norm1")
    return {f"{name} {k}": torch.tensor(value) for k, record in enumerate(records) for name, value in record.items()}


def _classifier() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3))


def _subsets(model: nn.Module) -> Mapping[str, Tensor]:
    draws = torch.Generator().manual_seed(0)
    x, y = torch.randn(60, 6, generator=draws), torch.randint(3, (60,), generator=draws)
    batches = [(x[rows], y[rows], rows) for rows in torch.arange(60).split(25)]
    found = subset_accuracies(model, batches, torch.arange(60) < 20, clean=(y + 1) % 3)
    return {name: torch.tensor(value) for name, value in found.items()}


def subjects() -> list[DiagnosticSubject]:
    """The probe on both networks, the sweep, and the accuracies by subset of any classifier."""
    return [
        DiagnosticSubject("probe", small_mlp, _probed),
        DiagnosticSubject("probe of a transformer", _transformer, _probed),
        DiagnosticSubject("pruning sweep", small_mlp, _swept),
        DiagnosticSubject("accuracies by subset", _classifier, _subsets),
    ]
