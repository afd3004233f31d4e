"""Score Forgetting Distillation: A Swift, Data-Free Method for Machine Unlearning in Diffusion Models: card."""
