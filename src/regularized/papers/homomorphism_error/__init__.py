"""Representational Homomorphism Predicts and Improves Compositional Generalization In Transformer Language Model.

The card of the paper.
"""
