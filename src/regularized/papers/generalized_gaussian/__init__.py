"""It Takes a Good Model to Train a Good Model: Generalized Gaussian Priors for Optimized LLMs: card."""
