"""An adaptively inexact first-order method for bilevel optimization with application to hyperparameter learning."""

from regularized.scientific.inexact_bilevel.baselines import HOAG, FixedAccuracy
from regularized.scientific.inexact_bilevel.bound import BilevelConstants
from regularized.scientific.inexact_bilevel.denoising import FieldsOfExperts, TotalVariation
from regularized.scientific.inexact_bilevel.hypergradient import hypergradient
from regularized.scientific.inexact_bilevel.learn_strengths import learn_strengths
from regularized.scientific.inexact_bilevel.lower_solvers import solve_lower
from regularized.scientific.inexact_bilevel.maid import MAID

__all__ = [
    "HOAG",
    "MAID",
    "BilevelConstants",
    "FieldsOfExperts",
    "FixedAccuracy",
    "TotalVariation",
    "hypergradient",
    "learn_strengths",
    "solve_lower",
]
