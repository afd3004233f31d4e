"""I pretrain, and memory or data run out: techniques for pretraining of large models."""
