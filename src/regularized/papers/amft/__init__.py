"""AMFT: Aligning LLM Reasoners by Meta-Learning the Optimal Imitation-Exploration Balance: card."""
