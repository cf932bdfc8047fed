"""Folders of circuit-tracer, and of transcoders that it reads."""
