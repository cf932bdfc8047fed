"""Normalisation of activations: what most choices of `[normalisation]` share, and how statistics reach them."""
