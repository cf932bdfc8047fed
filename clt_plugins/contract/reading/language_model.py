"""The language model of a source that `HasModel` or `TrainsInModel`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor


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


class TrainableModel(LanguageModel, Protocol):
    """The language model of a source that `TrainsInModel`: gradients flow through it. Its own weights get none."""

    def lengths(self, text: Any) -> list[int]:
        """How many of the positions [R] each context of the text has, in their order."""

    def logits(self, text: Any, replace: Callable[[int, Tensor, Tensor], Tensor | None] | None = None) -> Tensor:
        """Like `run`, [R, V] in float32 at least; differentiable in what `replace` returns."""


@runtime_checkable
class ReadsResidual(Protocol):
    """A `LanguageModel` that tells what reads its residual stream: then a report can say what features do to logits and
    to later features.

    Norms are folded into what follows them, but for their division by σ(x), which differs from token to token: the root
    of the mean square of x, without its mean where the norm is a LayerNorm; 1 where there is no norm.

    Shapes: F rows, V vocabulary.
    """

    def unembedding(self) -> Tensor:
        """U [V, D] float32: logits are x Uᵀ / σ(x) and a constant, x being the residual stream after the last layer.

        A cap of the logits is left out.

        Raises:
            Refused: the model computes its logits in another way; names it.
        """

    def residual_rows(self, layer: int, rows: Tensor) -> Tensor:
        """Rows [F, D] that read the transcoder's inputs of a layer -> rows that read the residual stream there.

        Products of both are the same but for σ(x) and a constant. Rows stay as they are where no norm lies between.
        """


@runtime_checkable
class SpellsBytes(Protocol):
    """A `LanguageModel` that knows the bytes of each token: of some vocabularies, a token may be a part of a character,
    which has no text of its own."""

    def spell_bytes(self, ids: Sequence[int]) -> list[bytes]:
        """The bytes of each token. Those of neighbouring tokens, joined, are the text in UTF-8."""
