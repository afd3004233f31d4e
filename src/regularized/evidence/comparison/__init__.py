"""Which technique helps on given data: every candidate tuned alike, judged on samples that no choice has seen.

``compare`` of :mod:`regularized.papers.comparison` is the door; here is what stands behind it, and what techniques
declare to take part: :class:`Recipe`.
"""

from regularized.evidence.comparison.baselines import MixupLoss
from regularized.evidence.comparison.boosted_trees import fit_boosted_trees
from regularized.evidence.comparison.comparing import compare_problem
from regularized.evidence.comparison.matrix import Candidate
from regularized.evidence.comparison.models import default_model
from regularized.evidence.comparison.problem import Problem, all_samples, new_samples
from regularized.evidence.comparison.reading import problem_of
from regularized.evidence.comparison.recipe import ANY_PROBLEM, Code, Fitting, Need, Recipe, Setup
from regularized.evidence.comparison.result import Arm, Comparison, Plan
from regularized.evidence.comparison.space import Log, OneOf, Uniform

__all__ = [
    "ANY_PROBLEM",
    "Arm",
    "Candidate",
    "Code",
    "Comparison",
    "Fitting",
    "Log",
    "MixupLoss",
    "Need",
    "OneOf",
    "Plan",
    "Problem",
    "Recipe",
    "Setup",
    "Uniform",
    "all_samples",
    "compare_problem",
    "default_model",
    "fit_boosted_trees",
    "new_samples",
    "problem_of",
]
