"""What a run will need, before it starts: parameters, bytes at the peak, arithmetic per step.

Shapes: B tokens, L layers, D d_model, F features per layer, N active pairs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from clt_plugins.contract.abilities import Scheduled
from clt_plugins.contract.recipe import Recipe
from clt_plugins.finished.stages import check_stages
from clt_plugins.model.assemble import Parts, assemble, close

if TYPE_CHECKING:
    from clt_plugins.registry.plugins import Plugins

PAIR_BYTES = 96
"""Per active pair: token, feature and feature-order numbers (int64), values and their gradients, sorting's scratch."""


def plan(recipe: Recipe, plugins: Plugins) -> dict[str, Any]:
    """Build everything without training, the transcoder without memory, and add up.

    Returns:
        `parameters` (in all) and `parameters_by_name`; `bytes` by kind and `total_bytes`, of one process without its
        libraries and its source's own buffers; `flops` of a training step by part, and `total_flops`. Of several ranks,
        all are those of the first.

    Raises:
        Faults: the stages after training would fail.
    """
    import torch

    parts = assemble(recipe, None, torch.device("meta"))
    try:
        check_stages(parts, recipe, plugins)
        return estimate(parts, recipe)
    finally:
        close(parts)


def estimate(parts: Parts, recipe: Recipe) -> dict[str, Any]:
    """See `plan`."""
    transcoder, train = parts.transcoder, recipe.train
    sizes = {name: p.numel() for name, p in transcoder.named_parameters()}
    bytes_of_parameters = sum(p.numel() * p.element_size() for p in transcoder.parameters())
    count = sum(sizes.values())
    parallel = parts.context.parallel
    tokens, layers, d_model = train.batch_tokens // parallel.data_ranks, transcoder.n_layers, transcoder.d_model
    features = transcoder.W_enc.shape[1]
    compute = transcoder.normaliser.input_shift.element_size()
    # What a dense pass keeps: the pre-activations, the features, and the gradient of each.
    dense = transcoder.runs_dense or any(loss.needs_pre for loss in parts.losses)
    pairs = _pairs(parts, tokens)
    moment = 2 if train.states == "bf16" else parts.context.dtype.itemsize
    need = {
        "parameters": bytes_of_parameters,
        "gradients": bytes_of_parameters,
        "optimizer": 2 * count * moment,
        # Raw and normalised inputs and targets, the reconstruction, its error, and two gradients of it.
        "batch": 8 * tokens * layers * d_model * compute,
        "pre_activations": (4 * layers if dense else 2) * tokens * features * compute,
        "pairs": 0 if transcoder.runs_dense else pairs * PAIR_BYTES,
    }
    written = pairs * d_model * (layers + 1) // 2
    if transcoder.runs_dense:
        written = tokens * features * d_model * layers * (layers + 1) // 2
    passes = 3 * tokens * layers * d_model * features if dense else tokens * layers * d_model * features
    flops = {
        "encoder": 2 * passes,
        # Decode, the gradient of the values and that of the rows; and the encoder's rows.
        "sparse": 3 * 2 * written + (0 if dense else 2 * pairs * d_model),
        "optimizer": 12 * count,
    }
    return {
        "layers": layers,
        "d_model": d_model,
        "features": transcoder.n_features,
        "parameters": count,
        "parameters_by_name": sizes,
        "bytes": need,
        "total_bytes": sum(need.values()),
        "flops": flops,
        "total_flops": sum(flops.values()),
    }


def _pairs(parts: Parts, tokens: int) -> int:
    """N, where the activation fixes it; else as many as switch a dense pass to sparse."""
    from clt_plugins.model.transcoder import DENSE_ABOVE

    transcoder = parts.transcoder
    some = int(DENSE_ABOVE * tokens * transcoder.n_layers * transcoder.W_enc.shape[1])
    if not transcoder.activation.fixed_size:
        return some
    if isinstance(transcoder.activation, Scheduled):
        transcoder.activation.schedule(0.0)
    # `Top` knows its size; a selection of a plugin's own need not.
    return getattr(transcoder.activation.selection(tokens, transcoder.tying.norms), "size", some)
