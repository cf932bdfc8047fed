"""A static site of a transcoder's features, which opens from disk. `data.md` documents its files."""
