"""Training Curricula for Open Domain Answer Re-Ranking: card."""
