"""What flows through a step: batches, features, and where the rows of a weight lie. Imports nothing of the engine."""
