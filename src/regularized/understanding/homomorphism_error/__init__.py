"""Representational Homomorphism Predicts and Improves Compositional Generalization In Transformer Language Model."""

from regularized.understanding.homomorphism_error.command_language import commands, encode
from regularized.understanding.homomorphism_error.penalty import CompositionOperators, composition_loss, find_pairs
from regularized.understanding.homomorphism_error.pool import PairPool
from regularized.understanding.homomorphism_error.probes import (
    CompositionProbe,
    homomorphism_error,
    modifier_triples,
    segment_triples,
)
from regularized.understanding.homomorphism_error.term import Compositionality

__all__ = [
    "CompositionOperators",
    "CompositionProbe",
    "Compositionality",
    "PairPool",
    "commands",
    "composition_loss",
    "encode",
    "find_pairs",
    "homomorphism_error",
    "modifier_triples",
    "segment_triples",
]
