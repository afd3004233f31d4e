"""Opening the Blackbox: Accelerating Neural Differential Equations by Regularizing Internal Solver Heuristics: card."""
