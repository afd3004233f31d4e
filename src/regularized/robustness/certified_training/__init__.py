"""Fast Certified Robust Training with Short Warmup."""

from regularized.robustness.certified_training.bounds import Bounds, IntervalBounds
from regularized.robustness.certified_training.initialisation import interval_init_
from regularized.robustness.certified_training.interval import Interval, linf_box
from regularized.robustness.certified_training.loss import CertifiedLoss, robust_cross_entropy
from regularized.robustness.certified_training.penalty import relu_balance, tightness
from regularized.robustness.certified_training.procedure import FastCertifiedTraining
from regularized.robustness.certified_training.rules import UnsupportedOperation, interval_rule
from regularized.robustness.certified_training.schedule import SmoothedRadius
from regularized.robustness.certified_training.term import CertifiedTraining
from regularized.robustness.certified_training.verification import Verification, verified, verify

__all__ = [
    "Bounds",
    "CertifiedLoss",
    "CertifiedTraining",
    "FastCertifiedTraining",
    "Interval",
    "IntervalBounds",
    "SmoothedRadius",
    "UnsupportedOperation",
    "Verification",
    "interval_init_",
    "interval_rule",
    "linf_box",
    "relu_balance",
    "robust_cross_entropy",
    "tightness",
    "verified",
    "verify",
]
