"""Which samples to train on, and in what order."""
