"""I want to know why my model behaves as it does: diagnostics, and what theory predicts."""
