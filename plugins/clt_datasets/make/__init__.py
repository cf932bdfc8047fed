"""Making data sets: generate, scramble, inspect."""
