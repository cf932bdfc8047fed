"""What `[source]` builds: a stream of activations.

Shapes: L layers, D d_model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import attrs

if TYPE_CHECKING:
    from torch import Tensor

    from clt_plugins.contract.reading.language_model import LanguageModel, TrainableModel
    from clt_plugins.data.batch import Batch


class Source(Protocol):
    """An endless, resumable stream of activation batches.

    It may also be `Closable`, `Buffered` (then a plan counts its memory), `Identified` (then a run is resumed only on
    the same data), and `HasModel` (then a transcoder can be evaluated inside the language model).
    """

    n_layers: int
    d_model: int

    def next(self) -> Batch:
        """The next training batch, of exactly `context.batch_tokens` tokens (divided by the data ranks).

        Raises:
            Refused: there is no (more) data; says where the source looked.
        """

    def held_out(self, tokens: int) -> Iterator[Batch]:
        """Batches of tokens never trained on: `tokens` in total, or all there are.

        They are the same at each call and on any number of ranks, so cut by `context.batch_tokens`, not by a rank's
        share: ranks take them in turn.
        """

    def statistics(self) -> Mapping[str, Tensor] | None:
        """Stored statistics (`mean`, `std` [L, D] and `rms` [L], each under `inputs.` and `targets.`), or None:
        then they are estimated from the first batches. So they are for the normalisation `sqrt_d_model`, unless `norm`
        [L], the mean over tokens of a token's norm, is stored too."""

    def state(self) -> dict[str, Any]:
        """The position in the stream, as JSON; small for any size of the data."""

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from `state()`: the next batch is the one that would have come next, bit for bit."""


@attrs.frozen(kw_only=True)
class Outline:
    """What a plan has to know of a source; see `Spec.outline`. All numbers are those of one rank."""

    n_layers: int
    d_model: int
    row_bytes: int = 0
    """Bytes of one token in a batch, inputs and targets; 0 if it is not known."""
    buffer_bytes: Mapping[str, int] = attrs.field(factory=dict)
    """See `Buffered.buffer_bytes`."""
    model_bytes: int = 0
    """Weights of the language model on the transcoder's device."""
    pass_bytes: int = 0
    """What one of its forward passes needs besides, while no training step is under way."""
    text_tokens: int = 0
    """Positions of a context that losses which run the model get (`TrainsInModel`); 0 if there are none."""
    text_bytes: int = 0
    """What a pass through the model with gradients keeps of each context, with its logits and what is computed of
    them."""
    model_parameters: int = 0
    """Numbers of the language model that each token is multiplied by; 0 without a model, or if it is not known."""
    model_dtype: str = "float32"
    """The type that it runs in."""


# -- what may be besides: the engine asks by `isinstance` -----------------------------------------------------------


@runtime_checkable
class HasModel(Protocol):
    """A source that can run the language model on held-out text."""

    def language_model(self) -> LanguageModel:
        """The model, with the transcoder's layers to be replaced."""


@runtime_checkable
class TrainsInModel(Protocol):
    """A source whose language model can be trained through: it gives whole texts for the losses that run it.

    The texts are training data, never held out. Giving them changes no batch of `Source.next` and no `Source.state`.
    """

    def trainable_model(self) -> TrainableModel:
        """The model, with the transcoder's layers to be replaced."""

    def training_text(self, contexts: int, position: Any) -> tuple[Any, Any]:
        """This data rank's part of some contexts of text, as one text for the model; and the position after them.

        The parts of all data ranks are disjoint, and together the same contexts for any number of ranks. Each has at
        least one context, and each context a position that counts.

        Args:
            contexts: how many, of all data ranks together; at least one for each.
            position: None at first, then what the last call returned: small JSON, the same on every rank. Checkpoints
                hold it. The texts follow from it alone, so that a resumed run reads those that would have come next.
        """


@runtime_checkable
class Identified(Protocol):
    """A source that can say what its data are made from, whatever their path is called."""

    def identity(self) -> Mapping[str, str]:
        """What the data depend on, by the setting that names it: `{"source.text": "sha256 ... of 3 files"}`.

        The value follows from the content alone, not from paths, times or this machine. A run is resumed only where all
        values are the same as in its checkpoint; the settings themselves may then be spelled differently (a model that
        was moved).
        """


@runtime_checkable
class Buffered(Protocol):
    """A source that keeps activations in memory; a plan counts them."""

    def buffer_bytes(self) -> Mapping[str, int]:
        """Bytes at the peak of training, on this rank, by the device that they lie on, as a recipe would name it:
        "cpu", "cuda:1", or "auto" for the transcoder's."""


@runtime_checkable
class Closable(Protocol):
    """A source that holds threads, files or connections."""

    def close(self) -> None:
        """Release them; called when the run ends."""
