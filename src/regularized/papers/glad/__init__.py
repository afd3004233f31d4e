"""GLAD: Generalizable Tuning for Vision-Language Models: card."""
