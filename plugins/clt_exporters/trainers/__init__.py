"""Checkpoints of other trainers, which are only read."""
