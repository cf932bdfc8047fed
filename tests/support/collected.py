"""Random stores: `clt_plugins.testing.stores`, where plugins' own tests find them too."""

from clt_plugins.testing.stores import EMOJI, HOSTILE, Array, Sizes, make_store

__all__ = ["EMOJI", "HOSTILE", "Array", "Sizes", "make_store"]
