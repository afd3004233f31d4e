"""SVFit: Parameter-Efficient Fine-Tuning of Large Pre-Trained Models Using Singular Values."""

from regularized.fine_tuning.svfit.files import load_svfit_state_dict, svfit_lora, svfit_state_dict
from regularized.fine_tuning.svfit.identity import basis_witness, weight_fingerprint
from regularized.fine_tuning.svfit.layer import SingularValueShift, SVFitLayer, svfit_rank
from regularized.fine_tuning.svfit.model import inject_svfit, merge_svfit, svfit_param_groups, unload_svfit
from regularized.fine_tuning.svfit.product import folding_pays, shifted_forward, shifted_weight
from regularized.fine_tuning.svfit.term import SVFit

__all__ = [
    "SVFit",
    "SVFitLayer",
    "SingularValueShift",
    "basis_witness",
    "folding_pays",
    "inject_svfit",
    "load_svfit_state_dict",
    "merge_svfit",
    "shifted_forward",
    "shifted_weight",
    "svfit_lora",
    "svfit_param_groups",
    "svfit_rank",
    "svfit_state_dict",
    "unload_svfit",
    "weight_fingerprint",
]
