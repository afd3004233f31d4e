"""OVOR: OnePrompt with Virtual Outlier Regularization for Rehearsal-Free Class-Incremental Learning: card."""
