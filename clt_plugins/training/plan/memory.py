"""Bytes of a rank at the peak of a training step, by part; and bytes on disk.

The parts in `LASTING` are there all the time. The others belong to phases that follow each other: while statistics
are gathered, while features are selected, while gradients flow back, while the language model reads. The peak is
the largest phase.

Shapes: B tokens, L layers, D d_model, F features per layer of this rank, N active pairs.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from clt_plugins.contract.model.normalisation import Observes
from clt_plugins.files.records import as_data
from clt_plugins.training.plan.records import Disk, Memory

if TYPE_CHECKING:
    from torch import Tensor

    from clt_plugins.contract.reading.source import Outline
    from clt_plugins.contract.recipe import Recipe
    from clt_plugins.model.transcoder import CrossLayerTranscoder
    from clt_plugins.training.plan.work import Work

PAIR_BYTES = 52
"""Per active pair: token, feature, layer and feature-order numbers (int64), values and their gradients, places of the
products, sorting's scratch."""
SELECTED_BYTES = 84
"""For each pair that a selection keeps: key, id and pre-activation of an eighth more than it keeps, twice; places and
keys of twice as many in a block; and sorting the result."""
READ = 1, 1
"""[B, L, D] in normalised units that are alive while features are selected: inputs; and of the tokens whose error this
rank computes, targets."""
WRITTEN = 1, 2
"""What a sparse pass has besides while gradients flow back: a gradient; and of those tokens reconstruction and
error."""
NORMALISED = 3, 3
"""All that a dense pass has alive at once: inputs, what is written, its gradient; and of those tokens targets, error,
and a gradient."""
OF_EXTRA = 3
"""The same for losses that select pairs: what those write, the residual, its error."""
IN_MODEL = 8
"""[R, L, D] of the language model's texts that are alive at once: what layers read, what is written to them, what the
encoder keeps, and gradients of them."""
DENSE = 5
"""[B, L, F] that are alive at once in a dense pass: pre-activations, features, and three gradients."""
LASTING = ("parameters", "gradients", "optimizer", "plugins", "normalisation", "source", "language_model", "libraries")
PHASES = (
    ("batch", "pre_activations", "selection"),
    ("batch", "pairs", "written", "in_model"),
    ("model_pass",),
    ("statistics",),
)


def memory(
    work: Work,
    transcoder: CrossLayerTranscoder,
    outline: Outline,
    *,
    buffer: int = 0,
    libraries: int = 0,
    fixed: bool = False,
) -> Memory:
    """The parts of a rank's memory.

    Args:
        fixed: sizes do not follow the numbers, as on a GPU: each tensor rank has places for all pairs, since any of
            them may be its own.
        buffer: what the source keeps on the device.
        libraries: what a process on a GPU needs besides.
    """
    activations = work.tokens * work.n_layers * work.d_model

    def alive(numbers: tuple[int, int]) -> int:
        # On GPUs, ranks that share the features split the tokens when they compute the error.
        all_tokens, own = numbers
        return (all_tokens * activations + own * activations // (work.shares if fixed else 1)) * work.compute_bytes

    block = work.tokens * work.n_features
    # A dense pass keeps the pre-activations, the features, and gradients of them; a sparse one a layer's block.
    layers = DENSE * work.n_layers if work.dense or work.keeps_pre else 2
    sparse = not work.dense and not work.keeps_pre
    pairs = 0 if work.dense else (work.pairs + work.extra) * (work.tensor_ranks if fixed else 1)
    of_extra = OF_EXTRA * activations * work.compute_bytes if work.extra and not work.dense else 0
    # As many pairs for each position as for a token of a batch.
    of_position = work.pairs * PAIR_BYTES // work.tokens + IN_MODEL * work.n_layers * work.d_model * work.compute_bytes
    in_model = work.contexts * (outline.text_bytes + outline.text_tokens * of_position)
    parameter_bytes = _bytes(transcoder.parameters())
    normaliser = transcoder.normaliser
    return Memory(
        parameters=parameter_bytes,
        gradients=parameter_bytes,
        optimizer=work.state_bytes,
        plugins=work.plugin_bytes,
        normalisation=_bytes(transcoder.statistics().values()),
        source=buffer,
        language_model=outline.model_bytes,
        libraries=libraries,
        batch=work.tokens * work.row_bytes + alive(READ if sparse else NORMALISED) + work.encoder_bytes,
        pre_activations=layers * block * work.compute_bytes,
        selection=pairs * SELECTED_BYTES,
        pairs=pairs * PAIR_BYTES + of_extra,
        written=alive(WRITTEN) if sparse else 0,
        model_pass=outline.pass_bytes,
        in_model=in_model,
        statistics=normaliser.observed_bytes() if isinstance(normaliser, Observes) else 0,
    )


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def peak(parts: Memory) -> int:
    """What is needed at the peak."""
    sizes = as_data(parts)
    return sum(sizes[name] for name in LASTING) + max(sum(sizes[name] for name in phase) for phase in PHASES)


def disk(work: Work, recipe: Recipe) -> Disk:
    """What a run writes, of all ranks together."""
    weights = work.parameters * work.tensor_ranks * work.weight_bytes
    kept = work.tensor_ranks * (work.state_bytes + work.plugin_bytes)
    checkpoint = weights + kept + 8 * work.n_layers * recipe.transcoder.features
    rows = recipe.train.steps * recipe.train.batch_tokens + recipe.train.eval_tokens
    return Disk(
        checkpoint=checkpoint,
        run=(recipe.train.keep_checkpoints + 1) * checkpoint + weights,
        activations=rows * 2 * work.n_layers * work.d_model * torch.bfloat16.itemsize,
    )
