"""A transcoder in the place of a language model's MLPs: the reconstruction of one layer after the other.

A layer reads what the replacements before it wrote. Its features are computed from that, and its output is the sum of
what the features of all layers so far write to it. A selection over all layers sees, for layers that come later, what
the unchanged model reads there.

Evaluation and the losses that run the model (`RunsModel`) share this. With gradients, what is computed is
differentiable in the transcoder's parameters and in what the layers read.

Shapes: R positions, L layers, D d_model, F features per layer, N active pairs of a layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from clt_plugins.contract.model.activation import Thresholded
from clt_plugins.data.features import Features, Pairs
from clt_plugins.model.in_model.layer import encode_in_layer, of_all_ranks, select_in_layer

if TYPE_CHECKING:
    from clt_plugins.model.transcoder import CrossLayerTranscoder


class Replacement:
    """Gives what the transcoder writes, layer by layer.

    Args:
        inputs: what the MLPs of the unchanged model read, raw, [R, L, D].
        lengths: how many positions are selected among at a time, one number for each part of R; None: among all of
            them. Without meaning for activations with thresholds.
    """

    def __init__(self, transcoder: CrossLayerTranscoder, inputs: Tensor, lengths: Sequence[int] | None = None):
        self.transcoder = transcoder
        self.raw = list(inputs.unbind(1))
        """What each layer reads, [R, D]: in the changed model, as far as that is known."""
        self.read = self.raw.copy()
        """The same for this rank's features."""
        self.rows, self.bias = transcoder.encoder.rows(transcoder.tying).contiguous(), transcoder.encoder.bias()
        self.lengths = [len(inputs)] if lengths is None else list(lengths)
        self.norms = lru_cache(maxsize=1)(transcoder.tying.norms)
        self.written: Tensor | None = None
        """What this rank's features of the layers so far write, normalised, [R, L, D]."""
        # All features of the layers so far, [R, L, F], where a transcoder runs by matrix products. (A training step
        # would have to keep all of it for every layer.)
        dense = transcoder.runs_dense and not torch.is_grad_enabled()
        self.acts = inputs.new_zeros(len(inputs), *transcoder.shape) if dense else None

    def __call__(self, layer: int, inputs: Tensor) -> Tensor:
        """What the transcoder writes at a layer that reads `inputs` [R, D]; [R, D]. Call it for each layer in turn."""
        transcoder, parallel = self.transcoder, self.transcoder.context.parallel
        self.raw[layer], self.read[layer] = inputs, of_all_ranks(inputs, parallel)
        x = transcoder.normaliser.inputs(torch.stack(self.raw, 1))
        if self.acts is not None:
            self.acts[:, layer] = transcoder.encode_normalised(x).features.dense()[:, layer]
            return transcoder.normaliser.restore(transcoder.reconstruct(Features(self.acts), x))[:, layer]
        read = x if parallel.tensor_ranks == 1 else transcoder.normaliser.inputs(torch.stack(self.read, 1))
        written = transcoder.tying.decode(self._features(read, layer))
        self.written = written if self.written is None else self.written + written
        # Ranks add up what is read here, not all that is written for later layers.
        total = parallel.sum_features(self.written[:, layer])
        return transcoder.normaliser.restore(total[:, None] + transcoder.tying.affine(x))[:, layer]

    def _features(self, x: Tensor, layer: int) -> Features:
        """The features of this layer alone.

        Args:
            x: [R, L, D], normalised.
        """
        transcoder, context = self.transcoder, self.transcoder.context
        rows, bias = self.rows, self.bias
        h = transcoder.encoder.inputs(x)
        found: list[tuple[Tensor, Tensor]] = []
        begin = 0
        parts = [len(x)] if isinstance(transcoder.activation, Thresholded) else self.lengths
        # Ranks that share tokens read texts of other lengths, and select among their own.
        with context.parallel.apart():
            for length in parts:
                selection = transcoder.activation.selection(length, self.norms)
                token, number = select_in_layer(selection, h[begin : begin + length].detach(), rows, bias, layer)
                found.append((token + begin, number))
                begin += length
        token, number = (torch.cat(same) for same in zip(*found, strict=True))
        pre = encode_in_layer(h[:, layer], rows, bias, token, number, layer, context.kernels)
        feature = number + layer * rows.shape[1]
        pairs = Pairs(token, feature, len(x), *transcoder.shape)
        return Features(transcoder.activation(pre, feature), pairs)


@contextmanager
def as_evaluated(transcoder: CrossLayerTranscoder) -> Iterator[None]:
    """Within it, an activation selects as it does in an evaluation: a k that falls over the run is the last one.

    Thresholds stay as in training: pairs just below one get no value, but give it a gradient.
    """
    activation = transcoder.activation
    assert isinstance(activation, nn.Module)
    before = activation.training
    if not isinstance(activation, Thresholded):
        activation.eval()
    try:
        yield
    finally:
        activation.train(before)
