"""A Closer Look at Rehearsal-Free Continual Learning: card."""
