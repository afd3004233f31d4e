"""Fire Together Wire Together: A Dynamic Pruning Approach with Self-Supervised Mask Prediction: card."""
