"""To grok or not to grok: Disentangling generalization and memorization on corrupted algorithmic datasets: card."""
