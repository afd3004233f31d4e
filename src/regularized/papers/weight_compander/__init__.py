"""Weight Compander: A Simple Weight Reparameterization for Regularization: card, experiment and checks."""
