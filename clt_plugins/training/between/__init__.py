"""What callbacks do between steps: when they are called, and the operations that they act by."""
