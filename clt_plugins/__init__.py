"""clt-plugins: train cross-layer transcoders, with everything that is a choice in a plugin.

The names below are the public API: plugins use nothing else of the engine.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from clt_plugins.contract.hooks import hookimpl
from clt_plugins.contract.spec import API_VERSION, FREE_ON_RESUME, Selected, Spec, __version__, default_choice
from clt_plugins.errors import DamagedError, Fault, Faults, PluginError, Refused, Unreachable

if TYPE_CHECKING:
    from clt_plugins.cli.options import verbose, with_plugins, with_recipe, with_trained
    from clt_plugins.contract.abilities import (
        BothGradients,
        Buffered,
        Checks,
        Closable,
        FeatureRows,
        FixedSizes,
        HasModel,
        Identified,
        Observes,
        OwnRows,
        Preferred,
        ReadsBack,
        RunsModel,
        Scheduled,
        Sends,
        Settable,
        Shifted,
        Stateful,
        SumsLater,
        Thresholded,
        TrainsInModel,
        Updates,
    )
    from clt_plugins.contract.context import Context
    from clt_plugins.contract.model.activation import Activation, Selection
    from clt_plugins.contract.model.encoder import Encoder
    from clt_plugins.contract.model.kernels import Kernels
    from clt_plugins.contract.model.normalisation import Normalisation
    from clt_plugins.contract.model.parallel import Parallel
    from clt_plugins.contract.model.tying import Tying
    from clt_plugins.contract.reading.language_model import LanguageModel, TrainableModel
    from clt_plugins.contract.reading.source import Outline, Source
    from clt_plugins.contract.reading.transform import Transform
    from clt_plugins.contract.recipe import Recipe
    from clt_plugins.contract.results.exporter import Exporter, Imported
    from clt_plugins.contract.results.logger import Logger
    from clt_plugins.contract.results.scores import Scores
    from clt_plugins.contract.results.stage import Stage, StageInfo
    from clt_plugins.contract.select import Kept, Per, Ranks, Select
    from clt_plugins.contract.training.callback import Callback
    from clt_plugins.contract.training.loss import Forward, Loss, ModelPass
    from clt_plugins.contract.training.metric import HeldOut, Metric, Step
    from clt_plugins.contract.training.optimizer import Optimizer, Piece, Role, Weight
    from clt_plugins.contract.training.schedule import Schedule
    from clt_plugins.contract.types import HubOrPath
    from clt_plugins.data.affine import Affine, Folding
    from clt_plugins.data.batch import Batch
    from clt_plugins.data.features import Features, Pairs
    from clt_plugins.data.layout import Layout
    from clt_plugins.data.moments import Moments
    from clt_plugins.data.random import generator
    from clt_plugins.data.update import AdamUpdate
    from clt_plugins.distributed.single import Single
    from clt_plugins.files.hdf5 import open_hdf5
    from clt_plugins.files.locks import Lock
    from clt_plugins.files.records import defined, write_json
    from clt_plugins.files.tensors import read_tensor, tensor_shapes, write_tensors
    from clt_plugins.files.untrusted import load_json, parse_json, read_small
    from clt_plugins.finished.find import Trained
    from clt_plugins.finished.job import Job
    from clt_plugins.finished.provenance import Provenance
    from clt_plugins.model.assemble import build_source
    from clt_plugins.model.in_model.replacement import Replacement
    from clt_plugins.model.normalisation.affine import AffineNormalisation
    from clt_plugins.model.parameters import buffer, parameter, uniform
    from clt_plugins.model.products.dense import dense_decode, encode_dense
    from clt_plugins.model.scores import score
    from clt_plugins.model.select.above import Above
    from clt_plugins.model.select.reference import TorchSelect
    from clt_plugins.model.selection import Top
    from clt_plugins.model.sparse import own_rows, row_squares, sparse_decode
    from clt_plugins.model.transcoder import CrossLayerTranscoder
    from clt_plugins.recipe.read import read_recipe, recipe_data
    from clt_plugins.registry.build import build
    from clt_plugins.registry.plugins import Plugins, load_plugins
    from clt_plugins.rows.deal import Deal, Group
    from clt_plugins.rows.identity import check_data
    from clt_plugins.rows.source import StoredSource
    from clt_plugins.rows.store import Store
    from clt_plugins.toml import toml_text
    from clt_plugins.training.between.run import Training
    from clt_plugins.training.optimizers.reference import update_rows
    from clt_plugins.training.run import run

# Names that are imported at first use: most need torch, and `--help`, `plugins` and `validate` start without it.
_LAZY = {
    "cli.options": ["verbose", "with_plugins", "with_recipe", "with_trained"],
    "contract.abilities": [
        "Buffered",
        "BothGradients",
        "Checks",
        "Closable",
        "FeatureRows",
        "FixedSizes",
        "HasModel",
        "Identified",
        "Observes",
        "OwnRows",
        "Preferred",
        "ReadsBack",
        "RunsModel",
        "Scheduled",
        "Sends",
        "Settable",
        "Shifted",
        "Stateful",
        "SumsLater",
        "Thresholded",
        "TrainsInModel",
        "Updates",
    ],
    "contract.context": ["Context"],
    "contract.model.activation": ["Activation", "Selection"],
    "contract.model.encoder": ["Encoder"],
    "contract.model.kernels": ["Kernels"],
    "contract.model.normalisation": ["Normalisation"],
    "contract.model.parallel": ["Parallel"],
    "contract.model.tying": ["Tying"],
    "contract.reading.language_model": ["LanguageModel", "TrainableModel"],
    "contract.reading.source": ["Outline", "Source"],
    "contract.reading.transform": ["Transform"],
    "contract.results.exporter": ["Exporter", "Imported"],
    "contract.results.logger": ["Logger"],
    "contract.training.callback": ["Callback"],
    "contract.results.scores": ["Scores"],
    "contract.results.stage": ["Stage", "StageInfo"],
    "contract.training.loss": ["Forward", "Loss", "ModelPass"],
    "contract.training.metric": ["HeldOut", "Metric", "Step"],
    "contract.training.optimizer": ["Optimizer", "Piece", "Role", "Weight"],
    "contract.training.schedule": ["Schedule"],
    "contract.recipe": ["Recipe"],
    "contract.select": ["Kept", "Per", "Ranks", "Select"],
    "contract.types": ["HubOrPath"],
    "data.affine": ["Affine", "Folding"],
    "data.batch": ["Batch"],
    "data.features": ["Features", "Pairs"],
    "data.layout": ["Layout"],
    "data.moments": ["Moments"],
    "data.random": ["generator"],
    "data.update": ["AdamUpdate"],
    "distributed.single": ["Single"],
    "files.hdf5": ["open_hdf5"],
    "files.locks": ["Lock"],
    "files.records": ["defined", "write_json"],
    "files.tensors": ["read_tensor", "tensor_shapes", "write_tensors"],
    "files.untrusted": ["load_json", "parse_json", "read_small"],
    "finished.find": ["Trained"],
    "finished.job": ["Job"],
    "finished.provenance": ["Provenance"],
    "model.assemble": ["build_source"],
    "model.in_model.replacement": ["Replacement"],
    "model.products.dense": ["dense_decode", "encode_dense"],
    "model.normalisation.affine": ["AffineNormalisation"],
    "model.parameters": ["buffer", "parameter", "uniform"],
    "model.scores": ["score"],
    "model.select.reference": ["TorchSelect"],
    "model.select.above": ["Above"],
    "model.selection": ["Top"],
    "model.sparse": ["own_rows", "row_squares", "sparse_decode"],
    "model.transcoder": ["CrossLayerTranscoder"],
    "recipe.read": ["read_recipe", "recipe_data"],
    "registry.build": ["build"],
    "registry.plugins": ["Plugins", "load_plugins"],
    "rows.deal": ["Deal", "Group"],
    "rows.identity": ["check_data"],
    "rows.source": ["StoredSource"],
    "rows.store": ["Store"],
    "toml": ["toml_text"],
    "training.between.run": ["Training"],
    "training.optimizers.reference": ["update_rows"],
    "training.run": ["run"],
}
_HOME = {name: module for module, names in _LAZY.items() for name in names}

__all__ = [
    "API_VERSION",
    "FREE_ON_RESUME",
    "DamagedError",
    "Fault",
    "Faults",
    "PluginError",
    "Refused",
    "Selected",
    "Spec",
    "Unreachable",
    "__version__",
    "default_choice",
    "hookimpl",
    *_HOME,
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'clt_plugins' has no attribute {name!r}")
    value = getattr(import_module(f"clt_plugins.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
