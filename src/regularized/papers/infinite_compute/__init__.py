"""Pre-training under infinite compute: card."""
