"""The logger `tensorboard`: event files, and what TensorBoard's dashboards show of a run."""
