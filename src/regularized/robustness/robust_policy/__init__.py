"""Policy Regularized Distributionally Robust Markov Decision Processes with Linear Function Approximation (DR-RPO)."""

from regularized.robustness.robust_policy.environments import (
    AmericanPut,
    LinearMDPEnvironment,
    simulated_linear_mdp,
    tabular_features,
)
from regularized.robustness.robust_policy.gymnasium import as_gymnasium
from regularized.robustness.robust_policy.model import LinearMDP
from regularized.robustness.robust_policy.planning import ActionValues, LinearPolicy, backward_pass
from regularized.robustness.robust_policy.policy import Greedy, Softmax, kl_regularized_policy, regularized_value
from regularized.robustness.robust_policy.procedure import DRRPO, Episode
from regularized.robustness.robust_policy.regression import exploration_bonus, ridge_regression
from regularized.robustness.robust_policy.uncertainty import (
    Chi2Penalty,
    KLBall,
    KLPenalty,
    NoUncertainty,
    TVBall,
    TVPenalty,
    robust_expectation,
)

__all__ = [
    "DRRPO",
    "ActionValues",
    "AmericanPut",
    "Chi2Penalty",
    "Episode",
    "Greedy",
    "KLBall",
    "KLPenalty",
    "LinearMDP",
    "LinearMDPEnvironment",
    "LinearPolicy",
    "NoUncertainty",
    "Softmax",
    "TVBall",
    "TVPenalty",
    "as_gymnasium",
    "backward_pass",
    "exploration_bonus",
    "kl_regularized_policy",
    "regularized_value",
    "ridge_regression",
    "robust_expectation",
    "simulated_linear_mdp",
    "tabular_features",
]
