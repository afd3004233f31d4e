"""Aligning language models: preferences, rewards that can be checked, and judges."""
