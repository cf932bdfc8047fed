"""A language model evaluated with a transcoder in the place of its MLPs: every layer's output is replaced in one
forward pass (`Replacement`).

Positions that are no training data (the first of a text, special tokens) keep the model's own MLPs.

Shapes: R positions, L layers, D d_model, F features per layer, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import attrs
import torch
from torch import Tensor

from clt_plugins import Refused, Replacement

if TYPE_CHECKING:
    from clt_plugins import CrossLayerTranscoder, LanguageModel


@attrs.frozen(kw_only=True)
class ByVariant:
    """A number for each of the things that stand in the place of the MLPs; None where it is not finite."""

    model: float | None
    """The MLPs themselves: the unchanged model."""
    transcoder: float | None
    """The transcoder's reconstruction."""
    with_errors: float | None
    """The reconstruction plus the error it makes in the unchanged model; it must give the unchanged model."""
    mean: float | None
    """The mean of the MLP's outputs over the held-out text (mean-ablation)."""
    zero: float | None
    """Zeros (zero-ablation)."""


VARIANTS = [a.name for a in attrs.fields(ByVariant)]


@attrs.frozen(kw_only=True)
class InModel:
    """What the language model loses when its MLPs are replaced."""

    tokens: int
    """Held-out positions that a next token follows."""
    cross_entropy: ByVariant
    """Of the next token, nats per token."""
    kl: ByVariant
    """KL(unchanged model || variant), nats per token."""
    top1: ByVariant
    """Share of positions at which both find the same token likeliest."""
    ce_recovered: float | None = None
    """The share of the cross-entropy lost by zero-ablation that the transcoder saves; None where nothing is lost."""
    ce_recovered_of_mean: float | None = None
    """The share of the cross-entropy lost by mean-ablation that the transcoder saves; None where nothing is lost."""
    largest_logit_error_with_errors: float | None
    """The largest difference of a logit between `with_errors` and the unchanged model; None where it is not finite."""


@attrs.define(eq=False)
class Sums:
    """Sums over positions of how a variant's logits compare with the unchanged model's."""

    cross_entropy: float = 0.0
    kl: float = 0.0
    agreed: int = 0
    """Positions where both find the same token likeliest."""
    largest_difference: float = 0.0
    """Of a logit, from the model's."""

    def add(self, logits: Tensor, model: Tensor, next_tokens: Tensor) -> None:
        """Add positions.

        Args:
            logits: the variant's, [R, V].
            model: the unchanged model's logits, [R, V].
            next_tokens: the ids that follow, [R].
        """
        log_p, log_q = model.log_softmax(-1), logits.log_softmax(-1)
        self.cross_entropy -= float(log_q.gather(1, next_tokens[:, None]).double().sum())
        self.kl += float((log_p.exp() * (log_p - log_q)).sum(-1).double().sum())
        self.agreed += int((logits.argmax(-1) == model.argmax(-1)).sum())
        largest = float((logits - model).abs().max())
        # `max` would drop a NaN.
        if not math.isnan(self.largest_difference):
            self.largest_difference = largest if math.isnan(largest) else max(self.largest_difference, largest)

    def mean(self, name: str, count: int) -> float | None:
        """One of the sums per position; None where the variant's logits were not finite."""
        return getattr(self, name) / count if math.isfinite(self.cross_entropy + self.kl) else None


@torch.no_grad()
def evaluate_in_model(transcoder: CrossLayerTranscoder, model: LanguageModel, tokens: int, mean: Tensor) -> InModel:
    """Cross-entropy, KL and top-1 agreement of the language model with its MLPs replaced.

    Args:
        tokens: how many held-out positions to read at most.
        mean: of the MLPs' outputs, [L, D], for mean-ablation.

    Raises:
        Refused: no held-out text is long enough for a next token.
    """
    sums = {variant: Sums() for variant in VARIANTS}
    count = 0
    device = transcoder.target_variance.device
    for text in model.held_out(tokens):
        next_tokens = model.following(text)
        followed = next_tokens >= 0
        if not bool(followed.any()):
            continue
        inputs: list[Tensor] = []
        outputs: list[Tensor] = []

        def watch(_: int, read: Tensor, written: Tensor, inputs=inputs, outputs=outputs) -> None:
            inputs.append(read)
            outputs.append(written)

        logits = model.run(text, watch)
        followed = followed.to(logits.device)
        next_tokens = next_tokens.to(logits.device)[followed]
        logits = logits[followed]
        count += len(next_tokens)
        sums["model"].add(logits, logits, next_tokens)
        read, written = torch.stack(inputs, 1).to(device, torch.float32), torch.stack(outputs, 1).to(device)
        for variant, replace in _replacements(transcoder, read, written, mean.to(device)):
            sums[variant].add(model.run(text, replace)[followed], logits, next_tokens)
    if not count:
        raise Refused("stages.evaluate.model_tokens", f"among {tokens} held-out tokens none has a next token: raise it")
    entropy, kl, top1 = (
        ByVariant(**{variant: of.mean(name, count) for variant, of in sums.items()})
        for name in ("cross_entropy", "kl", "agreed")
    )
    largest = sums["with_errors"].largest_difference
    return InModel(
        tokens=count,
        cross_entropy=entropy,
        kl=kl,
        top1=top1,
        ce_recovered=_recovered(entropy, entropy.zero),
        ce_recovered_of_mean=_recovered(entropy, entropy.mean),
        largest_logit_error_with_errors=largest if math.isfinite(largest) else None,
    )


Replace = Callable[[int, Tensor, Tensor], Tensor]
"""(layer, what its MLP reads [R, D], what it writes [R, D]) -> what is written in its place [R, D]."""


def _replacements(
    transcoder: CrossLayerTranscoder, inputs: Tensor, outputs: Tensor, mean: Tensor
) -> Iterator[tuple[str, Replace]]:
    """The variants of one text, each with what replaces its MLPs.

    Args:
        inputs: what the MLPs of the unchanged model read, [R, L, D].
        outputs: what they wrote, [R, L, D].
        mean: [L, D].
    """
    reconstruction = Replacement(transcoder, inputs)
    yield "transcoder", lambda layer, read, _: reconstruction(layer, read.to(inputs))
    again = Replacement(transcoder, inputs)
    # In float64 the two add up to the model's own output to the last bit, as long as features are the same. So they are
    # computed by the same steps: in another order, sums round otherwise.
    unchanged = Replacement(transcoder, inputs)
    made = torch.stack([unchanged(layer, inputs[:, layer]) for layer in range(transcoder.n_layers)], 1)
    errors = outputs.double() - made.double()
    yield "with_errors", lambda layer, read, _: again(layer, read.to(inputs)).double() + errors[:, layer]
    yield "mean", lambda layer, read, written: mean[layer].to(written).expand_as(written)
    yield "zero", lambda layer, read, written: torch.zeros_like(written)


def _recovered(entropy: ByVariant, ablated: float | None) -> float | None:
    if ablated is None or entropy.model is None or entropy.transcoder is None:
        return None
    lost = ablated - entropy.model
    return (ablated - entropy.transcoder) / lost if lost > 0 else None
