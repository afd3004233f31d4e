"""Self-Knowledge Distillation with Progressive Refinement of Targets (2020)."""
