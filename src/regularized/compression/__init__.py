"""My model is too big or too slow: techniques for smaller, sparser, and lower-precision models."""
