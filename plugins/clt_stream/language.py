"""The stream's language model on held-out text, its MLPs watched or replaced while it runs: an
`interfaces.LanguageModel`.

Shapes: C contexts, T tokens in the longest, R positions that count, D d_model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor

from clt_stream.contexts import Contexts, Packer
from clt_stream.sites import Site

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Replace = Callable[[int, Tensor, Tensor], Tensor | None]

LOGITS = 2**26
"""Numbers in the logits of one forward pass, at most (256 MB in float32)."""


class StreamLanguageModel:
    """Runs a model on the held-out text of a stream.

    Args:
        packer: makes the held-out contexts, so many in each forward pass.
        contexts, length: contexts in a forward pass of the stream, and tokens in each.
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
        self.contexts = max(1, min(contexts, LOGITS // (length * embeddings.weight.shape[0])))

    def held_out(self, tokens: int) -> Iterator[Contexts]:
        """Held-out contexts with at most so many positions that count, the same ones at each call."""
        packer = self.packer(self.contexts)
        while tokens > 0 and (contexts := packer.next()) is not None:
            rows = contexts.rows[:tokens]
            tokens -= len(rows)
            yield attrs.evolve(contexts, rows=rows)

    def spell(self, ids: Sequence[int]) -> list[str]:
        """The text of each token, on its own."""
        return [self.tokenizer.decode([number]) for number in ids]

    def following(self, text: Contexts) -> Tensor:
        """The token after each position that counts, [R]; -1 at the end of a piece of text."""
        length = text.ids.shape[1]
        after = torch.full_like(text.ids, -1)
        # Where the next token belongs to the same piece, its position is the next one.
        goes_on = text.position_ids[:, 1:] == text.position_ids[:, :-1] + 1
        if text.attention_mask is not None:
            goes_on &= text.attention_mask[:, 1:] == 1
        after[:, : length - 1] = torch.where(goes_on, text.ids[:, 1:], -1)
        return after.flatten()[text.rows]

    @torch.inference_mode()
    def run(self, text: Contexts, replace: Replace | None = None) -> Tensor:
        """Logits at the positions that count, [R, V] float32; see `interfaces.LanguageModel`."""
        device = self.model.device
        rows = text.rows.to(device)
        kwargs: dict[str, Any] = {"position_ids": text.position_ids.to(device), "use_cache": False}
        if text.attention_mask is not None:
            kwargs["attention_mask"] = text.attention_mask.to(device)
        with ExitStack() as hooks:
            if replace is not None:
                for layer, (read, written) in enumerate(self.sites):
                    Swap(layer, rows, replace).hook(self.model, read, written, hooks)
            logits = self.model(text.ids.to(device), **kwargs).logits
        return logits.flatten(0, 1)[rows].float()


class Swap:
    """Hooks on one layer: keeps what is read, and lets what is written be replaced."""

    def __init__(self, layer: int, rows: Tensor, replace: Replace):
        self.layer, self.rows, self.replace = layer, rows, replace
        self.inputs: Tensor | None = None

    def hook(self, model: PreTrainedModel, read: Site, written: Site, hooks: ExitStack) -> None:
        for site, act in ((read, self._read), (written, self._write)):
            module: Any = model.get_submodule(site.path)
            if site.side == "input":
                handle = module.register_forward_pre_hook(_before(act), with_kwargs=True)
            else:
                handle = module.register_forward_hook(_after(act))
            hooks.callback(handle.remove)

    def _read(self, value: Tensor) -> None:
        self.inputs = value.flatten(0, -2)[self.rows]

    def _write(self, value: Tensor) -> Tensor | None:
        assert self.inputs is not None, "a layer writes after it has read"
        flat = value.flatten(0, -2)
        new = self.replace(self.layer, self.inputs, flat[self.rows])
        if new is None:
            return None
        return flat.index_copy(0, self.rows, new.to(flat.device, flat.dtype)).view_as(value)


def _before(act: Callable[[Tensor], Tensor | None]) -> Callable[..., Any]:
    """A hook on what a module reads, its first argument."""

    def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            new = act(args[0])
            return None if new is None else ((new, *args[1:]), kwargs)
        name, value = next(iter(kwargs.items()))
        new = act(value)
        return None if new is None else (args, {**kwargs, name: new})

    return hook


def _after(act: Callable[[Tensor], Tensor | None]) -> Callable[..., Any]:
    """A hook on what a module writes; experts give their router's scores too."""

    def hook(_: Any, args: Any, output: Any) -> Any:
        if not isinstance(output, tuple):
            return act(output)
        new = act(output[0])
        return None if new is None else (new, *output[1:])

    return hook
