"""Adapt then Unlearn: Exploring Parameter Space Semantics for Unlearning in Generative Adversarial Networks: card."""
