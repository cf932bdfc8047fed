"""TOML -> typed settings: overrides, strict structuring, every fault at once."""
