"""Abilities that a plugin's object may have besides its protocol; the engine asks by `isinstance`.

Shapes: B tokens, L layers, D d_model, F features per layer, N pairs, R rows of a weight.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from clt_plugins.contract.model.parallel import Over
    from clt_plugins.contract.reading.language_model import LanguageModel, TrainableModel
    from clt_plugins.contract.results.exporter import Imported
    from clt_plugins.data.batch import Batch
    from clt_plugins.data.features import Pairs
    from clt_plugins.data.layout import Layout
    from clt_plugins.data.update import AdamUpdate


@runtime_checkable
class Thresholded(Protocol):
    """An activation that is exactly `pre where pre > θ, else 0`."""

    def threshold(self) -> Tensor:
        """θ, [L, F], detached."""


@runtime_checkable
class Settable(Protocol):
    """A thresholded activation that a transcoder can be converted to."""

    def set_threshold(self, threshold: Tensor) -> None:
        """Take θ [L, F].

        Raises:
            Refused: it cannot hold these thresholds; says why.
        """


@runtime_checkable
class Scheduled(Protocol):
    """An activation that changes over a run, such as a k that falls."""

    def schedule(self, progress: float) -> None:
        """Called before every training step with the share of the steps that are done.

        What it does in eval mode must not depend on it.
        """


@runtime_checkable
class CountsActive(Protocol):
    """An activation through which the number of active features can be trained, though it is no smooth function."""

    def active(self, pre: Tensor, feature: Tensor | None) -> Tensor:
        """1 for each pair that is active, else 0, with a gradient by the activation's parameters.

        Args:
            pre, feature: as `Activation.__call__` gets them.
        """


@runtime_checkable
class AimsAtL0(Protocol):
    """An activation whose L0 follows from what the losses train, and that has a number for it to reach.

    The engine multiplies the terms of `Steered` losses by a factor, which rises while L0 is above the number.
    """

    def target_l0(self, progress: float) -> float | None:
        """Active features per token, over all layers, that training aims at; None: it aims at nothing, in no step.

        Args:
            progress: the share of the training steps that are done, 0 to 1.
        """


@runtime_checkable
class Follows(Protocol):
    """An activation that `AimsAtL0`, and corrects L0 itself after each training step."""

    def follow(self, excess: Tensor) -> None:
        """Change what decides L0. Nothing may be read back from the device.

        Args:
            excess: log(L0 / target) of the step, and what is added for a drift, a scalar float64; the same on every
                rank.
        """


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


@runtime_checkable
class Shifted(Protocol):
    """A tying that adds something to active features before its decoder rows."""

    def shift(self, layer: int) -> Tensor | None:
        """What is added to the active features of a source layer, [F], or None.

        Raises:
            Refused: rows of one factor per feature and target cannot hold the tying; says why.
        """


@runtime_checkable
class OwnRows(Protocol):
    """A tying whose features have a row for their own layer that an encoder can share."""

    def own_rows(self) -> Tensor:
        """With what each feature writes to its own layer, factors included, [L, F, D]; differentiable."""


@runtime_checkable
class FeatureRows(Protocol):
    """A tying whose features have decoder rows of their own, so that callbacks can set and scale those of one."""

    def feature_rows(self, layer: int) -> tuple[str, Callable[[Tensor], Tensor]]:
        """The parameter that holds the rows of a source layer's features, and the view of it: [F, n, D].

        n is L - layer, a row for each target; or 1 where one row serves all targets. The view is also taken of tensors
        that have the parameter's shape, or length 1 instead of D.
        """


@runtime_checkable
class Observes(Protocol):
    """A normalisation that gathers statistics of its own, such as a covariance or quantiles."""

    def observe(self, batch: Batch) -> None:
        """Read a batch of raw activations, on the CPU; its numbers are shared and must not be changed.

        It is called before `fit` for the first batches of the run, and on each data rank for that rank's tokens:
        `fit` joins what the ranks gathered, by `context.parallel.total(x, over="tokens")`. All ranks are handed as many
        batches. What is gathered is no buffer, and not saved.
        """

    def observed_bytes(self) -> int:
        """Bytes of what is gathered on the transcoder's device, for a plan; asked on the device "meta"."""


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


@runtime_checkable
class Stateful(Protocol):
    """An object of a run that keeps plain data from step to step; a source has both methods by its protocol.

    Tensors need neither: parameters and buffers of a `torch.nn.Module` are saved anyway.
    """

    def state(self) -> Any:
        """What is to be saved in each checkpoint, as plain JSON data; the same on every rank."""

    def load_state(self, state: Any) -> None:
        """Go on from what `state` returned, on any number of ranks."""


@runtime_checkable
class SumsLater(Protocol):
    """A `Parallel` whose ranks can go on while a sum is under way; others wait for it at once."""

    def total_later(self, x: Tensor, over: Over = "features", what: str = "metrics") -> Callable[[], Tensor]:
        """`Parallel.total`, started now; calling the result waits for the sum."""


@runtime_checkable
class Sends(Protocol):
    """A `Parallel` whose ranks that share the features of a batch can each compute a part of what all of them need."""

    @property
    def connected(self) -> bool:
        """Whether there are other ranks: not in a plan, and not after `close`."""

    def send_later(self, x: Tensor, tensor_rank: int) -> Callable[[], None]:
        """Start to copy one rank's x into that of all that share features; calling the result waits for it."""


@runtime_checkable
class Preferred(Protocol):
    """Kernels that `kernels = "auto"` may take."""

    def preference(self, device: torch.device) -> int:
        """How well they suit a device; the highest number is taken. Kernels without this method count as 0."""


@runtime_checkable
class FixedSizes(Protocol):
    """Kernels that can select with sizes that do not follow the numbers; a plugin's selection need not look."""

    fixed: bool
    """Whether they do: on a GPU, where the host would have to wait for the number of what is kept."""


@runtime_checkable
class BothGradients(Protocol):
    """Kernels that compute both gradients of a product in one pass over the tokens' side."""

    def gradients(
        self,
        values: Tensor,
        pairs: Pairs,
        layout: Layout,
        weight: Tensor,
        dense: Tensor,
        grad_values: Tensor | None,
        grad_rows: Tensor,
        *,
        overwrite: bool,
        squares: Tensor | None = None,
        sums: Tensor | None = None,
    ) -> None:
        """What `Kernels.grad_values` and `Kernels.grad_rows` write, of the same dense tensor [B, L, D].

        Args:
            grad_values: [N], or [N, L] as `values`; None if only rows are wanted.
            grad_rows: [R, D].
            squares: [R] float32; gets the sum of squares of each row of `grad_rows` as it is stored afterwards. Without
                `overwrite`, those of rows that no pair touches stay.
            sums: [L * F] in at least float32; gets the sum of the values [N] of each feature: a bias's gradient.
        """


@runtime_checkable
class Updates(Protocol):
    """Kernels that update weights by Adam and read each number once; for others torch's operations do it."""

    def update_rows(self, update: AdamUpdate) -> None:
        """One step of Adam for some rows; `AdamUpdate` says what becomes of every number, but for the last digit.

        Nothing is read back from a GPU. Results do not depend on the number of threads.
        """


@runtime_checkable
class Checks(Protocol):
    """An exporter that can tell before training what its format could not hold."""

    def check(self, transcoder: Any) -> list[str]:
        """Complaints, each `setting: what is wrong: remedy`.

        Args:
            transcoder: as built, with thresholds where it is to be converted; its values mean nothing, and it may be
                on the device "meta".
        """


@runtime_checkable
class ReadsBack(Protocol):
    """An exporter that reads its format, so that `CrossLayerTranscoder.load` does.

    The engine asks the object that `Spec.reader` makes, without settings or a run.
    """

    def recognises(self, folder: Path) -> bool:
        """A quick look at the names of files: is it this format?"""

    def read(self, folder: Path) -> Imported:
        """What is in the folder.

        Raises:
            Refused: the files are not complete; says what is missing.
        """
