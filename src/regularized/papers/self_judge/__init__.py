"""Self-Judge: Selective Instruction Following with Alignment Self-Evaluation: card."""
