"""Parts of a training step that stand beside its straight line."""
