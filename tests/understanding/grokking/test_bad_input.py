"""Bad inputs of `grokking`: each is answered by what was given, what is allowed, and how to mend it."""

import pytest
import torch
from tests.bad_input import assert_refused, refused
from torch import nn

from regularized.papers.grokking.contract import P, small_mlp, small_task
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
from regularized.understanding.grokking.pruning import neuron_masks, prune_by_score_
from regularized.understanding.grokking.report import MemorizationProbe, subset_accuracies
from regularized.understanding.grokking.scores import inverse_participation_ratio, neuron_ipr


def bad_inputs():
    """Every line of the sheet's "bad input"."""
    net, scores = QuadraticMLP(P, width=12), torch.rand(12)
    good = {"step": 0, "train": 1.0, "test": 0.5}
    weights = nn.Linear(2, 2).parameters
    mask = torch.tensor([True, False])
    return [
        refused("p not prime, multiply", lambda: ModularArithmetic(6, "multiply"), UserWarning, ("6", "not a prime")),
        refused("p not prime, divide", lambda: ModularArithmetic(9, "divide"), UserWarning, ("9", "one to one")),
        refused("frac above 1", lambda: ModularArithmetic(7, frac=1.5), ValueError, ("frac", "[0, 1]", "1.5")),
        refused("frac below 0", lambda: ModularArithmetic(7, frac=-0.1), ValueError, ("frac", "[0, 1]", "-0.1")),
        refused("noise above 1", lambda: ModularArithmetic(7, noise=2.0), ValueError, ("noise", "[0, 1]", "2.0")),
        refused("noise is nan", lambda: ModularArithmetic(7, noise=float("nan")), ValueError, ("noise", "nan")),
        refused("nothing to train on", lambda: ModularArithmetic(7, frac=0.01), ValueError, ("49 pairs", "none")),
        refused("p below 2", lambda: ModularArithmetic(1), ValueError, ("p must", "1")),
        refused("unknown op", lambda: ModularArithmetic(7, "power"), ValueError, ("'power'", "multiply")),
        refused(
            "first weight does not match p",
            lambda: neuron_ipr(torch.ones(12, 20), torch.ones(7, 12), p=7),
            ValueError,
            ("columns of first", "group axis", "(12, 20)"),
        ),
        refused(
            "second weight does not match p",
            lambda: neuron_ipr(torch.ones(12, 14), torch.ones(12, 7), p=7),
            ValueError,
            ("rows of second", "group axis", "(12, 7)"),
        ),
        refused(
            "other numbers of neurons",
            lambda: neuron_ipr(torch.ones(12, 14), torch.ones(7, 11), p=7),
            ValueError,
            ("12 neurons", "11"),
        ),
        refused(
            "weight decay that is coupled",
            lambda: modular_optimizer(weights(), weight_decay=5.0, optimizer=torch.optim.Adam),
            UserWarning,
            ("Adam adds", "decoupled", "AdamW"),
        ),
        refused("decay < 0", lambda: modular_optimizer(weights(), weight_decay=-1.0), ValueError, (">= 0", "-1.0")),
        refused("batch of nothing", lambda: modular_optimizer(weights(), batch_size=0), ValueError, ("batch_size",)),
        refused(
            "pruning beside a normalisation",
            lambda: prune_by_score_(small_mlp(), scores, fraction=0.5),
            ValueError,
            ("norm1", "shift", "norm='norm1'"),
        ),
        refused(
            "a normalisation that is none",
            lambda: neuron_masks(net, scores, fraction=0.5, norm="dropout"),
            ValueError,
            ("'dropout'", "no normalisation"),
        ),
        refused(
            "fraction of neurons above 1", lambda: neuron_masks(net, scores, fraction=60), ValueError, ("[0, 1]", "60")
        ),
        refused(
            "scores of another layer",
            lambda: neuron_masks(net, torch.rand(5), fraction=0.5),
            ValueError,
            ("'fc1'", "(5,)", "(12, 14)"),
        ),
        refused(
            "columns do not fit",
            lambda: neuron_masks(net, scores, fraction=0.5, second="fc1"),
            ValueError,
            ("'fc1'", "12 columns", "(12, 14)"),
        ),
        refused(
            "unknown layer", lambda: neuron_masks(net, scores, fraction=0.5, first="fc7"), AttributeError, ("fc7",)
        ),
        refused("r of 1", lambda: inverse_participation_ratio(torch.ones(7), r=1), ValueError, ("above 1", "2")),
        refused("inputs of another size", lambda: net(torch.rand(3, 5)), ValueError, ("(B, 14)", "(3, 5)")),
        refused("not pairs", lambda: net(torch.zeros(3, dtype=torch.int64)), ValueError, ("(B, 2)", "(3,)")),
        refused("numbers beyond p", lambda: net(torch.tensor([[7, 0]])), ValueError, ("[0, 7)", "modulus")),
        refused("dropout of 1", lambda: QuadraticMLP(7, dropout=1.0), ValueError, ("[0, 1)", "1.0")),
        refused("width 0", lambda: QuadraticMLP(7, width=0), ValueError, ("width", "0")),
        refused("unknown norm", lambda: QuadraticMLP(7, norm="group"), ValueError, ("'batch'", "'group'")),
        refused(
            "heads do not divide", lambda: ModularTransformer(7, width=10, heads=4), ValueError, ("width=10", "heads=4")
        ),
        refused("transformer's dropout", lambda: ModularTransformer(7, dropout=-0.1), ValueError, ("[0, 1)", "-0.1")),
        refused("transformer's p", lambda: ModularTransformer(1), ValueError, ("p must", "1")),
        refused("no frequency", lambda: analytic_weights(2, 8), ValueError, ("p must", "2")),
        refused(
            "unknown reduction",
            lambda: one_hot_mse(torch.ones(1, 2), torch.tensor([0]), reduction="sum"),
            ValueError,
            ("'none'", "'sum'"),
        ),
        refused(
            "another network",
            lambda: MemorizationProbe(small_task())(nn.Sequential(nn.Embedding(7, 5), nn.Flatten())),
            ValueError,
            ("(49, 7)", "(49, 10)"),
        ),
        refused("no batches", lambda: subset_accuracies(nn.Identity(), [], mask), ValueError, ("no batches",)),
        refused(
            "indices for a mask",
            lambda: subset_accuracies(nn.Identity(), [], torch.tensor([3, 4])),
            ValueError,
            ("bool mask", "int64"),
        ),
        refused(
            "index beyond the mask",
            lambda: subset_accuracies(
                nn.Identity(), [(torch.eye(2), torch.tensor([0, 1]), torch.tensor([0, 2]))], mask
            ),
            IndexError,
            ("out of bounds",),
        ),
        refused("empty log", lambda: detect_phases([]), ValueError, ("empty", "probe(model)")),
        refused("nothing to draw", lambda: plot_grokking([], None), ValueError, ("empty",)),
        refused("log lacks test", lambda: detect_phases([{"step": 0, "train": 1.0}]), ValueError, ("['test']",)),
        refused("steps stand still", lambda: detect_phases([good, good]), ValueError, ("steps", "grow")),
        refused("per cents", lambda: detect_phases([{**good, "train": 98.0}]), ValueError, ("train", "divide", "98.0")),
        refused("accuracy is nan", lambda: phase_of(float("nan"), 0.5), ValueError, ("train", "nan")),
        refused("limits crossed", lambda: phase_of(1.0, 1.0, high=0.4), ValueError, ("low=0.5", "high=0.4")),
        refused("patience 0", lambda: detect_phases([good], patience=0), ValueError, ("patience", "0")),
        refused("unknown phase", lambda: Phase("enlightenment"), ValueError, ("enlightenment",)),
        refused("no cells", lambda: phase_diagram(7, fracs=[]), ValueError, ("fracs=[]",)),
        refused("no runs", lambda: phase_diagram(7, runs_at_once=0), ValueError, ("runs_at_once",)),
        refused(
            "batch normalisation of the whole set", lambda: phase_diagram(7, norm="batch"), ValueError, ("batch_size",)
        ),
        refused("batch of one", lambda: phase_diagram(7, batch_size=1), ValueError, ("at least 2", "1")),
        refused(
            "batch larger than the data",
            lambda: phase_diagram(7, fracs=[0.1], noises=[0.0], batch_size=8),
            ValueError,
            ("batch_size=8", "4 pairs"),
        ),
    ]


@pytest.mark.parametrize(("call", "error", "says"), bad_inputs())
def test_bad_input(call, error, says):
    """Fails when it is accepted, or refused in words that do not help."""
    assert_refused(call, error, says)
