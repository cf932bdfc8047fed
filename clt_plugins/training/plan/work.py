"""What a training step has to do, in numbers that neither the device nor the kernels change.

Shapes: B tokens, L layers, D d_model, F features per layer of this rank, N active pairs, R rows of all matrices.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from clt_plugins.contract.model.activation import Scheduled
from clt_plugins.contract.training.loss import RunsModel
from clt_plugins.model.parameters import is_matrix
from clt_plugins.model.transcoder import DENSE_ABOVE, CrossLayerTranscoder
from clt_plugins.training.optimizers.make import build_optimizer, weights_of
from clt_plugins.training.step.shares import own_tokens

if TYPE_CHECKING:
    from clt_plugins.contract.recipe import Recipe
    from clt_plugins.contract.training.loss import Loss
    from clt_plugins.model.assemble import Parts


@attrs.frozen(kw_only=True)
class Work:
    """A training step of one rank."""

    tokens: int
    """B."""
    n_layers: int
    d_model: int
    n_features: int
    """F of this rank."""
    row_size: int
    """H: numbers of an encoder's row; d_model for most encoders."""
    encoder_flops: int
    """What the encoder computes besides the product of rows, and its gradients."""
    encoder_bytes: int
    """What it makes of inputs and weights for that product, and the gradients of it."""
    pairs: int
    """N: active pairs of this rank."""
    extra: int
    """Pairs that losses select besides, if enough features are dead."""
    targets: float
    """Rows that a pair reads of the decoder, on average."""
    selections: int
    """How many selections look at each pre-activation: the activation's, and those of losses."""
    dense: bool
    """Whether pre-activations and features are dense."""
    keeps_pre: bool
    """Whether all pre-activations are kept for a loss."""
    parameters: int
    rows: int
    """R: as many rows of D numbers as the encoder's and the decoder's matrices amount to."""
    weight_bytes: int
    """Of each parameter."""
    state_bytes: int
    """Of all parameters: what the optimizer keeps beside them."""
    plugin_bytes: int = 0
    """What losses, metrics and callbacks keep: their parameters and buffers, averages of weights."""
    compute_bytes: int
    """Of each normalised activation."""
    row_bytes: int
    """Of a token as the source gives it."""
    product: str
    """The type of the encoder's product; where it runs dense, of all products."""
    exact: bool
    """Whether pre-activations of the product are those of the features; otherwise they are computed again."""
    clips: bool
    tensor_ranks: int
    data_ranks: int
    shares: int = 1
    """Ranks that split the tokens when they compute the error, where the ranks are GPUs."""
    contexts: int = 0
    """Of text that the language model reads in a step for losses that run it."""

    @property
    def active(self) -> int:
        """Pairs that are decoded: all of them where the transcoder is dense."""
        return self.tokens * self.n_layers * self.n_features if self.dense else self.pairs

    @property
    def visits(self) -> float:
        """Rows that all pairs read, rows read several times included."""
        return self.active * self.targets


class Sizes:
    """A source of which nothing is known but sizes; it has no data."""

    def __init__(self, n_layers: int, d_model: int):
        self.n_layers, self.d_model = n_layers, d_model

    def __getattr__(self, name: str) -> Any:
        # `next` and the like are there for who looks whether they are.
        if name.startswith("_") or name not in ("next", "held_out", "statistics", "state", "load_state"):
            raise AttributeError(name)
        raise NotImplementedError(f"{name}: a plan has no data")


class SizesInModel(Sizes):
    """The same of a source that `TrainsInModel`, or of which it is not known whether it does."""

    def trainable_model(self) -> Any:
        raise NotImplementedError("a plan has no model")

    def training_text(self, contexts: int, position: Any) -> Any:
        raise NotImplementedError("a plan has no text")


NARROW = {"bf16": "bfloat16", "fp8": "float8", "tf32": "tf32"}
"""`train.precision` -> the name of the product's rate."""


def work(parts: Parts, recipe: Recipe, *, progress: float = 0.0, row_bytes: int = 0) -> Work:
    """What a step of these parts has to do.

    Args:
        progress: the share of the run that is done: k may fall over it.
        row_bytes: bytes of a token in a batch; as normalised activations if 0.
    """
    transcoder, train, parallel = parts.transcoder, recipe.train, parts.context.parallel
    tokens, n_layers, d_model = train.batch_tokens // parallel.data_ranks, transcoder.n_layers, transcoder.d_model
    compute_type = transcoder.target_variance.dtype
    compute = compute_type.itemsize
    extra = [_extra_pairs(loss, tokens, n_layers, transcoder.shape[1]) for loss in parts.losses]
    contexts = [loss.contexts for loss in parts.losses if isinstance(loss, RunsModel)]
    dtype = parts.context.dtype
    product = transcoder.product or "fp32"
    narrow = NARROW.get(product, str(dtype).removeprefix("torch."))
    sparse, keeps_pre = not transcoder.runs_dense, any(loss.needs_pre for loss in parts.losses)
    if keeps_pre or not sparse:  # `train.precision` only chooses features, and here none are chosen by it
        narrow = str(dtype if parts.context.device.type != "cpu" else compute_type).removeprefix("torch.")
    matrices = [p for p in transcoder.parameters() if is_matrix(p, d_model)]
    encoder_flops, encoder_bytes, row_dtype = _encoder(transcoder, tokens)
    return Work(
        tokens=tokens,
        n_layers=n_layers,
        d_model=d_model,
        n_features=transcoder.shape[1],
        row_size=transcoder.row_size,
        encoder_flops=encoder_flops,
        encoder_bytes=encoder_bytes,
        pairs=_pairs(parts, tokens, progress),
        extra=sum(extra),
        targets=_targets(transcoder),
        selections=(1 if transcoder.activation.fixed_size or sparse else 0) + sum(count > 0 for count in extra),
        dense=transcoder.runs_dense,
        keeps_pre=keeps_pre,
        parameters=sum(p.numel() for p in transcoder.parameters()),
        rows=sum(p.numel() for p in matrices) // d_model,
        weight_bytes=dtype.itemsize,
        plugin_bytes=_kept(parts),
        state_bytes=sum(map(build_optimizer(transcoder, recipe).state_bytes, weights_of(transcoder))),
        compute_bytes=compute,
        row_bytes=row_bytes or 2 * n_layers * d_model * compute,
        product=narrow,
        exact=transcoder.product in (None, "fp32") and row_dtype == compute_type,
        clips=train.clip_norm is not None,
        tensor_ranks=parallel.tensor_ranks,
        data_ranks=parallel.data_ranks,
        shares=parallel.tensor_ranks if own_tokens(parallel, tokens) is not None else 1,
        contexts=-(-max(contexts, default=0) // parallel.data_ranks),
    )


def _encoder(transcoder: CrossLayerTranscoder, tokens: int) -> tuple[int, int, torch.dtype]:
    """Operations and bytes of what is made of inputs and weights before their product, and the type of the rows.

    An encoder is known only as functions: torch counts what they do, here mostly on the device "meta".
    """
    x = transcoder.target_variance.new_empty(tokens, transcoder.n_layers, transcoder.d_model)
    with FlopCounterMode(display=False) as counter, torch.enable_grad():
        h, rows, _ = transcoder.affine_form(x)
        made = [one for one in (h, rows) if one is not x and not isinstance(one, nn.Parameter)]
        summed = [one.sum() for one in made if one.requires_grad]
        if summed:
            parameters = [p for p in transcoder.parameters() if p.requires_grad]
            torch.autograd.grad(summed, parameters, allow_unused=True)
    return counter.get_total_flops(), 2 * sum(one.numel() * one.element_size() for one in made), rows.dtype


def _kept(parts: Parts) -> int:
    """Bytes that plugins outside the transcoder keep on its device."""
    own = [x for module in parts.outside().values() for x in [*module.parameters(), *module.buffers()]]
    said = [one.state_bytes(parts.transcoder) for one in parts.callbacks if hasattr(one, "state_bytes")]
    return sum(x.numel() * x.element_size() for x in own) + sum(said)


def _pairs(parts: Parts, tokens: int, progress: float) -> int:
    """N, where the activation fixes it; else as many as make a transcoder change from dense to sparse."""
    transcoder = parts.transcoder
    at_change = int(DENSE_ABOVE * tokens * transcoder.n_layers * transcoder.shape[1])
    if not transcoder.activation.fixed_size:
        return at_change
    if isinstance(transcoder.activation, Scheduled):
        transcoder.activation.schedule(progress)
    # The engine's `Top` knows its size; a plugin's selection may not.
    return getattr(transcoder.activation.selection(tokens, transcoder.tying.norms), "size", at_change)


def _extra_pairs(loss: Loss, tokens: int, n_layers: int, n_features: int) -> int:
    """How many pairs a loss selects if all features are dead."""
    idle = torch.full((n_layers, n_features), torch.iinfo(torch.int64).max)
    selection = loss.selection(tokens, idle)
    return getattr(selection, "size", 0) if selection is not None else 0


def _targets(transcoder: Any) -> float:
    """Rows that a feature reads of the decoder, on average over layers."""
    layout = getattr(transcoder.tying, "layout", None)
    if layout is None:
        # A feature of layer s writes to L - s layers.
        return (transcoder.n_layers + 1) / 2
    return sum(layout.count) / len(layout.count)
