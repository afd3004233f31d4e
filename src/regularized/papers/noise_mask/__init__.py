"""Policy Gradient-Driven Noise Mask: card, experiment and checks."""
