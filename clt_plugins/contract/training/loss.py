"""What `[[losses]]` builds: terms of the training loss.

A loss with parameters or buffers of its own is a `torch.nn.Module`: they are trained, clipped, saved and resumed like
the transcoder's; plain data by `Stateful`. A parameter with one entry or row per feature says along which axis, by
`clt_plugins.parameter(value, feature_axis)`, so that it can be split over ranks and its slices saved.

Shapes: B tokens, L layers, D d_model, F features per layer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import attrs

if TYPE_CHECKING:
    from torch import Tensor

    from clt_plugins.contract.model.activation import Selection
    from clt_plugins.data.affine import Affine
    from clt_plugins.data.batch import Batch
    from clt_plugins.data.features import Features


@attrs.frozen(eq=False, kw_only=True)
class ModelPass:
    """The language model on some training text, unchanged and with the transcoder in the place of its MLPs.

    Shapes: R positions that a next token follows, V vocabulary.
    """

    logits: Tensor
    """With the transcoder, [R, V]; differentiable in the transcoder's parameters."""
    unchanged: Tensor
    """Of the model as it is, [R, V]; constants."""
    next_tokens: Tensor
    """The token id after each position, [R] int64."""
    mean: Callable[[Tensor], Tensor]
    """The mean of a number per position, [R], over the positions of all data ranks; differentiable."""


@attrs.frozen(eq=False, kw_only=True)
class Share:
    """The tokens whose error this rank computes: the batch, or a part of it where the ranks that share its features
    split its tokens (see `SplitsTokens`). b tokens, as many on each of these ranks; in normalised units."""

    targets: Tensor
    """[b, L, D]."""
    reconstruction: Tensor
    """[b, L, D]; of the features of all ranks."""
    decode: Callable[[Features], Tensor]
    """`Forward.decode` of features of the whole batch, for these tokens: [b, L, D]."""
    mean: Callable[[Tensor], Tensor]
    """The mean of what each rank has computed of its share, over these ranks: of the whole batch. Differentiable."""


@attrs.frozen(eq=False)
class Forward:
    """One forward pass, as the losses see it. All tensors are in normalised units, except those of `batch`."""

    batch: Batch
    """Raw activations."""
    inputs: Tensor
    """[B, L, D]."""
    _targets: Tensor | Callable[[], Tensor]
    features: Features
    _reconstruction: Tensor | Callable[[], Tensor]
    units: Affine
    """What the targets' normalised units are in raw ones: `units.raw(reconstruction - targets)` is the raw error."""
    variance: Tensor
    """Variance of the raw targets, [L]: mean over dimensions of the variance over tokens."""
    norms: Callable[[], Tensor]
    """Returns the decoder norms [L, F], detached; computed once per step, at the first call."""
    idle_tokens: Tensor
    """Tokens since each feature was last active, [L, F] int64."""
    decode: Callable[[Features], Tensor]
    """Decodes other features (AuxK), summed over ranks: [B, L, D], without bias or skip."""
    sum_features: Callable[[Tensor], Tensor]
    """The sum over the ranks that share the features; apply it to what a term sums over features. Differentiable."""
    extra: Features | None
    """The pre-activations that this loss's `selection` kept, negative ones too, and -inf for empty pairs (on a GPU);
    None without a selection."""
    pre: Tensor | None
    """All pre-activations [B, L, F], where a loss of the recipe says `needs_pre = True`; else None."""
    progress: float
    """The share of the training steps that are done, 0 to 1."""
    step: int
    """Steps done, from 0 up to `steps`; for a `Schedule`: `schedule(forward.step, forward.steps, weight)`."""
    steps: int
    """The steps that schedules go over (`train.schedule_steps`, else all of the run)."""
    steps_done: int
    """Steps done; goes on beyond `steps` where the run does. For what is drawn anew in each step."""
    _active: Callable[[], Tensor] | None = None
    """What the activation says that `CountsActive`."""
    model: ModelPass | None = None
    """The language model with the transcoder in it, for a loss that `RunsModel`, in the steps in which it does; else
    None."""
    _share: Share | None = None

    @property
    def targets(self) -> Tensor:
        """[B, L, D]."""
        return made(self._targets)

    @property
    def reconstruction(self) -> Tensor:
        """[B, L, D]; of all ranks together. Where ranks split the tokens it is put together at the first call, so all
        of them must ask for it."""
        return made(self._reconstruction)

    def share(self) -> Share:
        """The tokens whose error this rank computes, for a loss that is a mean over tokens. Where ranks split them,
        each does a part of the work, and none needs the whole reconstruction."""
        if self._share is not None:
            return self._share
        return Share(targets=self.targets, reconstruction=self.reconstruction, decode=self.decode, mean=lambda x: x)

    def active(self) -> Tensor:
        """1 for each of `features.values` that is active, else 0; in their type. It has a gradient where the activation
        `CountsActive` (JumpReLU)."""
        return self.features.active() if self._active is None else self._active()


def made(value: Tensor | Callable[[], Tensor]) -> Tensor:
    """A tensor that may be made only when it is asked for."""
    return value() if callable(value) else value


class Loss(Protocol):
    """A term of the training loss. It may also be one that `RunsModel`: then it gets the language model's logits."""

    needs_pre: bool
    """Whether `Forward.pre` is needed. It keeps all of [B, L, F] in memory: use a selection where that is enough."""

    def selection(self, tokens: int, idle_tokens: Tensor) -> Selection | None:
        """A selection of this loss, fed by the same encoder pass as the activation's; None for most losses."""

    def __call__(self, forward: Forward) -> Mapping[str, Tensor]:
        """The term, or several, by name, each a scalar, already weighted; logged under `loss/`."""


# -- what may be besides: the engine asks by `isinstance` -----------------------------------------------------------


@runtime_checkable
class Steered(Protocol):
    """A penalty on active features: with more weight, fewer are. The engine multiplies its terms by a factor where the
    activation `AimsAtL0`."""

    steered: Collection[str]
    """The names of the terms that are multiplied; none if this loss is not to be steered."""


@runtime_checkable
class RunsModel(Protocol):
    """A loss that needs the language model, run on whole texts with the transcoder in the place of its MLPs.

    It gets `Forward.model` in the steps for which `runs` says so, None in the others. Losses that run in the same step
    share one pass, of as many contexts as the most demanding of them asks for.
    """

    contexts: int
    """Contexts of text in such a step, of all data ranks together."""

    def runs(self, step: int, progress: float) -> bool:
        """Whether it runs the model in a step; the answer follows from the arguments alone, so that all ranks agree.

        Args:
            step: counted from 1.
            progress: the share of the training steps that are done, 0 to 1, as `Forward.progress`.
        """
