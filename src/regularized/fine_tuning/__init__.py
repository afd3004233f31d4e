"""I adapt a pretrained model to my data: techniques for adapters, few samples, and forgetting."""
