"""Pre-training under infinite compute: strong decay, ensembles in one step, power laws, distillation."""

from regularized.overfitting.infinite_compute.ensemble import LogitEnsemble, prefix_losses, subset_losses
from regularized.overfitting.infinite_compute.law import PowerLaw, data_efficiency
from regularized.overfitting.infinite_compute.mixture import MixtureLoader, mixture_steps
from regularized.overfitting.infinite_compute.optimizer import check_decay, decay_groups, warmup_then_cosine
from regularized.overfitting.infinite_compute.procedure import EnsembleTraining
from regularized.overfitting.infinite_compute.sampling import sample_text
from regularized.overfitting.infinite_compute.search import (
    GRIDS,
    Certificate,
    certify,
    coordinate_descent,
    member_settings,
)
from regularized.overfitting.infinite_compute.stacked import StackedModels, clip_members_

__all__ = [
    "GRIDS",
    "Certificate",
    "EnsembleTraining",
    "LogitEnsemble",
    "MixtureLoader",
    "PowerLaw",
    "StackedModels",
    "certify",
    "check_decay",
    "clip_members_",
    "coordinate_descent",
    "data_efficiency",
    "decay_groups",
    "member_settings",
    "mixture_steps",
    "prefix_losses",
    "sample_text",
    "subset_losses",
    "warmup_then_cosine",
]
