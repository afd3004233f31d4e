"""Fast Certified Robust Training with Short Warmup: card."""
