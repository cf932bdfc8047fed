"""Initial values from training tokens: each feature begins as an example of what an MLP reads and writes.

For a feature (l, f) with the token i, whose normalised input of layer l is x_i and whose normalised target of layer t
is y_it, and with |w| the norm that its encoder row has:

    encoder row = |w| x_i / |x_i|,    decoder row for the layer t = c_t y_it

A token activates the features whose examples are nearest to it, so that the reconstruction is a kernel regression
(Nadaraya 1964, "On estimating regression"; Watson 1964, "Smooth regression analysis"). c_t is the least-squares factor
on one more batch: with the reconstruction z_t for c = 1, c_t = (sum over tokens of z_t · y_t) / (sum of
|z_t|²). Where a row serves several targets, it is c times their mean. A token without an input, x_i = 0, is no example:
the encoder row stays as it was drawn.

Tokens of frequent kinds, such as line ends, would take many features. So a token is drawn with a weight of one over the
density of its inputs, sum over tokens j of max(cos(x_i, x_j), 0)⁴, with j from the first batches.

Shapes: B tokens, L layers, D d_model, F features per layer, N of them that get a token of one batch.
"""

from __future__ import annotations

import math
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clt_callbacks.targets import targets
from clt_plugins import Training, generator

if TYPE_CHECKING:
    from clt_callbacks import ExemplarStartConfig
    from clt_plugins import Batch


REFERENCE = 4096
"""Tokens, at least, that densities are estimated from; fewer where fewer are read."""
POWER = 4
"""Of cosines in a density."""


class ExemplarStart:
    """A `Callback`."""

    every = 0

    def __init__(self, config: ExemplarStartConfig):
        self.config = config

    @torch.no_grad()
    def start(self, run: Training) -> None:
        """Set the rows of all features; only the encoder's where a tying has no decoder rows of single features."""
        if run.step > 0:
            return
        size = run.context.batch_tokens
        count = math.ceil(self.config.tokens_per_feature * run.context.n_features / size)
        batches = run.sample((count + 1) * size)
        # The first batches are kept until they are enough to tell which kinds of tokens are frequent.
        kept = [_Rows(run, batch) for batch in islice(batches, min(count, math.ceil(REFERENCE / size)))]
        written_to = targets(run)
        examples = _Examples(run, count, torch.cat([rows.inputs for rows in kept]), written_to)
        while kept:
            examples.add(kept.pop(0))
        for batch in islice(batches, count - examples.batches):
            examples.add(_Rows(run, batch))
        for batch in batches:
            self._scale(run, batch, written_to)

    def _scale(self, run: Training, batch: Batch, written_to: list[int]) -> None:
        """Multiply all decoder rows by c_t; by one number for all targets where a row serves several."""
        if "decoder" not in run.settable:
            return
        written = run.reconstruct(batch).double()
        products = (written * batch.targets.double()).sum((0, 2))
        sums = run.parallel.total(torch.stack([products, written.square().sum((0, 2))]), over="tokens")
        own, n_layers = run.transcoder.own, run.context.n_layers
        feature = torch.arange(own.start, own.stop, device=run.context.device)
        for layer in range(n_layers):
            rows = run.decoder(layer)
            product, square = sums[:, layer : layer + written_to[layer]]
            if rows.shape[1] < written_to[layer]:
                product, square = product.sum(0, keepdim=True), square.sum(0, keepdim=True)
            factor = (product / square.clamp_min(1e-300)).clamp_min(0)
            run.reinitialise(layer, feature, decoder=rows * factor.to(rows)[:, None])


class _Examples:
    """Gives features their examples, a part of them from each batch."""

    def __init__(self, run: Training, total: int, reference: Tensor, written_to: list[int]):
        self.run, self.total, self.written_to = run, total, written_to
        self.batches = self.features = 0
        """How many were used, and how many have their rows."""
        self.reference = torch.nn.functional.normalize(reference, dim=-1)
        self.random = generator(run.context.seed, "exemplar_start")
        self.norms = [run.encoder(layer).norm(dim=1) for layer in range(run.context.n_layers)]

    def add(self, rows: _Rows) -> None:
        """Give the next features of every layer tokens of a batch, each layer its own."""
        run = self.run
        left, device = run.context.n_features - self.features, run.context.device
        count = -(-left // (self.total - self.batches)) if rows.count else 0
        feature = torch.arange(self.features, self.features + count, device=device)
        for layer in range(run.context.n_layers if count else 0):
            order = self._order(rows.inputs[:, layer], layer)
            # Transforms may leave fewer tokens than features: then a token serves several.
            number = order[torch.arange(count, device=device) % rows.count]
            self._set(layer, feature, rows.inputs[number, layer], rows.targets(number))
        self.batches += 1
        self.features += count

    def _order(self, x: Tensor, layer: int) -> Tensor:
        """All tokens [N, D] of a batch in random order, drawn one after the other with the weights 1 / density."""
        direction = torch.nn.functional.normalize(x, dim=-1)
        density = (direction @ self.reference[:, layer].T).clamp_min_(0).pow_(POWER).sum(1)
        # The least of exponential numbers over weights is each with a probability of its weight's share (Efraimidis
        # & Spirakis 2006, "Weighted random sampling with a reservoir"). A token without an input comes last.
        drawn = torch.empty(len(x), dtype=torch.float64).exponential_(generator=self.random).to(x.device)
        return (drawn * density).where(density > 0, torch.inf).argsort(stable=True)

    def _set(self, layer: int, feature: Tensor, inputs: Tensor, targets: Tensor) -> None:
        """Set the rows of features [N] to those of their tokens: inputs [N, D], targets [N, L, D]."""
        run = self.run
        encoder = torch.nn.functional.normalize(run.rows_for(layer, inputs), dim=1)
        own = run.transcoder.own
        mine = (feature >= own.start) & (feature < own.stop)
        encoder[mine] *= self.norms[layer][feature[mine] - own.start, None].to(encoder)
        some = encoder.any(1)
        run.reinitialise(layer, feature[some], encoder=encoder[some])
        if "decoder" in run.settable:
            run.reinitialise(layer, feature, decoder=targets[:, layer : layer + self.written_to[layer]])


class _Rows:
    """The tokens of a batch on all ranks, by their number in the batch of a single process."""

    def __init__(self, run: Training, batch: Batch):
        self.batch, self.parallel = batch, run.parallel
        counts = torch.zeros(run.parallel.batch_ranks, dtype=torch.int64, device=batch.inputs.device)
        counts[run.parallel.batch_rank] = batch.tokens
        by_rank = run.parallel.total(counts, over="tokens").tolist()
        self.first = sum(by_rank[: run.parallel.batch_rank])
        self.count = sum(by_rank)
        self.inputs = self._of(batch.inputs, torch.arange(self.count, device=batch.inputs.device))
        """[tokens, L, D]"""

    def targets(self, number: Tensor) -> Tensor:
        """Targets of some tokens, [N, L, D]."""
        return self._of(self.batch.targets, number)

    def _of(self, x: Tensor, number: Tensor) -> Tensor:
        local = number - self.first
        mine = (local >= 0) & (local < self.batch.tokens)
        rows = x.new_zeros(len(local), *x.shape[1:])
        rows[mine] = x[local[mine]]
        # Every other rank adds zeros: the sum is exact.
        return self.parallel.total(rows, over="tokens")
