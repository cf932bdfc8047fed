"""Seconds of each part of a training step, from what it has to do and what a machine does in a second.

A part that needs several things of the machine at once takes as long as the slowest of them: that is its bound. Parts
follow each other.

Shapes: B tokens, L layers, D d_model, F features per layer of this rank, N active pairs.
"""

from __future__ import annotations

import math
from statistics import NormalDist, fmean
from typing import TYPE_CHECKING

import attrs

from clt_plugins.training.plan.machines import USABLE, Rates
from clt_plugins.training.plan.records import Device, Piece, Plan, Speed, Step

if TYPE_CHECKING:
    from collections.abc import Sequence

    from clt_plugins.contract.reading.source import Outline
    from clt_plugins.contract.recipe import Recipe
    from clt_plugins.training.plan.work import Work

PRODUCT, MEMORY, CACHE, INSTRUCTIONS, NETWORK, CPU, COPIES = (
    "matrix product",
    "memory",
    "cache",
    "instructions",
    "network",
    "the CPU's launches",
    "copies to the device",
)
SHARES = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
"""Where in a run steps are looked at: its start, the middle of each fifth, its end."""
SIGMA = 1.5
"""Densities of features are log-normal with this deviation, as measured ones of trained transcoders are, about."""
LAUNCHES_PER_STEP = 260
LAUNCHES_PER_LAYER = 14
"""Operations that the CPU starts in a step."""
SORT_BYTES = 160
"""Traffic for each pair beside its rows: sorting into two orders, values and gradients."""
PASSES = 3, 12
"""Reads and writes of [B, L, D]: to normalise inputs, and for the bias's gradient; and of the tokens whose error this
rank computes, to normalise targets, to add the bias, for the error and its gradient."""


def used_rows(work: Work) -> float:
    """How many decoder rows have a pair in the batch: each is read from memory once, at least.

    With densities p of features, a feature is active somewhere in B tokens with probability 1 - exp(-p B).
    """
    if work.dense:
        return work.n_layers * work.n_features * work.targets
    mean = work.pairs / (work.tokens * work.n_layers * work.n_features)
    points = [NormalDist().inv_cdf((i + 0.5) / 64) for i in range(64)]
    densities = [mean * math.exp(SIGMA * z - SIGMA**2 / 2) for z in points]
    share = sum(1 - math.exp(-min(1.0, p) * work.tokens) for p in densities) / len(densities)
    return share * work.n_layers * work.n_features * work.targets


def step(work: Work, rates: Rates, outline: Outline, *, copied: bool = False, dead: bool = False) -> Step:
    """A training step with the source's work for its tokens.

    Args:
        copied: the source's rows are in the memory of the CPU, and the transcoder is elsewhere.
        dead: enough features are dead for losses to select pairs among them.
    """
    pieces = [
        _encoder(work, rates),
        *([_selection(work, rates)] if work.selections and not work.dense else []),
        *_decoder(work, rates),
        _optimizer(work, rates),
        *([_network(work, rates, outline)] if work.tensor_ranks * work.data_ranks > 1 else []),
        _rest(work, rates),
        *_source(work, rates, outline, copied=copied),
    ]
    if dead and work.extra and not work.dense:
        also = attrs.evolve(work, pairs=work.extra)
        pieces += [attrs.evolve(piece, name=f"{piece.name} (dead)") for piece in _decoder(also, rates)]
    # The CPU starts operations while the device works: it is a limit of its own.
    device = sum(piece.seconds for piece in pieces)
    host = (LAUNCHES_PER_STEP + LAUNCHES_PER_LAYER * work.n_layers) / rates.launches
    if host > device:
        pieces.append(Piece(name="waiting", seconds=host - device, share=0.0, bound=CPU))
    total = sum(piece.seconds for piece in pieces)
    return Step(seconds=total, pieces=[attrs.evolve(piece, share=piece.seconds / total) for piece in pieces])


def speed(works: Sequence[Work], rates: Rates, outline: Outline, needs: Plan, recipe: Recipe) -> Speed:
    """How long a recipe takes.

    Args:
        works: a step at each of `SHARES` of the run.
        needs: the plan so far.
    """
    copied = needs.host_bytes > 0
    first, *between, last = [step(work, rates, outline, copied=copied) for work in works]
    seconds = fmean(each.seconds for each in between)
    return Speed(
        device=Device(name=rates.name, gpus=needs.ranks, basis=rates.basis, memory=rates.capacity),
        first=first,
        last=last,
        seconds=seconds,
        tokens_per_s=recipe.train.batch_tokens / seconds,
        hours=recipe.train.steps * seconds / 3600,
        if_dead=step(works[-1], rates, outline, copied=copied, dead=True).seconds - last.seconds,
        fits=None if rates.capacity is None else needs.total_bytes <= USABLE * rates.capacity,
    )


def _piece(name: str, needs: dict[str, float]) -> Piece:
    """A part that takes as long as the slowest thing that it needs."""
    bound = max(needs, key=lambda key: needs[key])
    return Piece(name=name, seconds=needs[bound], share=0.0, bound=bound)


def product_rate(rates: Rates, dtype: str) -> float:
    """Operations per second of a product; of a type that is not known, those of float32."""
    return rates.products.get(dtype, rates.products["float32"])


def _encoder(work: Work, rates: Rates) -> Piece:
    """The product of all layers; where pre-activations are dense, their gradients too."""
    block = work.tokens * work.n_layers * work.n_features
    times = 3 if work.dense or work.keeps_pre else 1
    weights = work.n_layers * work.n_features * work.row_size * work.weight_bytes
    flops = times * 2 * block * work.row_size + work.encoder_flops
    needs = {
        PRODUCT: flops / product_rate(rates, work.product),
        MEMORY: (times * (weights + block * work.compute_bytes) + work.encoder_bytes) / rates.memory,
    }
    return _piece("encoder", needs)


def _selection(work: Work, rates: Rates) -> Piece:
    """Every pre-activation is looked at; what a loss selects among dead features costs nothing while none is dead."""
    numbers = work.tokens * work.n_layers * work.n_features
    return _piece("selection", {INSTRUCTIONS: numbers / rates.numbers})


def _decoder(work: Work, rates: Rates) -> list[Piece]:
    """Decoding, and all gradients of rows and values, those of the encoder's rows included."""
    numbers = work.visits * work.d_model
    row = work.d_model * work.weight_bytes
    if work.dense:
        rate = product_rate(rates, work.product)
        weights = work.rows * row
        return [
            _piece("decode", {PRODUCT: 2 * numbers / rate, MEMORY: weights / rates.memory}),
            _piece("gradients", {PRODUCT: 4 * numbers / rate, MEMORY: 3 * weights / rates.memory}),
        ]
    used, own = used_rows(work) * row, work.pairs * work.row_size
    again = 0.0 if work.exact else own / rates.decoded  # values of the selected, in full precision
    decode = {
        MEMORY: used / rates.memory,
        CACHE: work.visits * row / rates.cached,
        INSTRUCTIONS: again + numbers / rates.decoded,
    }
    gradients = {
        MEMORY: (2 * used + work.rows * row) / rates.memory,
        CACHE: (numbers + 2 * own) * work.compute_bytes / rates.cached,
        INSTRUCTIONS: (numbers + own) / rates.differentiated + work.rows / rates.touched,
    }
    return [_piece("decode", decode), _piece("gradients", gradients)]


def _optimizer(work: Work, rates: Rates) -> Piece:
    """Adam reads weight, gradient and moments, and writes weight and moments."""
    moved = 3 * work.parameters * work.weight_bytes + 2 * work.state_bytes
    return _piece("optimizer", {MEMORY: moved / rates.memory})


def _network(work: Work, rates: Rates, outline: Outline) -> Piece:
    """Sums over ranks: of the reconstruction where features are split, of gradients where tokens are. And rows, where
    ranks that share the features divide the language model's passes."""
    activations = work.tokens * work.n_layers * work.d_model * work.compute_bytes
    gradients = work.parameters * work.weight_bytes
    sent = sum(
        2 * (ranks - 1) / ranks * size
        for ranks, size in ((work.tensor_ranks, activations), (work.data_ranks, gradients))
    )
    if outline.model_parameters:
        sent += (work.tensor_ranks - 1) / work.tensor_ranks * work.tokens * work.row_bytes
    return _piece("network", {NETWORK: sent / rates.link})


def _rest(work: Work, rates: Rates) -> Piece:
    """Normalisation, losses, and sorting pairs."""
    activations = work.tokens * work.n_layers * work.d_model * work.compute_bytes
    pairs = 0 if work.dense else work.pairs * SORT_BYTES
    # On GPUs, ranks that share the features split the tokens when they compute the error.
    passes = PASSES[0] + PASSES[1] / (work.shares if rates.context else 1)
    return _piece("rest", {MEMORY: (passes * activations + pairs) / rates.memory})


def _source(work: Work, rates: Rates, outline: Outline, *, copied: bool) -> list[Piece]:
    """The language model's forward pass of the batch's tokens, divided among the ranks that share the features; and
    copies of rows: into the block, out of it, and to the device where the block is not there."""
    row = work.tokens * work.row_bytes
    pieces = []
    if outline.model_parameters:
        flops = 2 * outline.model_parameters * work.tokens / work.tensor_ranks
        seconds = flops / product_rate(rates, outline.model_dtype)
        pieces.append(_piece("language model", {PRODUCT: seconds}))
    copies = {MEMORY: 4 * row / rates.memory}
    if copied:
        copies[COPIES] = (2 if outline.model_bytes else 1) * row / rates.copied
    pieces.append(_piece("data", copies))
    return pieces
