"""Early-learning regularisation (ELR, ELR+): card, experiment, conformance, benchmark and contract subjects."""
