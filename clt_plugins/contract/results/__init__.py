"""Protocols of what becomes of it."""
