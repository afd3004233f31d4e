"""Fire Together Wire Together: card, experiment and checks."""
