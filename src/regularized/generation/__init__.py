"""Training of generative models."""
