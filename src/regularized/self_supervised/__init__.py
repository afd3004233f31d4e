"""I have no labels: techniques that learn from unlabelled data."""
