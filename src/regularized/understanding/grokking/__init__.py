"""To grok or not to grok: Disentangling generalization and memorization on corrupted algorithmic datasets."""

from regularized.understanding.grokking.modular_arithmetic import (
    ModularArithmetic,
    ModularTransformer,
    QuadraticMLP,
    analytic_weights,
    modular_optimizer,
    one_hot_mse,
)
from regularized.understanding.grokking.phase_diagram import PhaseDiagram, phase_diagram
from regularized.understanding.grokking.phases import Phase, TrainingPhases, detect_phases, phase_of
from regularized.understanding.grokking.plot import plot_grokking
from regularized.understanding.grokking.pruning import neuron_masks, prune_by_score_, pruning_sweep
from regularized.understanding.grokking.report import MemorizationProbe, subset_accuracies
from regularized.understanding.grokking.scores import (
    gini,
    inverse_participation_ratio,
    neuron_ipr,
    score_correlation,
    spectrum,
)

__all__ = [
    "MemorizationProbe",
    "ModularArithmetic",
    "ModularTransformer",
    "Phase",
    "PhaseDiagram",
    "QuadraticMLP",
    "TrainingPhases",
    "analytic_weights",
    "detect_phases",
    "gini",
    "inverse_participation_ratio",
    "modular_optimizer",
    "neuron_ipr",
    "neuron_masks",
    "one_hot_mse",
    "phase_diagram",
    "phase_of",
    "plot_grokking",
    "prune_by_score_",
    "pruning_sweep",
    "score_correlation",
    "spectrum",
    "subset_accuracies",
]
