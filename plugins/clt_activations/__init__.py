"""Activation functions: relu, jumprelu, topk, batchtopk, groupmax."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from attrs import Attribute, field, frozen, validators

from clt_plugins import Selected, Spec, hookimpl

if TYPE_CHECKING:
    from clt_plugins import Context, Recipe


@frozen(kw_only=True)
class ReLUConfig:
    """Every positive pre-activation is a feature; sparsity comes from the losses."""

    target_l0: float | None = field(default=None, validator=validators.optional(validators.gt(0)))
    """Active features per token, over all layers, that the run is to end with, at most all features: the weights of
    sparsity penalties (`tanh_sparsity`, `l0`) are multiplied by a factor that leads there. If not given, they are as
    the recipe says."""
    anneal_over: float = field(default=0.8, validator=[validators.gt(0), validators.le(1)])
    """The share of the training steps over which the target falls to `target_l0`. Without thresholds it begins with
    half of all features, which are active at first, and falls by the same factor in each step."""


@frozen(kw_only=True)
class JumpReLUConfig(ReLUConfig):
    """Pre-activations above a learned threshold for each feature (Rajamanoharan et al. 2024, arXiv 2407.14435)."""

    anneal_from: float = field(default=3.0, validator=validators.ge(1))
    """The target begins as this factor times `target_l0`, and falls linearly."""
    threshold: float = field(default=0.03, validator=validators.gt(0))
    """The first value of every threshold, in units of pre-activations."""
    bandwidth: float = field(default=0.5, validator=[validators.gt(0), validators.le(2)])
    """Width of the window around a threshold, as a share of the threshold. Pre-activations within it give the threshold
    a gradient (straight-through, rectangle kernel)."""
    lr_factor: float = field(default=5.0, validator=validators.gt(0))
    """Multiplies the learning rate of the logarithms of thresholds."""


def _counts(_: Any, attribute: Attribute[Any], value: float | list[float]) -> None:
    numbers = value if isinstance(value, list) else [value]
    if not numbers or min(numbers) <= 0:
        raise ValueError(f"'{attribute.name}' must be > 0: {value}")


@frozen(kw_only=True)
class TopKConfig:
    """The k highest-ranked pre-activations of each token (Gao et al. 2024, arXiv 2406.04093)."""

    k: int | float | list[int | float] = field(default=100, validator=_counts)
    """Features kept per token: a count, or, below 1, a share of all features in scope. A list has a number for each
    layer; `scope` is then "layer"."""
    scope: Literal["global", "layer"] = "global"
    """Whether k counts over all layers together or in each layer."""
    ranking: Literal["raw", "norm", "zscore"] = "raw"
    """The score that is compared: the pre-activation; the pre-activation times the decoder norm; or the pre-activation
    standardised over the tokens of the batch. A batch of a single token cannot be standardised: then "raw" is used."""
    anneal_from: float = field(default=3.0, validator=validators.ge(1))
    """Training starts with this factor times k features, which then fall linearly to k; 1 trains with k throughout."""
    anneal_over: float = field(default=0.8, validator=[validators.gt(0), validators.le(1)])
    """The share of the training steps over which they fall."""
    anneal_schedule: Annotated[Selected, "schedule"] | None = None
    """How what is above k falls, by a schedule in place of the straight line over `anneal_over`. Most have a warm-up;
    set its `warmup_steps` to 0 to begin at the top."""

    def __attrs_post_init__(self) -> None:
        if isinstance(self.k, list):
            # For all who ask how features compete: exporters, the check below, the recipe that a run writes down.
            object.__setattr__(self, "scope", "layer")


@frozen(kw_only=True)
class BatchTopKConfig(TopKConfig):
    """The k·B highest-ranked pre-activations of a batch of B tokens (Bussmann et al. 2024, arXiv 2412.06410)."""


@frozen(kw_only=True)
class GroupMaxConfig:
    """The highest pre-activation of each of k groups of neighbouring features: no sort, and every layer has the same
    share (`groupmax` of EleutherAI's sparsify)."""

    k: int = field(default=96, validator=validators.gt(0))
    """Features kept per token, over all layers: a multiple of their number."""


def build_relu(config: ReLUConfig, context: Context) -> Any:
    from clt_activations.threshold import ReLU

    return ReLU(config, context)


def build_jumprelu(config: JumpReLUConfig, context: Context) -> Any:
    from clt_activations.threshold import JumpReLU

    return JumpReLU(config, context)


def build_topk(config: TopKConfig, context: Context) -> Any:
    from clt_activations.topk import TopK

    return TopK(config, context, per="token")


def build_batchtopk(config: BatchTopKConfig, context: Context) -> Any:
    from clt_activations.topk import TopK

    return TopK(config, context, per="batch")


def build_groupmax(config: GroupMaxConfig, context: Context) -> Any:
    from clt_activations.groupmax import GroupMax

    return GroupMax(config, context)


@hookimpl
def clt_activations() -> list[Spec]:
    return [
        Spec("relu", ReLUConfig, build_relu),
        Spec("jumprelu", JumpReLUConfig, build_jumprelu),
        Spec("topk", TopKConfig, build_topk),
        Spec("batchtopk", BatchTopKConfig, build_batchtopk),
        Spec("groupmax", GroupMaxConfig, build_groupmax),
    ]


THRESHOLDS = "has thresholds already, there is nothing to convert: leave it out"


@hookimpl
def clt_check(recipe: Recipe) -> list[str]:
    config = recipe.activation.config
    if not isinstance(config, TopKConfig):
        thresholded = isinstance(config, ReLUConfig | JumpReLUConfig)
        return [
            f"stages[{index}]: {recipe.activation.name} {THRESHOLDS}"
            for index, stage in enumerate(recipe.stages)
            if stage.name == "convert" and thresholded
        ]
    faults = []
    of_layers = enumerate(config.k) if isinstance(config.k, list) else [(None, config.k)]
    for layer, k in of_layers:
        where = "activation.k" if layer is None else f"activation.k[{layer}]"
        if k >= 1 and k != int(k):
            faults.append(f"{where}: a count must be whole, a share below 1: {k}")
        if config.scope == "layer" and k > recipe.transcoder.features:
            faults.append(f"{where}: {k} of each layer, but transcoder.features is {recipe.transcoder.features}")
    if config.ranking == "zscore" and recipe.train.batch_tokens < 2:
        faults.append('activation.ranking: "zscore" needs train.batch_tokens of at least 2')
    return faults
