"""A transcoder's files: ours, and those of other tools."""
