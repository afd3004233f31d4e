"""Comparison between Supervised and Unsupervised Learning in Deep Unfolded Sparse Signal Recovery: card."""
