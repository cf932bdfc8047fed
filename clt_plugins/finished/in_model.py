"""A language model with a transcoder in the place of its MLPs.

Every layer's output is replaced in one forward pass: what a layer reads comes from the replacements before it, its
features are computed from that, and it writes what the features of all layers so far say. An activation that ranks the
features of all layers together sees, for layers that are still to come, what the unchanged model reads there.

Positions that are no training data (the first of a text, special tokens) keep the model's own MLPs.

Shapes: R positions, L layers, D d_model, F features per layer, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor

from clt_plugins.contract.abilities import Thresholded
from clt_plugins.data.features import Features, Pairs
from clt_plugins.errors import Refused

if TYPE_CHECKING:
    from clt_plugins.contract.interfaces import LanguageModel
    from clt_plugins.model.transcoder import CrossLayerTranscoder

VARIANTS = ("transcoder", "with_errors", "mean", "zero")
"""What takes the place of the MLPs: the reconstruction; that plus the error it makes in the unchanged model, which
must give the unchanged model; the mean over the held-out text; nothing."""


class Replacement:
    """The reconstruction of each layer in turn, from what the layers read by then.

    Args:
        inputs: what the MLPs of the unchanged model read, raw, [R, L, D].
    """

    def __init__(self, transcoder: CrossLayerTranscoder, inputs: Tensor):
        self.transcoder = transcoder
        self.raw = inputs.clone()
        self.token: list[Tensor] = []
        self.feature: list[Tensor] = []
        self.values: list[Tensor] = []
        shape = len(inputs), transcoder.n_layers, transcoder.W_enc.shape[1]
        self.acts = inputs.new_zeros(shape) if transcoder.runs_dense else None

    @torch.no_grad()
    def __call__(self, layer: int, inputs: Tensor) -> Tensor:
        """What the transcoder writes at a layer that reads `inputs` [R, D]; [R, D]. Call it for each layer in turn."""
        self.raw[:, layer] = inputs
        x = self.transcoder.normaliser.inputs(self.raw)
        features = self._dense(x, layer) if self.acts is not None else self._sparse(x, layer)
        return self.transcoder.normaliser.restore(self.transcoder.reconstruct(features, x))[:, layer]

    def _dense(self, x: Tensor, layer: int) -> Features:
        assert self.acts is not None
        self.acts[:, layer] = self.transcoder.encode_normalised(x).features.dense()[:, layer]
        return Features(self.acts)

    def _sparse(self, x: Tensor, layer: int) -> Features:
        """The features of layers up to this one, those of earlier ones as they were."""
        transcoder = self.transcoder
        activation = transcoder.activation
        layers, width = transcoder.n_layers, transcoder.W_enc.shape[1]
        if isinstance(activation, Thresholded):
            weight = transcoder.W_enc[layer].to(x.dtype)
            pre = torch.addmm(transcoder.b_enc[layer].to(x.dtype), x[:, layer], weight.T)
            token, number = (pre > activation.threshold()[layer].to(pre)).nonzero(as_tuple=True)
            feature = layer * width + number
            values = activation(pre[token, number], feature)
        else:
            found = transcoder.encode_normalised(x).features
            assert found.pairs is not None
            own = found.pairs.layer == layer
            token, feature, values = found.pairs.token[own], found.pairs.feature[own], found.values[own]
        for kept, new in ((self.token, token), (self.feature, feature), (self.values, values)):
            kept.append(new)
        token, feature, values = torch.cat(self.token), torch.cat(self.feature), torch.cat(self.values)
        order = torch.argsort(token * (layers * width) + feature)
        pairs = Pairs(token[order], feature[order], len(x), layers, width)
        return Features(values[order], pairs)


@attrs.define(eq=False)
class Sums:
    """Adds up over positions what a variant's logits say."""

    cross_entropy: float = 0.0
    kl: float = 0.0
    """KL(model ‖ variant)."""
    agreed: int = 0
    """Positions where both think the same token the likeliest."""
    largest_difference: float = 0.0
    """Of a logit, from the model's."""

    def add(self, logits: Tensor, model: Tensor, wanted: Tensor) -> None:
        """Take logits [R, V] into account, beside the model's, at positions where `wanted` [R] follows."""
        log_p, log_q = model.log_softmax(-1), logits.log_softmax(-1)
        self.cross_entropy -= float(log_q.gather(1, wanted[:, None]).double().sum())
        self.kl += float((log_p.exp() * (log_p - log_q)).sum(-1).double().sum())
        self.agreed += int((logits.argmax(-1) == model.argmax(-1)).sum())
        self.largest_difference = max(self.largest_difference, float((logits - model).abs().max()))


@torch.no_grad()
def evaluate_in_model(
    transcoder: CrossLayerTranscoder, model: LanguageModel, tokens: int, mean: Tensor
) -> dict[str, Any]:
    """Cross-entropy (nats per token), KL and top-1 agreement of the model with its MLPs replaced.

    Args:
        tokens: how many held-out positions to read at most.
        mean: of the MLPs' outputs, [L, D], for mean-ablation.

    Returns:
        `tokens`; by variant ("model" is the unchanged one) `cross_entropy`, `kl` and `top1`; `ce_recovered` and
        `ce_recovered_of_mean`, the share of the cross-entropy that zero- and mean-ablation lose that the transcoder
        saves (None where they lose none); and `largest_logit_error_with_errors`.

    Raises:
        ValueError: no held-out text is long enough for a next token.
    """
    sums = {name: Sums() for name in ("model", *VARIANTS)}
    count = 0
    device = transcoder.normaliser.input_shift.device
    for text in model.held_out(tokens):
        inputs: list[Tensor] = []
        outputs: list[Tensor] = []

        def watch(_: int, read: Tensor, written: Tensor, inputs=inputs, outputs=outputs) -> None:
            inputs.append(read)
            outputs.append(written)

        wanted = model.following(text)
        ends = wanted >= 0
        if not bool(ends.any()):
            continue
        truth = model.run(text, watch)
        ends = ends.to(truth.device)
        wanted = wanted.to(truth.device)[ends]
        truth = truth[ends]
        count += len(wanted)
        sums["model"].add(truth, truth, wanted)
        clean = torch.stack(inputs, 1).to(device, torch.float32)
        written = torch.stack(outputs, 1).to(device)
        for name, replace in _variants(transcoder, clean, written, mean.to(device)):
            sums[name].add(model.run(text, replace)[ends], truth, wanted)
    if not count:
        raise Refused("evaluate.model_tokens", "no held-out text among so many tokens has a token after another")
    entropy = {name: each.cross_entropy / count for name, each in sums.items()}
    return {
        "tokens": count,
        "cross_entropy": entropy,
        "kl": {name: each.kl / count for name, each in sums.items()},
        "top1": {name: each.agreed / count for name, each in sums.items()},
        "ce_recovered": _recovered(entropy, "zero"),
        "ce_recovered_of_mean": _recovered(entropy, "mean"),
        "largest_logit_error_with_errors": sums["with_errors"].largest_difference,
    }


Replace = Callable[[int, Tensor, Tensor], Tensor]


def _variants(
    transcoder: CrossLayerTranscoder, inputs: Tensor, outputs: Tensor, mean: Tensor
) -> Iterator[tuple[str, Replace]]:
    """What to put in the place of the MLPs of one text, by the variant's name; `inputs` and `outputs` [R, L, D] are the
    unchanged model's."""
    replaced = Replacement(transcoder, inputs)
    yield "transcoder", lambda layer, read, _: replaced(layer, read.to(inputs))
    again = Replacement(transcoder, inputs)
    # In float64 the two add up to the model's own output to the last bit, as long as features are the same.
    errors = outputs.double() - transcoder(inputs).double()
    yield "with_errors", lambda layer, read, _: again(layer, read.to(inputs)).double() + errors[:, layer]
    yield "mean", lambda layer, read, written: mean[layer].to(written).expand_as(written)
    yield "zero", lambda layer, read, written: torch.zeros_like(written)


def _recovered(entropy: dict[str, float], ablation: str) -> float | None:
    lost = entropy[ablation] - entropy["model"]
    return (entropy[ablation] - entropy["transcoder"]) / lost if lost > 0 else None
