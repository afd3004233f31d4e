"""Active Self-Paced Learning for Cost-Effective and Progressive Face Identification: card, experiment and checks."""
