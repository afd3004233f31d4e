"""Self-Regularization with Sparse Autoencoders for Controllable LLM-based Classification."""

from regularized.fine_tuning.sae_regularization.autoencoder import TopKSAE, normalized_error
from regularized.fine_tuning.sae_regularization.files import load_sae_lens
from regularized.fine_tuning.sae_regularization.judging import FeatureMask, LanguageModelJudge, select_features
from regularized.fine_tuning.sae_regularization.penalty import FeatureRemoval, SelfReg, feature_penalty
from regularized.fine_tuning.sae_regularization.procedure import SAETraining
from regularized.fine_tuning.sae_regularization.term import SelfRegularization

__all__ = [
    "FeatureMask",
    "FeatureRemoval",
    "LanguageModelJudge",
    "SAETraining",
    "SelfReg",
    "SelfRegularization",
    "TopKSAE",
    "feature_penalty",
    "load_sae_lens",
    "normalized_error",
    "select_features",
]
