"""The step, the loop, schedules, checkpoints, and the adapters to other trainers."""
