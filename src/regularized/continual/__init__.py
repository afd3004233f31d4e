"""Learning one task after another without forgetting."""
