"""The training loss of a batch: one forward pass, read by every term.

Shapes: B tokens, L layers, D d_model, F features per layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial

import attrs
from torch import Tensor

from clt_plugins.contract.training.loss import Forward, Loss, ModelPass, Steered, made
from clt_plugins.data.batch import Batch
from clt_plugins.data.features import Features
from clt_plugins.errors import Refused, WrongReturn
from clt_plugins.model.transcoder import CrossLayerTranscoder
from clt_plugins.training.step.shares import own_tokens, share_of, whole


def _terms(loss: Loss, forward: Forward) -> Mapping[str, Tensor]:
    """The terms that a loss returns.

    Raises:
        WrongReturn: it returned something else than scalar tensors by name.
    """
    terms = loss(forward)
    if isinstance(terms, Mapping) and all(isinstance(x, Tensor) and x.dim() == 0 for x in terms.values()):
        return terms
    got: object = terms
    if isinstance(terms, Mapping):
        got = {name: list(getattr(x, "shape", [])) or x for name, x in terms.items()}
    raise WrongReturn(loss, f"a loss must return scalar tensors by name, {type(loss).__name__} returned {got!r:.200}")


@attrs.frozen(eq=False)
class Totals:
    """A batch's loss."""

    total: Tensor
    """The sum of the terms, a scalar to call `backward` on."""
    terms: dict[str, Tensor]
    """Each term, detached."""


@attrs.frozen(eq=False)
class Outcome(Totals):
    """A batch's loss and what it came from."""

    features: Features
    _reconstruction: Tensor | Callable[[], Tensor]
    _targets: Tensor | Callable[[], Tensor]

    @property
    def reconstruction(self) -> Tensor:
        """[B, L, D], normalised, detached. All ranks must ask for it: see `Forward.reconstruction`."""
        return made(self._reconstruction).detach()

    @property
    def targets(self) -> Tensor:
        """[B, L, D], normalised."""
        return made(self._targets)

    def totals(self) -> Totals:
        """The loss alone, which keeps nothing of the pass in memory."""
        return Totals(self.total.detach(), self.terms)


def objective(
    transcoder: CrossLayerTranscoder,
    losses: Sequence[Loss],
    batch: Batch,
    idle_tokens: Tensor,
    progress: float,
    passes: Sequence[ModelPass | None] | None = None,
    factor: Tensor | None = None,
) -> Outcome:
    """The loss of a batch of raw activations.

    Args:
        idle_tokens: tokens since each feature was last active, [L, F] int64.
        progress: steps done, as a share of all.
        passes: what each loss gets of the language model; nothing if not given.
        factor: what steered terms are multiplied by, a scalar (see `Steering`); 1 if not given.

    Raises:
        Refused: two losses give a term of the same name.
    """
    normaliser, parallel = transcoder.normaliser, transcoder.context.parallel
    # All losses see one forward pass: a loss that needs other pairs (AuxK) has them selected in the same encoder pass.
    x = normaliser.inputs(batch.inputs)
    encoded = transcoder.encode_normalised(
        x,
        [loss.selection(batch.tokens, idle_tokens) for loss in losses],
        keep_pre=any(loss.needs_pre for loss in losses),
    )
    # Summed over tensor ranks once, here: for all losses.
    own, share = own_tokens(parallel, batch.tokens), None
    targets: Tensor | Callable[[], Tensor]
    reconstruction: Tensor | Callable[[], Tensor]
    if own is None:
        targets = normaliser.targets(batch.targets)
        reconstruction = transcoder.reconstruct(encoded.features, x)
    else:
        share = share_of(transcoder, own, encoded.features, x, batch.targets)
        targets = cache(partial(normaliser.targets, batch.targets))
        reconstruction = cache(partial(whole, share.reconstruction, own, parallel))
    # Decoder norms cost a pass over the decoder: at most once per step, and only if a loss asks.
    norms = cache(transcoder.tying.norms)
    terms: dict[str, Tensor] = {}
    steps = transcoder.context.schedule_steps
    step = round(progress * steps)
    for loss, extra, model in zip(losses, encoded.extras, passes or [None] * len(losses), strict=True):
        forward = Forward(
            batch=batch,
            inputs=x,
            targets=targets,
            features=encoded.features,
            reconstruction=reconstruction,
            units=normaliser.units(),
            variance=transcoder.target_variance,
            norms=norms,
            idle_tokens=idle_tokens,
            decode=transcoder.decode_normalised,
            sum_features=parallel.sum_features,
            extra=extra,
            pre=encoded.pre,
            progress=progress,
            step=step,
            steps=steps,
            steps_done=step if transcoder.step is None else transcoder.step,
            active=encoded.active,
            model=model,
            share=share,
        )
        steered = loss.steered if factor is not None and isinstance(loss, Steered) else ()
        for name, value in _terms(loss, forward).items():
            if name in terms:
                raise Refused("losses", f"two of them give a term {name!r}: use each loss once")
            terms[name] = value * factor.to(value.dtype) if factor is not None and name in steered else value
    # Losses return weighted terms, so the total is their plain sum, and every logged term is what was added.
    total = sum(terms.values(), start=x.new_zeros(()))
    detached = {name: value.detach() for name, value in terms.items()}
    return Outcome(total, detached, encoded.features, reconstruction, targets)
