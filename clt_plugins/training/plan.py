"""What a run will need, before it starts: parameters, bytes at the peak, arithmetic per step.

Shapes: B tokens, L layers, D d_model, F features per layer, N active pairs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import torch

from clt_plugins.contract.abilities import Scheduled
from clt_plugins.contract.recipe import Recipe
from clt_plugins.files.records import as_data
from clt_plugins.finished.stages import check_stages
from clt_plugins.model.assemble import Parts, assemble, close
from clt_plugins.model.transcoder import DENSE_ABOVE
from clt_plugins.training.optimizers.make import state_bytes

if TYPE_CHECKING:
    from clt_plugins.registry.plugins import Plugins

PAIR_BYTES = 96
"""Per active pair: token, feature and feature-order numbers (int64), values and their gradients, sorting's scratch."""


@attrs.frozen(kw_only=True)
class Memory:
    """Bytes at the peak of a training step, by what they hold."""

    parameters: int
    """The transcoder's parameters."""
    gradients: int
    """One for each parameter."""
    optimizer: int
    """Adam's two moments of each parameter; and the lower halves of bfloat16 weights (`train.bf16_weights`)."""
    batch: int
    """Inputs and targets, raw and normalised; the reconstruction, its error, and two gradients of it."""
    pre_activations: int
    """Pre-activations: of all layers where they are kept, else of one layer at a time."""
    pairs: int
    """Indices and values of active pairs; 0 where the transcoder runs dense."""


@attrs.frozen(kw_only=True)
class Flops:
    """Floating-point operations of a training step; a multiplication and an addition count as two."""

    encoder: int
    """Pre-activations, and their gradients where they are dense."""
    sparse: int
    """Decoding active pairs, the gradients of values and decoder rows, and of the encoder's rows."""
    optimizer: int
    """Adam's update."""


@attrs.frozen(kw_only=True)
class Plan:
    """What a run will need. Of several ranks, all numbers are those of rank 0."""

    n_layers: int = attrs.field(alias="layers")
    """L."""
    d_model: int
    """D."""
    n_features: int = attrs.field(alias="features")
    """F, per layer, of all ranks together."""
    parameters: int
    """How many numbers are trained in the transcoder."""
    parameters_by_name: dict[str, int]
    """The same for each parameter."""
    bytes: Memory
    """Memory by what it holds. The process needs more: libraries, and the buffers of the source, are not counted."""
    total_bytes: int
    """The sum of `bytes`."""
    flops: Flops
    """Arithmetic of a training step by part."""
    total_flops: int
    """The sum of `flops`."""


def plan(recipe: Recipe, plugins: Plugins) -> Plan:
    """Build everything without training, the transcoder without memory, and add up.

    Raises:
        Faults: training, or the stages after it, would fail.
    """
    parts = assemble(recipe, None, torch.device("meta"))
    try:
        check_stages(parts, recipe, plugins)
        return estimate(parts, recipe)
    finally:
        close(parts)


def estimate(parts: Parts, recipe: Recipe) -> Plan:
    """What a run of these parts will need; see `plan`."""
    transcoder, train = parts.transcoder, recipe.train
    sizes = {name: p.numel() for name, p in transcoder.named_parameters()}
    parameter_bytes = sum(p.numel() * p.element_size() for p in transcoder.parameters())
    count = sum(sizes.values())
    parallel = parts.context.parallel
    tokens, n_layers, d_model = train.batch_tokens // parallel.data_ranks, transcoder.n_layers, transcoder.d_model
    local_features = transcoder.W_enc.shape[1]
    compute = transcoder.normaliser.input_shift.element_size()
    # A dense pass keeps the pre-activations, the features, and the gradient of each.
    dense = transcoder.runs_dense or any(loss.needs_pre for loss in parts.losses)
    pairs = _pairs(parts, tokens)
    memory = Memory(
        parameters=parameter_bytes,
        gradients=parameter_bytes,
        optimizer=count * state_bytes(train, parts.context.dtype),
        batch=8 * tokens * n_layers * d_model * compute,
        pre_activations=(4 * n_layers if dense else 2) * tokens * local_features * compute,
        pairs=0 if transcoder.runs_dense else pairs * PAIR_BYTES,
    )
    # A feature of layer s writes to L - s layers: (L + 1) / 2 on average.
    written = pairs * d_model * (n_layers + 1) // 2
    if transcoder.runs_dense:
        written = tokens * local_features * d_model * n_layers * (n_layers + 1) // 2
    encoded = tokens * n_layers * d_model * local_features
    flops = Flops(
        encoder=2 * (3 if dense else 1) * encoded,
        # Three products: decode, the gradient of the values, and that of the rows. Then the encoder's rows.
        sparse=3 * 2 * written + (0 if dense else 2 * pairs * d_model),
        optimizer=12 * count,
    )
    return Plan(
        layers=n_layers,
        d_model=d_model,
        features=transcoder.n_features,
        parameters=count,
        parameters_by_name=sizes,
        bytes=memory,
        total_bytes=sum(as_data(memory).values()),
        flops=flops,
        total_flops=sum(as_data(flops).values()),
    )


def _pairs(parts: Parts, tokens: int) -> int:
    """N, where the activation fixes it; else as many as make a transcoder change from dense to sparse."""
    transcoder = parts.transcoder
    at_change = int(DENSE_ABOVE * tokens * transcoder.n_layers * transcoder.W_enc.shape[1])
    if not transcoder.activation.fixed_size:
        return at_change
    if isinstance(transcoder.activation, Scheduled):
        transcoder.activation.schedule(0.0)  # where k falls over a run, it is largest at the start
    # The engine's `Top` knows its size; a plugin's selection may not.
    return getattr(transcoder.activation.selection(tokens, transcoder.tying.norms), "size", at_change)


def as_table(needs: Plan) -> str:
    """A plan for people: GiB, and GFLOP per training step."""
    lines = [
        f"layers {needs.n_layers}, d_model {needs.d_model}, features {needs.n_features:,} per layer",
        f"parameters {needs.parameters:,}",
        *(f"  {name} {count:,}" for name, count in needs.parameters_by_name.items()),
        f"memory {needs.total_bytes / 2**30:.3f} GiB",
        *(f"  {name} {size / 2**30:.3f} GiB" for name, size in as_data(needs.bytes).items()),
        f"arithmetic {needs.total_flops / 1e9:,.1f} GFLOP per step",
        *(f"  {name} {count / 1e9:,.1f}" for name, count in as_data(needs.flops).items()),
    ]
    return "\n".join(lines)
