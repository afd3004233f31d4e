"""Selfie: Self-supervised Pretraining for Image Embedding: card."""
