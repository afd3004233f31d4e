"""T-JEPA: Augmentation-Free Self-Supervised Learning for Tabular Data: card."""
