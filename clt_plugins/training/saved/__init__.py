"""A run on disk: its folder, checkpoints and records, and what it is resumed from."""
