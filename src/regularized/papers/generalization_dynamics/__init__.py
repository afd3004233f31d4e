"""High-dimensional dynamics of generalization error in neural networks: card."""
