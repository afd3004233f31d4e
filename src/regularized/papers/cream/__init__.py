"""CREAM: Consistency Regularized Self-Rewarding Language Models: card."""
