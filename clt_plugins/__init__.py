"""clt-plugins: train cross-layer transcoders, with everything that is a choice in a plugin.

The names below are the public API: plugins use nothing else of the engine.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from clt_plugins.hookspecs import hookimpl
from clt_plugins.spec import API_VERSION, Context, Selected, Spec

if TYPE_CHECKING:
    from clt_plugins.batch import Batch
    from clt_plugins.features import Features, Pairs
    from clt_plugins.initial import parameter, uniform
    from clt_plugins.interfaces import Forward, Imported
    from clt_plugins.kinds import HubOrPath
    from clt_plugins.options import verbose, with_plugins, with_recipe, with_trained
    from clt_plugins.recipe import as_data as recipe_data
    from clt_plugins.run import run
    from clt_plugins.selection import Above, Top
    from clt_plugins.setup import build_source
    from clt_plugins.sparse import Layout
    from clt_plugins.sparse import decode as sparse_decode
    from clt_plugins.stored import DamagedError, Store, StoredSource
    from clt_plugins.toml import document as toml_text
    from clt_plugins.trained import Trained
    from clt_plugins.transcoder import CrossLayerTranscoder

__version__ = "0.1.0"

# What needs torch is imported at first use, so that `--help`, `plugins` and `validate` start without it.
_LAZY = {
    "Above": "clt_plugins.selection",
    "Batch": "clt_plugins.batch",
    "CrossLayerTranscoder": "clt_plugins.transcoder",
    "DamagedError": "clt_plugins.stored",
    "Features": "clt_plugins.features",
    "Forward": "clt_plugins.interfaces",
    "HubOrPath": "clt_plugins.kinds",
    "Imported": "clt_plugins.interfaces",
    "Layout": "clt_plugins.sparse",
    "Pairs": "clt_plugins.features",
    "Store": "clt_plugins.stored",
    "StoredSource": "clt_plugins.stored",
    "Top": "clt_plugins.selection",
    "build_source": "clt_plugins.setup",
    "Trained": "clt_plugins.trained",
    "parameter": "clt_plugins.initial",
    "recipe_data": "clt_plugins.recipe:as_data",
    "run": "clt_plugins.run",
    "sparse_decode": "clt_plugins.sparse:decode",
    "toml_text": "clt_plugins.toml:document",
    "uniform": "clt_plugins.initial",
    "verbose": "clt_plugins.options",
    "with_plugins": "clt_plugins.options",
    "with_recipe": "clt_plugins.options",
    "with_trained": "clt_plugins.options",
}

__all__ = [
    "API_VERSION",
    "Above",
    "Batch",
    "Context",
    "CrossLayerTranscoder",
    "DamagedError",
    "Features",
    "Forward",
    "HubOrPath",
    "Imported",
    "Layout",
    "Pairs",
    "Selected",
    "Spec",
    "Store",
    "StoredSource",
    "Top",
    "Trained",
    "__version__",
    "build_source",
    "hookimpl",
    "parameter",
    "recipe_data",
    "run",
    "sparse_decode",
    "toml_text",
    "uniform",
    "verbose",
    "with_plugins",
    "with_recipe",
    "with_trained",
]


def __getattr__(name: str) -> Any:
    place = _LAZY.get(name)
    if place is None:
        raise AttributeError(f"module 'clt_plugins' has no attribute {name!r}")
    module, _, inner = place.partition(":")
    return getattr(import_module(module), inner or name)


class _Package(ModuleType):
    """Keeps the name `clt_plugins.run` for the function: importing the module of that name would take it."""

    @property
    def run(self) -> Any:
        return __getattr__("run")

    @run.setter
    def run(self, module: ModuleType) -> None:
        """The import system's; the module stays in `sys.modules`."""


sys.modules[__name__].__class__ = _Package
