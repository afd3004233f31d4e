"""Removing what a model has learned, without training it anew."""
