"""What the contract suite checks of the diagnostics, and every bad input with its error."""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from regularized.evidence.contract import BadInput, DiagnosticSubject
from regularized.understanding.grokking.modular_arithmetic import (
    ModularArithmetic,
    ModularTransformer,
    QuadraticMLP,
    analytic_weights,
    modular_optimizer,
    one_hot_mse,
)
from regularized.understanding.grokking.phase_diagram import phase_diagram
from regularized.understanding.grokking.phases import Phase, detect_phases, phase_of
from regularized.understanding.grokking.plot import plot_grokking
from regularized.understanding.grokking.scores import (
    MemorizationProbe,
    inverse_participation_ratio,
    neuron_ipr,
    neuron_masks,
    prune_by_score_,
    pruning_sweep,
    subset_accuracies,
)

_P = 7


def _task() -> ModularArithmetic:
    return ModularArithmetic(_P, noise=0.4)


def _mlp() -> nn.Module:
    return QuadraticMLP(_P, width=12, dropout=0.2, norm="batch")


def _transformer() -> nn.Module:
    return ModularTransformer(_P, width=8, heads=2)


def _probed(model: nn.Module) -> Mapping[str, Tensor]:
    probe = MemorizationProbe(_task())
    scores = probe.scores(model)
    assert scores is not None
    return {name: torch.tensor(value) for name, value in probe(model).items()} | {"scores": scores}


def _swept(model: nn.Module) -> Mapping[str, Tensor]:
    probe = MemorizationProbe(_task())
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
        DiagnosticSubject("probe", _mlp, _probed),
        DiagnosticSubject("probe of a transformer", _transformer, _probed),
        DiagnosticSubject("pruning sweep", _mlp, _swept),
        DiagnosticSubject("accuracies by subset", _classifier, _subsets),
    ]


def bad_inputs() -> list[BadInput]:
    """Every line of the sheet's "bad input"."""
    net, scores = QuadraticMLP(_P, width=12), torch.rand(12)
    good = {"step": 0, "train": 1.0, "test": 0.5}
    weights = nn.Linear(2, 2).parameters
    mask = torch.tensor([True, False])
    return [
        BadInput("p not prime, multiply", lambda: ModularArithmetic(6, "multiply"), UserWarning, ("6", "not a prime")),
        BadInput("p not prime, divide", lambda: ModularArithmetic(9, "divide"), UserWarning, ("9", "one to one")),
        BadInput("frac above 1", lambda: ModularArithmetic(7, frac=1.5), ValueError, ("frac", "[0, 1]", "1.5")),
        BadInput("frac below 0", lambda: ModularArithmetic(7, frac=-0.1), ValueError, ("frac", "[0, 1]", "-0.1")),
        BadInput("noise above 1", lambda: ModularArithmetic(7, noise=2.0), ValueError, ("noise", "[0, 1]", "2.0")),
        BadInput("noise is nan", lambda: ModularArithmetic(7, noise=float("nan")), ValueError, ("noise", "nan")),
        BadInput("nothing to train on", lambda: ModularArithmetic(7, frac=0.01), ValueError, ("49 pairs", "none")),
        BadInput("p below 2", lambda: ModularArithmetic(1), ValueError, ("p must", "1")),
        BadInput("unknown op", lambda: ModularArithmetic(7, cast(Any, "power")), ValueError, ("'power'", "multiply")),
        BadInput(
            "first weight does not match p",
            lambda: neuron_ipr(torch.ones(12, 20), torch.ones(7, 12), p=7),
            ValueError,
            ("columns of first", "group axis", "(12, 20)"),
        ),
        BadInput(
            "second weight does not match p",
            lambda: neuron_ipr(torch.ones(12, 14), torch.ones(12, 7), p=7),
            ValueError,
            ("rows of second", "group axis", "(12, 7)"),
        ),
        BadInput(
            "other numbers of neurons",
            lambda: neuron_ipr(torch.ones(12, 14), torch.ones(7, 11), p=7),
            ValueError,
            ("12 neurons", "11"),
        ),
        BadInput(
            "weight decay that is coupled",
            lambda: modular_optimizer(weights(), weight_decay=5.0, optimizer=torch.optim.Adam),
            UserWarning,
            ("Adam adds", "decoupled", "AdamW"),
        ),
        BadInput("decay < 0", lambda: modular_optimizer(weights(), weight_decay=-1.0), ValueError, (">= 0", "-1.0")),
        BadInput("batch of nothing", lambda: modular_optimizer(weights(), batch_size=0), ValueError, ("batch_size",)),
        BadInput(
            "pruning beside a normalisation",
            lambda: prune_by_score_(_mlp(), scores, fraction=0.5),
            ValueError,
            ("norm1", "shift", "norm='norm1'"),
        ),
        BadInput(
            "a normalisation that is none",
            lambda: neuron_masks(net, scores, fraction=0.5, norm="dropout"),
            ValueError,
            ("'dropout'", "no normalisation"),
        ),
        BadInput(
            "fraction of neurons above 1", lambda: neuron_masks(net, scores, fraction=60), ValueError, ("[0, 1]", "60")
        ),
        BadInput(
            "scores of another layer",
            lambda: neuron_masks(net, torch.rand(5), fraction=0.5),
            ValueError,
            ("'fc1'", "(5,)", "(12, 14)"),
        ),
        BadInput(
            "columns do not fit",
            lambda: neuron_masks(net, scores, fraction=0.5, second="fc1"),
            ValueError,
            ("'fc1'", "12 columns", "(12, 14)"),
        ),
        BadInput(
            "unknown layer", lambda: neuron_masks(net, scores, fraction=0.5, first="fc7"), AttributeError, ("fc7",)
        ),
        BadInput("r of 1", lambda: inverse_participation_ratio(torch.ones(7), r=1), ValueError, ("above 1", "2")),
        BadInput("inputs of another size", lambda: net(torch.rand(3, 5)), ValueError, ("(B, 14)", "(3, 5)")),
        BadInput("not pairs", lambda: net(torch.zeros(3, dtype=torch.int64)), ValueError, ("(B, 2)", "(3,)")),
        BadInput("numbers beyond p", lambda: net(torch.tensor([[7, 0]])), ValueError, ("[0, 7)", "modulus")),
        BadInput("dropout of 1", lambda: QuadraticMLP(7, dropout=1.0), ValueError, ("[0, 1)", "1.0")),
        BadInput("width 0", lambda: QuadraticMLP(7, width=0), ValueError, ("width", "0")),
        BadInput("unknown norm", lambda: QuadraticMLP(7, norm=cast(Any, "group")), ValueError, ("'batch'", "'group'")),
        BadInput(
            "heads do not divide", lambda: ModularTransformer(7, width=10, heads=4), ValueError, ("width=10", "heads=4")
        ),
        BadInput("transformer's dropout", lambda: ModularTransformer(7, dropout=-0.1), ValueError, ("[0, 1)", "-0.1")),
        BadInput("transformer's p", lambda: ModularTransformer(1), ValueError, ("p must", "1")),
        BadInput("no frequency", lambda: analytic_weights(2, 8), ValueError, ("p must", "2")),
        BadInput(
            "unknown reduction",
            lambda: one_hot_mse(torch.ones(1, 2), torch.tensor([0]), reduction=cast(Any, "sum")),
            ValueError,
            ("'none'", "'sum'"),
        ),
        BadInput(
            "another network",
            lambda: MemorizationProbe(_task())(nn.Sequential(nn.Embedding(7, 5), nn.Flatten())),
            ValueError,
            ("(49, 7)", "(49, 10)"),
        ),
        BadInput("no batches", lambda: subset_accuracies(nn.Identity(), [], mask), ValueError, ("no batches",)),
        BadInput(
            "indices for a mask",
            lambda: subset_accuracies(nn.Identity(), [], torch.tensor([3, 4])),
            ValueError,
            ("bool mask", "int64"),
        ),
        BadInput(
            "index beyond the mask",
            lambda: subset_accuracies(
                nn.Identity(), [(torch.eye(2), torch.tensor([0, 1]), torch.tensor([0, 2]))], mask
            ),
            IndexError,
            ("out of bounds",),
        ),
        BadInput("empty log", lambda: detect_phases([]), ValueError, ("empty", "probe(model)")),
        BadInput("nothing to draw", lambda: plot_grokking([], None), ValueError, ("empty",)),
        BadInput("log lacks test", lambda: detect_phases([{"step": 0, "train": 1.0}]), ValueError, ("['test']",)),
        BadInput("steps stand still", lambda: detect_phases([good, good]), ValueError, ("steps", "grow")),
        BadInput(
            "per cents", lambda: detect_phases([{**good, "train": 98.0}]), ValueError, ("train", "divide", "98.0")
        ),
        BadInput("accuracy is nan", lambda: phase_of(float("nan"), 0.5), ValueError, ("train", "nan")),
        BadInput("limits crossed", lambda: phase_of(1.0, 1.0, high=0.4), ValueError, ("low=0.5", "high=0.4")),
        BadInput("patience 0", lambda: detect_phases([good], patience=0), ValueError, ("patience", "0")),
        BadInput("unknown phase", lambda: Phase("enlightenment"), ValueError, ("enlightenment",)),
        BadInput("no cells", lambda: phase_diagram(7, fracs=[]), ValueError, ("fracs=[]",)),
        BadInput("no runs", lambda: phase_diagram(7, runs_at_once=0), ValueError, ("runs_at_once",)),
        BadInput(
            "batch normalisation of the whole set", lambda: phase_diagram(7, norm="batch"), ValueError, ("batch_size",)
        ),
        BadInput("batch of one", lambda: phase_diagram(7, batch_size=1), ValueError, ("at least 2", "1")),
        BadInput(
            "batch larger than the data",
            lambda: phase_diagram(7, fracs=[0.1], noises=[0.0], batch_size=8),
            ValueError,
            ("batch_size=8", "4 pairs"),
        ),
    ]
