"""Data sets over HTTP: server, uploads, client."""
