"""Compressing Features for Learning with Noisy Labels: card."""
