"""Optimizers: how they are made, what learning rate they get, how gradients are clipped, and Adam for bfloat16."""
