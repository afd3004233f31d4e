"""Policy Regularized Distributionally Robust Markov Decision Processes with Linear Function Approximation: card."""
