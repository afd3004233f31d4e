"""SVFit: Parameter-Efficient Fine-Tuning of Large Pre-Trained Models Using Singular Values: card."""
