"""Policy Gradient-Driven Noise Mask: card."""
