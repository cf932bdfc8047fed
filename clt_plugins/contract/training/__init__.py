"""Protocols of what trains it."""
