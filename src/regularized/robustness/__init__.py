"""My inputs are shifted or attacked: techniques for models that hold when inputs are not as in training."""
