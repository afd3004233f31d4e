"""My labels are partly wrong: techniques that learn from noisy labels."""
