"""The format on disk: manifest, chunks, number types, reading."""
