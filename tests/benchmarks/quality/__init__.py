"""How good transcoders are, measured: recipes, defaults, and decode-clt beside this project. See `__main__`."""
