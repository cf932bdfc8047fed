"""Protocols of what activations come from."""
