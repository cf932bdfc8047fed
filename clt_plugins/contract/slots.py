"""The kinds of choice: one `Slot` each."""

from __future__ import annotations

import attrs

from clt_plugins.contract.model.activation import Activation
from clt_plugins.contract.model.encoder import Encoder
from clt_plugins.contract.model.kernels import Kernels
from clt_plugins.contract.model.normalisation import Normalisation
from clt_plugins.contract.model.parallel import Parallel
from clt_plugins.contract.model.tying import Tying
from clt_plugins.contract.reading.source import Source
from clt_plugins.contract.reading.transform import Transform
from clt_plugins.contract.results.exporter import Exporter
from clt_plugins.contract.results.logger import Logger
from clt_plugins.contract.results.report import Report
from clt_plugins.contract.results.stage import Stage
from clt_plugins.contract.training.callback import Callback
from clt_plugins.contract.training.loss import Loss
from clt_plugins.contract.training.metric import Metric
from clt_plugins.contract.training.optimizer import Optimizer
from clt_plugins.contract.training.schedule import Schedule


@attrs.frozen(kw_only=True)
class Slot:
    """A kind of choice. All that the engine knows of a kind is here: the hook, the recipe's table, the protocol.

    A new kind is one record in `SLOTS`, a protocol in `contract/`, a template for `clt_plugins new` and a file of
    checks in the kit.
    """

    hook: str
    """Without `clt_`."""
    table: str
    """The recipe's table."""
    kind: str
    """One of them in words; also the name of the template."""
    protocol: type
    """What `build` returns."""
    many: bool = False
    """Whether a recipe has a list of them, `[[table]]`."""
    inner: bool = False
    """Whether it stands only in the settings of other choices: a recipe has no table of it."""
    needs_one: bool = False
    """Whether such a list must not be empty."""
    default: str | list[str] | None = None
    """What a recipe gets that does not say; None: it must say."""
    example: str | None = None
    """What a starter recipe says where there is no default."""
    after: str
    """The recipe's table that it stands after."""
    doc: str
    """What it is, a sentence for the recipe's reader."""
    note: str = ""
    """What an author of `build` must know besides the protocol."""

    @property
    def bracket(self) -> str:
        """The table's head as TOML writes it."""
        if self.inner:
            return f"[{self.table}] in other choices"
        return f"[[{self.table}]]" if self.many else f"[{self.table}]"


SLOTS = (
    Slot(
        hook="sources",
        table="source",
        kind="source",
        protocol=Source,
        example="stream",
        after="model",
        doc="Where activations come from.",
        note="It is built before the transcoder: `context.n_layers` is 0.",
    ),
    Slot(
        hook="transforms",
        table="transforms",
        kind="transform",
        protocol=Transform,
        many=True,
        default=[],
        after="source",
        doc="What is done to batches before they are normalised, in this order.",
        note="With a transform that drops rows, `context.batch_tokens` is still what is trained on.",
    ),
    Slot(
        hook="normalisations",
        table="normalisation",
        kind="normalisation",
        protocol=Normalisation,
        default="mean_std",
        after="transcoder",
        doc="How activations are normalised before they are encoded.",
        note="It is a `torch.nn.Module`.",
    ),
    Slot(
        hook="encoders",
        table="encoder",
        kind="encoder",
        protocol=Encoder,
        default="plain",
        after="normalisation",
        doc="The encoder: what pre-activations are made from.",
        note="It is a `torch.nn.Module`.",
    ),
    Slot(
        hook="activations",
        table="activation",
        kind="activation",
        protocol=Activation,
        example="batchtopk",
        after="encoder",
        doc="What turns pre-activations into features.",
        note="It is a `torch.nn.Module`.",
    ),
    Slot(
        hook="tyings",
        table="tying",
        kind="tying",
        protocol=Tying,
        default="untied",
        after="activation",
        doc="The decoder: which weights carry a feature to which layer.",
        note="It is a `torch.nn.Module`.",
    ),
    Slot(
        hook="losses",
        table="losses",
        kind="loss",
        protocol=Loss,
        many=True,
        needs_one=True,
        default=["mse", "auxk"],
        after="tying",
        doc="Terms of the training loss; they are added up.",
    ),
    Slot(
        hook="optimizers",
        table="optimizer",
        kind="optimizer",
        protocol=Optimizer,
        default="adam",
        after="train",
        doc="What changes weights by their gradients.",
        note="It is built after the transcoder, and for a plan: what it cannot do with several ranks it refuses there.",
    ),
    Slot(
        hook="schedules",
        table="schedule",
        kind="schedule",
        protocol=Schedule,
        default="linear",
        after="optimizer",
        doc="How the learning rate goes over a run.",
        note="It may also be chosen in other settings, for the weight of a loss.",
    ),
    Slot(
        hook="metrics",
        table="metrics",
        kind="metric",
        protocol=Metric,
        many=True,
        default=["training", "held_out"],
        after="schedule",
        doc="What a training step and a held-out pass report.",
    ),
    Slot(
        hook="callbacks",
        table="callbacks",
        kind="callback",
        protocol=Callback,
        many=True,
        default=[],
        after="metrics",
        doc="What acts between steps: initial values, resampling, averages, an early stop.",
    ),
    Slot(
        hook="loggers",
        table="loggers",
        kind="logger",
        protocol=Logger,
        many=True,
        default=["tensorboard", "jsonl", "console"],
        after="callbacks",
        doc="Sinks of metrics.",
        note="It may write below `context.folder`.",
    ),
    Slot(
        hook="parallel",
        table="parallel",
        kind="parallel",
        protocol=Parallel,
        default="single",
        after="loggers",
        doc="How features and tokens are split over processes.",
        note="It is built first: `context.parallel` and `context.kernels` are None. For the device `meta` it must not "
        "wait for other processes: only sizes are asked for.",
    ),
    Slot(
        hook="kernels",
        table="kernels",
        kind="kernel",
        protocol=Kernels,
        default="auto",
        after="parallel",
        doc='Sparse products; "auto" takes the fastest for the device.',
        note="It is built before the rest for `context.device`: `context.kernels` is None.",
    ),
    Slot(
        hook="stages",
        table="stages",
        kind="stage",
        protocol=Stage,
        many=True,
        default=[],
        after="kernels",
        doc="What is done with the transcoder after training, in this order.",
        note="It may write into `job.folder` only.",
    ),
    Slot(
        hook="exporters",
        table="exports",
        kind="exporter",
        protocol=Exporter,
        inner=True,
        after="stages",
        doc="Formats of other tools that the stage `export` writes.",
    ),
    Slot(
        hook="reports",
        table="reports",
        kind="report",
        protocol=Report,
        inner=True,
        after="exports",
        doc="What the stage `report` makes of collected features.",
    ),
)
"""All kinds of choice, in the order in which a recipe lists them."""

OF_RECIPE = tuple(slot for slot in SLOTS if not slot.inner)
"""Those that a recipe has a table of."""

BY_TABLE = {slot.table: slot for slot in SLOTS}
