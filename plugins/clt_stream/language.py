"""The language model of a stream, run on whole texts, with its MLPs watched or replaced.

Shapes: C contexts, T tokens in the longest, R positions that count, D d_model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor

from clt_plugins import Refused
from clt_stream.contexts import Contexts, Packer
from clt_stream.residual import Readers
from clt_stream.spelling import spelling
from clt_stream.taps import Act, Site, hooked

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Replace = Callable[[int, Tensor, Tensor], Tensor | None]

LARGEST_LOGITS = 2**26
"""A forward pass computes at most this many logits (256 MB in float32)."""


class StreamLanguageModel:
    """A `TrainableModel`: runs a model on the held-out text of a stream, or on contexts to train on. It also
    `ReadsResidual` and `SpellsBytes`.

    Args:
        sites: what the transcoder reads and what it predicts, layer by layer.
        packer: makes the held-out contexts, for a number of contexts per forward pass.
        contexts: contexts in a forward pass of the stream, C.
        length: tokens in each, T.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        sites: Sequence[tuple[Site, Site]],
        d_model: int,
        packer: Callable[[int], Packer],
        tokenizer: Any,
        *,
        contexts: int,
        length: int,
    ):
        self.model, self.sites = model, sites
        self.n_layers, self.d_model = len(sites), d_model
        embeddings: Any = model.get_input_embeddings()
        self.packer, self.tokenizer = packer, tokenizer
        self.contexts = max(1, min(contexts, LARGEST_LOGITS // (length * embeddings.weight.shape[0])))

    def held_out(self, tokens: int) -> Iterator[Contexts]:
        """Held-out contexts with at most `tokens` positions that count, the same ones at each call."""
        packer = self.packer(self.contexts)
        while tokens > 0 and (contexts := packer.next()) is not None:
            rows = contexts.rows[:tokens]
            tokens -= len(rows)
            yield attrs.evolve(contexts, rows=rows)

    def spell(self, ids: Sequence[int]) -> list[str]:
        """The text of each token, on its own."""
        return [self.tokenizer.decode([number]) for number in ids]

    def spell_bytes(self, ids: Sequence[int]) -> list[bytes]:
        """See `SpellsBytes`."""
        return self._spelling(ids)

    @cached_property
    def _spelling(self) -> Callable[[Sequence[int]], list[bytes]]:
        return spelling(self.tokenizer)

    def following(self, text: Contexts) -> Tensor:
        """The token after each position that counts, [R]; -1 at the end of a piece of text."""
        length = text.ids.shape[1]
        after = torch.full_like(text.ids, -1)
        # The next token belongs to the same piece if its position is the next one.
        continues = text.position_ids[:, 1:] == text.position_ids[:, :-1] + 1
        if text.attention_mask is not None:
            continues &= text.attention_mask[:, 1:] == 1
        after[:, : length - 1] = torch.where(continues, text.ids[:, 1:], -1)
        return after.flatten()[text.rows]

    def lengths(self, text: Contexts) -> list[int]:
        """How many positions of each context count."""
        count, length = text.ids.shape
        return torch.bincount(text.rows // length, minlength=count).tolist()

    @torch.inference_mode()
    def run(self, text: Contexts, replace: Replace | None = None) -> Tensor:
        """Logits at the positions that count, [R, V] float32; `replace` as in `LanguageModel.run`.

        Raises:
            Refused: a layer's output is computed before its input.
        """
        return self.logits(text, replace)

    def logits(self, text: Contexts, replace: Replace | None = None) -> Tensor:
        """Like `run`, differentiable in what `replace` returns: [R, V] in float32 at least."""
        device = self.model.device
        rows = text.rows.to(device)
        kwargs: dict[str, Any] = {"position_ids": text.position_ids.to(device), "use_cache": False}
        if text.attention_mask is not None:
            kwargs["attention_mask"] = text.attention_mask.to(device)
        acts: list[tuple[Site, Act]] = []
        if replace is not None:
            for layer, (read, written) in enumerate(self.sites):
                swap = _Swap(layer, read, written, rows, replace)
                acts += [(read, swap.keep), (written, swap.replaced)]
        with hooked(self.model, acts):
            logits = self.model(text.ids.to(device), **kwargs).logits
        return logits.flatten(0, 1)[rows].to(torch.promote_types(logits.dtype, torch.float32))

    def unembedding(self) -> Tensor:
        """See `ReadsResidual`."""
        return self._readers.unembedding()

    def residual_rows(self, layer: int, rows: Tensor) -> Tensor:
        """See `ReadsResidual`."""
        return self._readers.residual_rows(layer, rows)

    @cached_property
    def _readers(self) -> Readers:
        return Readers(self.model, self.sites)


class _Swap:
    """Keeps what one layer reads, and lets what it writes be replaced, at the rows that count."""

    def __init__(self, layer: int, read: Site, written: Site, rows: Tensor, replace: Replace):
        self.layer, self.read, self.written, self.rows, self.replace = layer, read, written, rows, replace
        self.inputs: Tensor | None = None

    def keep(self, value: Tensor) -> None:
        self.inputs = self.read.scaled(value.flatten(0, -2)[self.rows])

    def replaced(self, value: Tensor) -> Tensor | None:
        if self.inputs is None:
            raise Refused(
                "model.outputs",
                f"{str(self.written)!r} is computed before the transcoder's inputs, so it cannot be replaced: name "
                f"another module, or set stages.evaluate.model_tokens = 0",
            )
        flat = value.flatten(0, -2)
        new = self.replace(self.layer, self.inputs, self.written.scaled(flat[self.rows]))
        if new is None:
            return None
        if self.written.scale != 1:
            new = new / self.written.scale
        return flat.index_copy(0, self.rows, new.to(flat.device, flat.dtype)).view_as(value)
