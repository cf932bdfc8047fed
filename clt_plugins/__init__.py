"""clt-plugins: train cross-layer transcoders, with everything that is a choice in a plugin.

The names below are the public API: plugins use nothing else of the engine.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from clt_plugins.contract.hooks import hookimpl as hookimpl
from clt_plugins.contract.spec import (
    API_VERSION as API_VERSION,
    FREE_ON_RESUME as FREE_ON_RESUME,
    FREE_TEXT as FREE_TEXT,
    Format as Format,
    Selected as Selected,
    Spec as Spec,
    __version__ as __version__,
    default_choice as default_choice,
)
from clt_plugins.errors import (
    DamagedError as DamagedError,
    Fault as Fault,
    Faults as Faults,
    PluginError as PluginError,
    Refused as Refused,
    Unreachable as Unreachable,
)

if TYPE_CHECKING:
    from clt_plugins.cli.options import (
        verbose as verbose,
        with_plugins as with_plugins,
        with_recipe as with_recipe,
        with_trained as with_trained,
    )
    from clt_plugins.collected.geometry.compute import Geometry as Geometry
    from clt_plugins.collected.geometry.fill import fill_geometry as fill_geometry
    from clt_plugins.collected.info import (
        CollectionInfo as CollectionInfo,
        CollectionSettings as CollectionSettings,
        GeometryInfo as GeometryInfo,
    )
    from clt_plugins.collected.reader import (
        Collected as Collected,
        FeatureExample as FeatureExample,
        FeatureExamples as FeatureExamples,
    )
    from clt_plugins.collected.report import write_report as write_report
    from clt_plugins.collected.text import CollectedText as CollectedText
    from clt_plugins.collected.writer import CollectedWriter as CollectedWriter
    from clt_plugins.contract.model.activation import AimsAtL0 as AimsAtL0
    from clt_plugins.contract.model.activation import CountsActive as CountsActive
    from clt_plugins.contract.model.activation import Follows as Follows
    from clt_plugins.contract.model.activation import Scheduled as Scheduled
    from clt_plugins.contract.model.activation import Settable as Settable
    from clt_plugins.contract.model.activation import Thresholded as Thresholded
    from clt_plugins.contract.model.kernels import BothGradients as BothGradients
    from clt_plugins.contract.model.kernels import FixedSizes as FixedSizes
    from clt_plugins.contract.model.kernels import Preferred as Preferred
    from clt_plugins.contract.model.kernels import Updates as Updates
    from clt_plugins.contract.model.normalisation import Observes as Observes
    from clt_plugins.contract.model.parallel import Sends as Sends
    from clt_plugins.contract.model.parallel import SplitsTokens as SplitsTokens
    from clt_plugins.contract.model.parallel import SumsLater as SumsLater
    from clt_plugins.contract.model.tying import FeatureRows as FeatureRows
    from clt_plugins.contract.model.tying import OwnRows as OwnRows
    from clt_plugins.contract.model.tying import Shifted as Shifted
    from clt_plugins.contract.reading.source import Buffered as Buffered
    from clt_plugins.contract.reading.source import Closable as Closable
    from clt_plugins.contract.reading.source import HasModel as HasModel
    from clt_plugins.contract.reading.source import Identified as Identified
    from clt_plugins.contract.reading.source import TrainsInModel as TrainsInModel
    from clt_plugins.contract.results.exporter import Checks as Checks
    from clt_plugins.contract.results.exporter import ReadsBack as ReadsBack
    from clt_plugins.contract.stateful import Stateful as Stateful
    from clt_plugins.contract.training.loss import RunsModel as RunsModel
    from clt_plugins.contract.training.loss import Share as Share
    from clt_plugins.contract.training.loss import Steered as Steered
    from clt_plugins.contract.context import Context as Context
    from clt_plugins.contract.model.activation import Activation as Activation, Selection as Selection
    from clt_plugins.contract.model.encoder import Encoder as Encoder
    from clt_plugins.contract.model.kernels import Kernels as Kernels
    from clt_plugins.contract.model.normalisation import Normalisation as Normalisation
    from clt_plugins.contract.model.parallel import Parallel as Parallel
    from clt_plugins.contract.model.tying import Tying as Tying
    from clt_plugins.contract.reading.language_model import (
        LanguageModel as LanguageModel,
        ReadsResidual as ReadsResidual,
        SpellsBytes as SpellsBytes,
        TrainableModel as TrainableModel,
    )
    from clt_plugins.contract.reading.source import Outline as Outline, Source as Source
    from clt_plugins.contract.reading.transform import Transform as Transform
    from clt_plugins.contract.recipe import Recipe as Recipe
    from clt_plugins.contract.results.exporter import Exporter as Exporter, Imported as Imported
    from clt_plugins.contract.results.inspector import Inspected as Inspected, Inspector as Inspector
    from clt_plugins.contract.results.logger import Logger as Logger
    from clt_plugins.contract.results.report import Report as Report
    from clt_plugins.contract.results.scores import Scores as Scores
    from clt_plugins.contract.results.stage import Stage as Stage, StageInfo as StageInfo
    from clt_plugins.contract.select import Kept as Kept, Per as Per, Ranks as Ranks, Select as Select
    from clt_plugins.contract.training.callback import Callback as Callback
    from clt_plugins.contract.training.loss import Forward as Forward, Loss as Loss, ModelPass as ModelPass
    from clt_plugins.contract.training.metric import HeldOut as HeldOut, Metric as Metric, Step as Step
    from clt_plugins.contract.training.optimizer import (
        Optimizer as Optimizer,
        Piece as Piece,
        Role as Role,
        Weight as Weight,
    )
    from clt_plugins.contract.training.schedule import Schedule as Schedule
    from clt_plugins.contract.types import HubOrPath as HubOrPath
    from clt_plugins.data.affine import Affine as Affine, Folding as Folding
    from clt_plugins.data.batch import Batch as Batch
    from clt_plugins.data.features import Features as Features, Pairs as Pairs
    from clt_plugins.data.layout import Layout as Layout
    from clt_plugins.data.moments import Moments as Moments
    from clt_plugins.data.random import generator as generator
    from clt_plugins.data.update import AdamUpdate as AdamUpdate
    from clt_plugins.distributed.single import Single as Single
    from clt_plugins.files.atomic import flush as flush
    from clt_plugins.files.folders import check_folder as check_folder
    from clt_plugins.files.hdf5 import open_hdf5 as open_hdf5
    from clt_plugins.files.hub.names import HubPlace as HubPlace
    from clt_plugins.files.hub.upload import check_upload as check_upload, upload as upload
    from clt_plugins.files.locks import Lock as Lock
    from clt_plugins.files.records import defined as defined, write_json as write_json
    from clt_plugins.files.tensors import (
        read_tensor as read_tensor,
        tensor_shapes as tensor_shapes,
        write_tensors as write_tensors,
    )
    from clt_plugins.files.untrusted import (
        check_regular as check_regular,
        has_file as has_file,
        load_json as load_json,
        parse_json as parse_json,
        passing as passing,
        printable as printable,
        read_small as read_small,
    )
    from clt_plugins.finished.curves import Curve as Curve
    from clt_plugins.finished.facts import Facts as Facts, read_facts as read_facts, run_of as run_of
    from clt_plugins.finished.alone import run_alone as run_alone
    from clt_plugins.finished.find import Trained as Trained
    from clt_plugins.finished.job import Job as Job
    from clt_plugins.finished.provenance import Provenance as Provenance, identify as identify
    from clt_plugins.model.assemble import build_source as build_source
    from clt_plugins.model.in_model.replacement import Replacement as Replacement
    from clt_plugins.model.normalisation.affine import AffineNormalisation as AffineNormalisation
    from clt_plugins.model.normalisation.folded import raw_decoder as raw_decoder, raw_encoder as raw_encoder
    from clt_plugins.model.parameters import buffer as buffer, parameter as parameter, uniform as uniform
    from clt_plugins.model.products.dense import dense_decode as dense_decode, encode_dense as encode_dense
    from clt_plugins.model.scores import score as score
    from clt_plugins.model.select.above import Above as Above
    from clt_plugins.model.select.reference import TorchSelect as TorchSelect
    from clt_plugins.model.selection import Top as Top
    from clt_plugins.model.sparse import (
        own_rows as own_rows,
        row_squares as row_squares,
        sparse_decode as sparse_decode,
    )
    from clt_plugins.model.transcoder import CrossLayerTranscoder as CrossLayerTranscoder
    from clt_plugins.recipe.local import for_others as for_others
    from clt_plugins.recipe.read import read_recipe as read_recipe, recipe_data as recipe_data
    from clt_plugins.registry.build import build as build
    from clt_plugins.registry.plugins import Plugins as Plugins, load_plugins as load_plugins
    from clt_plugins.rows.deal import Deal as Deal, Group as Group
    from clt_plugins.rows.identity import check_data as check_data
    from clt_plugins.rows.source import StoredSource as StoredSource
    from clt_plugins.rows.store import Store as Store
    from clt_plugins.toml import toml_text as toml_text
    from clt_plugins.training.between.run import Training as Training
    from clt_plugins.training.optimizers.reference import update_rows as update_rows
    from clt_plugins.training.run import run as run
    from clt_plugins.training.sweep.run import sweep as sweep

# Names that are imported at first use: most need torch, and `--help`, `plugins` and `validate` start without it.
_LAZY = {
    "cli.options": ["verbose", "with_plugins", "with_recipe", "with_trained"],
    "collected.geometry.compute": ["Geometry"],
    "collected.geometry.fill": ["fill_geometry"],
    "collected.info": ["CollectionInfo", "CollectionSettings", "GeometryInfo"],
    "collected.reader": ["Collected", "FeatureExample", "FeatureExamples"],
    "collected.report": ["write_report"],
    "collected.text": ["CollectedText"],
    "collected.writer": ["CollectedWriter"],
    "contract.context": ["Context"],
    "contract.model.activation": [
        "Activation",
        "AimsAtL0",
        "CountsActive",
        "Follows",
        "Scheduled",
        "Selection",
        "Settable",
        "Thresholded",
    ],
    "contract.model.encoder": ["Encoder"],
    "contract.model.kernels": ["BothGradients", "FixedSizes", "Kernels", "Preferred", "Updates"],
    "contract.model.normalisation": ["Normalisation", "Observes"],
    "contract.model.parallel": ["Parallel", "Sends", "SplitsTokens", "SumsLater"],
    "contract.model.tying": ["FeatureRows", "OwnRows", "Shifted", "Tying"],
    "contract.reading.language_model": ["LanguageModel", "ReadsResidual", "SpellsBytes", "TrainableModel"],
    "contract.reading.source": ["Buffered", "Closable", "HasModel", "Identified", "Outline", "Source", "TrainsInModel"],
    "contract.reading.transform": ["Transform"],
    "contract.results.exporter": ["Checks", "Exporter", "Imported", "ReadsBack"],
    "contract.results.inspector": ["Inspected", "Inspector"],
    "contract.results.logger": ["Logger"],
    "contract.results.report": ["Report"],
    "contract.stateful": ["Stateful"],
    "contract.training.callback": ["Callback"],
    "contract.results.scores": ["Scores"],
    "contract.results.stage": ["Stage", "StageInfo"],
    "contract.training.loss": ["Forward", "Loss", "ModelPass", "RunsModel", "Share", "Steered"],
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
    "files.atomic": ["flush"],
    "files.folders": ["check_folder"],
    "files.hdf5": ["open_hdf5"],
    "files.hub.names": ["HubPlace"],
    "files.hub.upload": ["check_upload", "upload"],
    "files.locks": ["Lock"],
    "files.records": ["defined", "write_json"],
    "files.tensors": ["read_tensor", "tensor_shapes", "write_tensors"],
    "files.untrusted": ["check_regular", "has_file", "load_json", "parse_json", "passing", "printable", "read_small"],
    "finished.curves": ["Curve"],
    "finished.facts": ["Facts", "read_facts", "run_of"],
    "finished.alone": ["run_alone"],
    "finished.find": ["Trained"],
    "finished.job": ["Job"],
    "finished.provenance": ["Provenance", "identify"],
    "model.assemble": ["build_source"],
    "model.in_model.replacement": ["Replacement"],
    "model.products.dense": ["dense_decode", "encode_dense"],
    "model.normalisation.affine": ["AffineNormalisation"],
    "model.normalisation.folded": ["raw_decoder", "raw_encoder"],
    "model.parameters": ["buffer", "parameter", "uniform"],
    "model.scores": ["score"],
    "model.select.reference": ["TorchSelect"],
    "model.select.above": ["Above"],
    "model.selection": ["Top"],
    "model.sparse": ["own_rows", "row_squares", "sparse_decode"],
    "model.transcoder": ["CrossLayerTranscoder"],
    "recipe.local": ["for_others"],
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
    "training.sweep.run": ["sweep"],
}
_HOME = {name: module for module, names in _LAZY.items() for name in names}

if not TYPE_CHECKING:  # type checkers read `import X as X`: to them no other name is there
    __all__ = [
        "API_VERSION",
        "FREE_ON_RESUME",
        "FREE_TEXT",
        "DamagedError",
        "Fault",
        "Faults",
        "Format",
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
    return sorted({*globals(), *_HOME})
