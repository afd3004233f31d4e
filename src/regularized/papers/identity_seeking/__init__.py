"""Identity-Seeking Self-Supervised Representation Learning for Generalizable Person Re-identification: card."""
