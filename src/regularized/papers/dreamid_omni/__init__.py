"""DreamID-Omni: Unified Framework for Controllable Human-Centric Audio-Video Generation: card."""
