"""Protocols of what a transcoder is made of."""
