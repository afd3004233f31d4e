"""Bootstrap Masked Visual Modeling via Hard Patches Mining: card."""
