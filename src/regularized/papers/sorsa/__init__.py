"""SORSA: Singular Values and Orthonormal Regularized Singular Vectors Adaptation of Large Language Models: card."""
