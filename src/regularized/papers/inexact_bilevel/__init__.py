"""An adaptively inexact first-order method for bilevel optimization with application to hyperparameter learning.

The card of the paper.
"""
