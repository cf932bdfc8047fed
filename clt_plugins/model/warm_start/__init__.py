"""A transcoder that begins with the weights of another one, which may be smaller."""
