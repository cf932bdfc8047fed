"""A run: objective, optimizer, loop, checkpoints, the run's folder."""
