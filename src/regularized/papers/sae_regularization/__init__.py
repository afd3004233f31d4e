"""Self-Regularization with Sparse Autoencoders for Controllable LLM-based Classification: card."""
