"""Reading activations: each forward pass writes its rows straight into the memory of a block; nothing else is kept.

Shapes: C contexts, T tokens in the longest, L layers, D d_model, R rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clt_stream.contexts import Contexts
from clt_stream.finite import check_rows
from clt_stream.rows import Rows, moved
from clt_stream.taps import Site, Tap, Trace, find_order

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Reader:
    """Runs a model on contexts and copies the activations at its sites.

    Raises:
        Refused: the sites are not activations of one width, or a forward pass does not reach them.
    """

    def __init__(self, model: PreTrainedModel, sites: Sequence[tuple[Site, Site]], layers: Sequence[int] | None = None):
        self.model = model
        self.n_layers = len(sites)
        self.layers = list(layers) if layers is not None else list(range(self.n_layers))
        """The number in the model of each layer that is read."""
        self.dtype, self.device = model.dtype, model.device
        taps, self.d_model = find_order(model, sites)
        self.trace = Trace(model, taps)

    @torch.inference_mode()
    def read(self, contexts: Contexts, rows: Tensor, into: Rows, begin: int) -> None:
        """Run the model on contexts and copy R of their rows into the rows from `begin` on.

        Args:
            rows: indices into C * T, [R].
        """
        target = slice(begin, begin + len(rows))
        into.label(contexts, rows, target)
        rows = moved(rows, self.device)
        kwargs: dict[str, Any] = {"position_ids": moved(contexts.position_ids, self.device), "use_cache": False}
        if contexts.attention_mask is not None:
            kwargs["attention_mask"] = moved(contexts.attention_mask, self.device)
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None

        def copy(tap: Tap, value: Tensor) -> None:
            out = (into.inputs if tap.is_input else into.targets)[target, tap.layer]
            # nnsight may call this in a thread of its own, and each thread has its own current stream.
            with torch.cuda.stream(stream):
                _copy(value, rows, out)
                if tap.site.scale != 1:
                    out *= tap.site.scale

        self.trace.run(copy, moved(contexts.ids, self.device), **kwargs)


def _copy(value: Tensor, rows: Tensor, out: Tensor) -> None:
    """Copy rows of `value` [C, T, D] to `out` [R, D], in one pass over the memory."""
    flat = value.flatten(0, -2)
    if flat.device == out.device and flat.dtype == out.dtype:
        torch.index_select(flat, 0, rows, out=out)
    else:
        out.copy_(flat.index_select(0, rows))


def packs(reader: Reader) -> bool:
    """Whether the model keeps packed pieces apart: a piece gives the same whatever comes before it, and when alone.

    Raises:
        Refused: its activations are no finite numbers. (NaN would be unlike itself.)
    """
    vocabulary = reader.model.config.get_text_config().vocab_size
    piece = torch.tensor([[3, 1, 2, 5], [2, 7, 3, 1]])
    before, other = torch.tensor([[1, 2, 3]]), torch.tensor([[6, 5, 9]])
    positions = torch.tensor([0, 1, 2, 0, 1, 2, 3])

    def run(ids: Tensor, positions: Tensor) -> Tensor:
        rows = torch.arange(ids.numel())
        into = Rows(len(rows), reader.n_layers, reader.d_model, reader.dtype, reader.device, "source.pack")
        contexts = Contexts(ids.remainder(vocabulary), positions.expand_as(ids), None, rows, 0)
        reader.read(contexts, rows, into, 0)
        check_rows(into.view(slice(0, len(rows))), reader.layers)
        return into.targets.view(*ids.shape, -1)[:, -4:].float()

    def near(one: Tensor, two: Tensor, tolerance: float) -> bool:
        return bool((one - two).norm() <= tolerance * two.norm())

    first, second = (run(torch.cat([start.expand(2, -1), piece], 1), positions) for start in (before, other))
    # Equal shapes round alike; other shapes may differ by the rounding of a 16-bit type.
    return near(first, second, 1e-6) and near(first, run(piece, positions[3:]), 0.02)
