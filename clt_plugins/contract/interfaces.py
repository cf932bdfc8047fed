"""What `build` returns for each kind of choice: the protocols, with shapes.

Nothing here needs to be inherited from. Activations and tyings are `torch.nn.Module`s. A loss with parameters or
buffers of its own is one too: they are trained, clipped, saved and resumed like the transcoder's. A parameter with one
entry or row per feature says along which axis, by `clt_plugins.parameter(value, feature_axis)`, so that it can be split
over ranks and its slices saved. Optional abilities are in `abilities`.

Shapes: B tokens, L layers, D d_model, F features per layer, N pairs, R rows of a weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal, Protocol

import attrs

if TYPE_CHECKING:
    from torch import Tensor

    from clt_plugins.contract.select import Per, Select
    from clt_plugins.data.batch import Batch
    from clt_plugins.data.features import Features, Pairs
    from clt_plugins.data.layout import Layout

Over = Literal["features", "tokens", "all"]
"""The ranks that a collective sums over."""


class Selection(Protocol):
    """Chooses pairs while the pre-activations of a batch pass by, one layer at a time."""

    def see(self, layer: int, pre: Tensor) -> None:
        """Read one layer's pre-activations [B, F], without gradient; the block is shared, then overwritten."""

    def finish(self) -> tuple[Pairs, Tensor]:
        """After the last layer: the pairs, and the pre-activation of each, [N]; -inf for a pair that is empty."""


class Activation(Protocol):
    """Turns pre-activations into features: which pairs are kept, and the value of each.

    It may also be `Thresholded` (then it can be exported, and encoded a layer at a time), `Settable` (then it can be
    converted to) and `Scheduled` (then it changes over a run).
    """

    fixed_size: bool
    """Whether `selection` keeps the same number of pairs in every batch (TopK), or as many as pass (ReLU).
    The second kind runs dense while its features are."""

    def selection(self, tokens: int, norms: Callable[[], Tensor]) -> Selection:
        """Start on a batch of B tokens.

        Every pair whose value or gradient can be non-zero must be kept.

        Args:
            norms: returns the decoder norms [L, F], detached; it costs a pass over the decoder: call it only if needed.
        """

    def __call__(self, pre: Tensor, feature: Tensor | None) -> Tensor:
        """The value of each kept pair; differentiable, never negative.

        Args:
            pre: [N] with `feature`; or [B, L, F] without.
            feature: layer * F + f of each pair, [N]; None where `pre` is dense.
        """


class Tying(Protocol):
    """The decoder: which weights carry a feature of layer s to layer t >= s.

    It may also be `Shifted`.
    """

    def decode(self, features: Features) -> Tensor:
        """What the features write, [B, L, D], without bias or skip; features may be sparse or dense.

        A layer of it depends only on features of that layer and earlier ones. It must be a new tensor: bias and skip
        are added to it in place.
        """

    def affine(self, inputs: Tensor) -> Tensor:
        """What does not depend on features: bias and skip; broadcasts to [B, L, D]. `inputs` are normalised."""

    def norms(self) -> Tensor:
        """‖decoder‖ of each feature over all the layers it writes to, [L, F], detached."""

    def expand(self, layer: int) -> Tensor:
        """The decoder rows of one source layer as if untied, [F, L - layer, D], factors included, detached.

        A tying that adds something to active features before these rows is also `Shifted`.
        """

    def views(self) -> Mapping[str, tuple[str, Callable[[Tensor], Tensor], int | None]]:
        """How parameters are cut for files: name in files -> (parameter name, view of it, feature axis of the view)."""


@attrs.frozen(eq=False)
class Forward:
    """One forward pass, as the losses see it. All tensors are in normalised units, except those of `batch`."""

    batch: Batch
    """Raw activations."""
    inputs: Tensor
    """[B, L, D]."""
    targets: Tensor
    """[B, L, D]."""
    features: Features
    reconstruction: Tensor
    """[B, L, D]; of all ranks together."""
    scale: Tensor
    """Raw units per normalised unit of the targets, [L, D]: `(reconstruction - targets) * scale` is the raw error."""
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


class Loss(Protocol):
    """A term of the training loss."""

    needs_pre: bool
    """Whether `Forward.pre` is needed. It keeps all of [B, L, F] in memory: use a selection where that is enough."""

    def selection(self, tokens: int, idle_tokens: Tensor) -> Selection | None:
        """A selection of this loss, fed by the same encoder pass as the activation's; None for most losses."""

    def __call__(self, forward: Forward) -> Mapping[str, Tensor]:
        """The term, or several, by name, each a scalar, already weighted; logged under `loss/`."""


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
        """Batches of tokens never trained on, the same at each call: `tokens` in total, or all there are."""

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
    model_parameters: int = 0
    """Numbers of the language model that each token is multiplied by; 0 without a model, or if it is not known."""
    model_dtype: str = "float32"
    """The type that it runs in."""


class Logger(Protocol):
    """A sink of metrics. Only rank 0 has one. Must not block the training step for long."""

    def start(self, recipe: Mapping[str, Any], step: int) -> None:
        """Called before the first step.

        Args:
            recipe: resolved, as plain TOML data.
            step: > 0 for a resumed run; what the interrupted run logged after this step will be logged again.
        """

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Metrics by `group/name`: numbers; or CPU tensors [L] (one value per layer) and [L, F] (a histogram)."""

    def close(self, status: str) -> None:
        """Called at the end and after an error, with "finished", "interrupted" or "failed"; write what is buffered."""


class Kernels(Protocol):
    """Selection and sparse products for one kind of device. `layout` says which rows of a weight [R, D] a pair touches,
    and which layers of a dense [B, L, D] they belong to; `values` are [N], or [N, L] with a column per target layer.

    Sums are accumulated in at least float32 whatever the weight's type. Results do not depend on the number of
    threads. They may also be `Preferred` (then `kernels = "auto"` knows when to take them), compute `BothGradients` at
    once, and be `Updates` (then they compute Adam's update of bfloat16 weights and moments too).
    """

    name: str

    def select(self, tokens: int, n_layers: int, n_features: int, k: int, *, per: Per, capacity: int = 0) -> Select:
        """Start on a batch of B tokens.

        Args:
            n_features: F of this rank.
            k: how many are kept of each token (per "token") or of the whole batch (per "batch"); of all ranks together.
            capacity: places in a result of fixed size, where k needs fewer: B times as many per "token". So a k that
                falls from step to step changes no shape. Without meaning where a result is as long as what is kept.
        """

    def decode(self, values: Tensor, pairs: Pairs, layout: Layout, weight: Tensor, out: Tensor) -> None:
        """out[b, t] = sum over pairs at token b of value * their row for t. `out` [B, L, D] is overwritten."""

    def grad_values(self, grad: Tensor, pairs: Pairs, layout: Layout, weight: Tensor, out: Tensor) -> None:
        """out[n] = sum over targets t of grad[b, t] · row; one sum per target where `out` is [N, L], 0 if t < s."""

    def grad_rows(
        self, values: Tensor, pairs: Pairs, layout: Layout, dense: Tensor, out: Tensor, *, overwrite: bool
    ) -> None:
        """out[row] (+)= sum over pairs and targets of value * dense[b, t]. With `overwrite`, rows that no pair
        touches become 0: `out` [R, D] may hold anything before."""


class Parallel(Protocol):
    """How features (tensor parallel) and tokens (data parallel) are split over ranks (processes).

    Every method but `shard` and `apart` is a collective: all ranks must call it, in the same order. `over` says which
    ranks take part: those that share the "features" of a batch, those that share the "tokens" of a feature, or "all".
    """

    rank: int
    world: int
    tensor_rank: int
    tensor_ranks: int
    data_rank: int
    data_ranks: int
    batch_rank: int
    batch_ranks: int
    """Which part of how many parts of a batch this rank has: data_rank of data_ranks; 0 of 1 within `apart`."""

    def shard(self, n_features: int) -> range:
        """The features of each layer that this rank owns, of F; the shards of ranks follow each other."""

    def sum_features(self, x: Tensor) -> Tensor:
        """The sum over the ranks that share the features; the gradient passes through unchanged."""

    def sum_features_later(self, x: Tensor) -> Callable[[], Tensor]:
        """The same, started now; calling the result waits for the sum. What is computed in between overlaps."""

    def total(self, x: Tensor, over: Over = "features", what: str = "metrics") -> Tensor:
        """A detached sum over ranks. `what` names what `sent` counts the bytes as."""

    def reduce_gradients(self, parameters: list[Any]) -> None:
        """Average the gradients over the ranks that share the tokens; sum those of parameters that every tensor rank
        has all of but computes only a part of the gradient for (`parameter.partial_gradient`)."""

    def gather(self, text: str) -> list[str]:
        """Every rank's text, in the order of ranks."""

    def apart(self) -> AbstractContextManager[None]:
        """A block in which batches are not split over ranks: each group that shares features has its own batch."""

    def sent(self) -> dict[str, int]:
        """Bytes that this rank sent since the start, by purpose."""

    def barrier(self) -> None:
        """Wait for all ranks."""

    def close(self) -> None:
        """Leave the group, after training; what rank 0 does then is its own. May be called again."""


class Exporter(Protocol):
    """Writes a trained transcoder in another tool's format.

    It may also be one that `Checks`: then a format that cannot hold the transcoder is refused before training. A format
    that can be read back has a `Spec.reader`.
    """

    def export(self, transcoder: Any, folder: Any) -> None:
        """Write the files into an empty folder.

        Raises:
            Refused: the format cannot hold this transcoder; says why and what to do.
        """


@attrs.frozen(eq=False, kw_only=True)
class Imported:
    """A transcoder read from another tool's format."""

    kind: str
    """What it is, for people: "circuit-tracer folder with thresholds"."""
    n_layers: int
    d_model: int
    n_features: int
    activation: Mapping[str, Any]
    """The `[activation]` table that it amounts to."""
    tying: Mapping[str, Any]
    """The `[tying]` table."""
    model: Mapping[str, Any]
    """What is known of the language model, as in `[model]`."""
    tensor: Callable[[str], Tensor | None]
    """Returns a tensor of the transcoder by its name in files (`W_enc`, `W_dec.03`, `normaliser.input_scale`); called
    for one at a time. None leaves a statistic of the normaliser at its first value."""
    decoder_bytes: int = 0
    """Bytes of the decoder on disk."""
    decoder: Callable[[Any], Tying] | None = None
    """Makes, from a `Context`, a tying that leaves the decoder on disk."""


class LanguageModel(Protocol):
    """The language model of a source that `HasModel`; a transcoder can replace its MLPs.

    Shapes: R positions of a text that are evaluated (no padding, special tokens or first positions), V vocabulary.
    """

    n_layers: int
    d_model: int

    def held_out(self, tokens: int) -> Iterator[Any]:
        """Held-out texts of at most `tokens` positions in total, each for one forward pass."""

    def following(self, text: Any) -> Tensor:
        """The token id after each position, [R] int64; -1 where the text ends there."""

    def spell(self, ids: list[int]) -> list[str]:
        """The text of each token, on its own."""

    def run(self, text: Any, replace: Callable[[int, Tensor, Tensor], Tensor | None] | None = None) -> Tensor:
        """Logits at the evaluated positions, [R, V] float32.

        Args:
            replace: called for each layer in turn with (layer, what the MLP read [R, D], what it wrote [R, D]); what it
                returns replaces what was written, and later layers read that. Other positions keep what the model
                wrote.
        """
