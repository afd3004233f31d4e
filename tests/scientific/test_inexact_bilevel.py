"""Adaptive accuracies against exact ones: limits, rigorous bounds, decrease that is real, counting, state."""
