"""clt-plugins: train cross-layer transcoders, with everything that is a choice in a plugin.

The names below are the public API: plugins use nothing else of the engine.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from clt_plugins.contract.hooks import hookimpl
from clt_plugins.contract.spec import API_VERSION, Context, Selected, Spec

if TYPE_CHECKING:
    from clt_plugins.cli.options import verbose, with_plugins, with_recipe, with_trained
    from clt_plugins.contract.interfaces import Forward, Imported
    from clt_plugins.contract.types import HubOrPath
    from clt_plugins.data.batch import Batch
    from clt_plugins.data.features import Features, Pairs
    from clt_plugins.finished.find import Trained
    from clt_plugins.model.assemble import build_source
    from clt_plugins.model.parameters import parameter, uniform
    from clt_plugins.model.selection import Above, Top
    from clt_plugins.model.sparse import Layout
    from clt_plugins.model.sparse import decode as sparse_decode
    from clt_plugins.model.transcoder import CrossLayerTranscoder
    from clt_plugins.recipe.read import as_data as recipe_data
    from clt_plugins.rows.source import DamagedError, Store, StoredSource
    from clt_plugins.toml import document as toml_text
    from clt_plugins.training.run import run

__version__ = "0.1.0"

# What needs torch is imported at first use, so that `--help`, `plugins` and `validate` start without it.
_LAZY = {
    "Above": "clt_plugins.model.selection",
    "Batch": "clt_plugins.data.batch",
    "CrossLayerTranscoder": "clt_plugins.model.transcoder",
    "DamagedError": "clt_plugins.rows.source",
    "Features": "clt_plugins.data.features",
    "Forward": "clt_plugins.contract.interfaces",
    "HubOrPath": "clt_plugins.contract.types",
    "Imported": "clt_plugins.contract.interfaces",
    "Layout": "clt_plugins.model.sparse",
    "Pairs": "clt_plugins.data.features",
    "Store": "clt_plugins.rows.source",
    "StoredSource": "clt_plugins.rows.source",
    "Top": "clt_plugins.model.selection",
    "build_source": "clt_plugins.model.assemble",
    "Trained": "clt_plugins.finished.find",
    "parameter": "clt_plugins.model.parameters",
    "recipe_data": "clt_plugins.recipe.read:as_data",
    "run": "clt_plugins.training.run",
    "sparse_decode": "clt_plugins.model.sparse:decode",
    "toml_text": "clt_plugins.toml:document",
    "uniform": "clt_plugins.model.parameters",
    "verbose": "clt_plugins.cli.options",
    "with_plugins": "clt_plugins.cli.options",
    "with_recipe": "clt_plugins.cli.options",
    "with_trained": "clt_plugins.cli.options",
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
