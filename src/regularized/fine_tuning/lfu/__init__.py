"""Learning from the Undesirable: Robust Adaptation of Language Models without Forgetting."""

from regularized.fine_tuning.lfu.penalty import hidden_state_consistency, logit_consistency
from regularized.fine_tuning.lfu.regularizer import LfU
from regularized.fine_tuning.lfu.steps import AuxiliaryLoRA, OwnStep, Steering
from regularized.fine_tuning.lfu.term import LfUTerm

__all__ = ["AuxiliaryLoRA", "LfU", "LfUTerm", "OwnStep", "Steering", "hidden_state_consistency", "logit_consistency"]
