"""What `[[metrics]]` builds: numbers of a training step, and of a pass over held-out tokens.

Shapes: B tokens, L layers, D d_model, F features per layer (of this rank).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import attrs

if TYPE_CHECKING:
    from torch import Tensor

    from clt_plugins.contract.results.scores import Scores
    from clt_plugins.contract.training.optimizer import Weight
    from clt_plugins.data.affine import Affine
    from clt_plugins.data.batch import Batch
    from clt_plugins.data.features import Features


@attrs.frozen(eq=False, kw_only=True)
class Step:
    """A training step that is done, as metrics and callbacks see it. Nothing in it may be changed; all is detached.

    What it says of tokens is of this data rank's share of the batch; what it says of features, of this tensor rank's.
    """

    number: int
    """Steps done, this one included."""
    batch: Batch
    """Raw activations, [B, L, D]."""
    targets: Tensor
    """[B, L, D], normalised."""
    features: Features
    """The active features and their values."""
    reconstruction: Tensor
    """[B, L, D], normalised; of all ranks together."""
    units: Affine
    """What the targets' normalised units are in raw ones: `units.raw(reconstruction - targets)` is the raw error."""
    variance: Tensor
    """Variance of the raw targets, [L]: mean over dimensions of the variance over tokens."""
    terms: Mapping[str, Tensor]
    """The terms of the loss, by name: scalars, a mean over this rank's tokens."""
    total: Tensor
    """Their sum."""
    counts: Tensor
    """At how many tokens of the batch, of all data ranks together, each feature was active, [L, F] int64."""
    idle_tokens: Tensor
    """Tokens since each feature was last active, [L, F] int64; 0 for those of this step."""
    gradient_norm: Tensor
    """2-norm of all gradients before clipping, of all ranks together; a scalar. For callbacks, NaN in steps without
    a log, an evaluation or a checkpoint, unless gradients are clipped."""
    rate: float
    """The learning rate."""
    weights: Sequence[Weight]
    """What is trained, after the step, with names and roles. `weight.parameter.grad` is the gradient of this step, None
    if it had none; scaled to `train.clip_norm`, unless the optimizer scales gradients as it reads them."""
    transcoder: Any
    """The `CrossLayerTranscoder`, after the step."""


class HeldOut(Protocol):
    """One pass over held-out tokens, for a metric."""

    def add(self, batch: Batch, features: Features, reconstruction: Tensor) -> None:
        """See one batch. A data rank sees whole batches, and other ones than other data ranks, perhaps fewer: sums over
        tokens wait for `result`. Ranks that share features see the same.

        Args:
            batch: raw activations, [B, L, D].
            reconstruction: in raw units, [B, L, D]; of all ranks together.
        """

    def result(self, scores: Scores) -> Mapping[str, Any]:
        """The numbers of all tokens and all ranks, by name; called on every rank. The run logs them as `eval/NAME`.

        Args:
            scores: what the engine has measured in this pass, of all ranks.
        """


class Metric(Protocol):
    """Numbers that a run logs: plain numbers, tensors [L] (a value per layer), or [L, F of all ranks] (a histogram).

    Every rank calls it, and all get the same numbers: what is of tokens is added up by `parallel.total(x,
    over="tokens")`, what is of features by `parallel.total(x)`. It must not change what it is given.
    """

    def step(self, step: Step) -> Mapping[str, Any]:
        """Numbers of one training step by `group/name`; called every `train.log_every` steps, where numbers may be read
        back from the device."""

    def held_out(self) -> HeldOut | None:
        """Begins a pass over held-out tokens; None if it measures nothing there. Called every `train.eval_every` steps,
        on every rank."""
