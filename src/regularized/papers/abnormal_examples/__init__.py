"""Eliminating Catastrophic Overfitting Via Abnormal Adversarial Examples Regularization: card."""
