"""A decoder that stays in its files: only the rows of active features are read, one layer at a time.

The files are mapped: the operating system keeps in memory what is used often, and releases it when memory is short.
This serves to inspect, evaluate and export transcoders whose decoder is larger than the memory. It cannot be trained.

Shapes: B tokens, L layers, D d_model, F features per layer, T targets of a source layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import attrs
import torch
from torch import Tensor, nn

from clt_plugins import Refused

if TYPE_CHECKING:
    from clt_plugins import Context, Features

ROWS = 4096
"""Features whose rows are in memory at a time."""


@attrs.frozen(eq=False)
class Rows:
    """What the features of one source layer write to its T targets, in pieces as files have them."""

    parts: Sequence[Tensor]
    """Pieces [F, n, D], mapped, of any floating type; together they have T targets."""
    factors: Tensor | None = None
    """[F, T]: multiply the rows; None for 1."""
    offsets: Tensor | None = None
    """[F, T]: added to the values of active features, before `factors`; None for 0."""

    def take(self, features: Tensor | slice) -> Tensor:
        """The rows of some features, [n, T, D], in the files' type; a view where the files have them in one piece."""
        pieces = [part[features] for part in self.parts]
        rows = pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)
        return rows if self.factors is None else rows.float() * self.factors[features][..., None]

    def all(self) -> Tensor:
        """The rows of all features, [F, T, D].

        Raises:
            Refused: there are offsets, which rows cannot hold.
        """
        if self.offsets is not None:
            raise Refused(
                "lazy",
                "this decoder adds offsets to active features, one for each target layer, which decoder rows cannot "
                "hold: it can only be used with its decoder on disk (lazy), and not saved",
            )
        return self.take(slice(None))


def no_rows(features: int, targets: int, width: int) -> Tensor:
    """Rows of zeros [features, targets, width] that take no memory."""
    return torch.zeros(1, 1, 1).expand(features, targets, width)


class Mapped(nn.Module):
    """A `Tying` that computes like `untied` or `per_layer`, and is saved as one.

    Args:
        rows: for each source layer s those of its targets: s and all later ones, or only s.
        bias: of each target layer, [L, D].
        skip: [L, D, D]; None without a skip path.
        own_layer: whether features write to their own layer only.
        norms: ‖decoder‖ of each feature [L, F], where the files have them; else the rows are read for them.
    """

    def __init__(
        self,
        context: Context,
        rows: Sequence[Rows],
        bias: Tensor,
        *,
        skip: Tensor | None = None,
        own_layer: bool = False,
        norms: Tensor | None = None,
    ):
        super().__init__()
        self.n_layers, self.d_model = context.n_layers, context.d_model
        self.rows, self.own_layer, self.known_norms = tuple(rows), own_layer, norms
        self.b_dec = nn.Parameter(bias, requires_grad=False)
        self.skip = None if skip is None else nn.Parameter(skip, requires_grad=False)

    @torch.no_grad()
    def decode(self, features: Features) -> Tensor:
        """What the features write, [B, L, D], in the features' type."""
        tokens, _, width = features.shape
        out = features.values.new_zeros(tokens, self.n_layers, self.d_model)
        for source, rows in enumerate(self.rows):
            targets = out[:, source : source + 1] if self.own_layer else out[:, source:]
            if features.pairs is None:
                acts = features.values[:, source]
                used = acts.any(0).nonzero().squeeze(1)
                acts = acts[:, used]
            else:
                of_source = features.pairs.layer == source
                feature = features.pairs.feature[of_source] - source * width
                used, column = feature.unique(return_inverse=True)
                acts = out.new_zeros(tokens, len(used))
                acts[features.pairs.token[of_source], column] = features.values[of_source]
            for begin in range(0, len(used), ROWS):
                block, columns = used[begin : begin + ROWS].cpu(), acts[:, begin : begin + ROWS]
                taken = rows.take(block).to(out.device, out.dtype)
                targets += (columns @ taken.flatten(1)).view_as(targets)
                if rows.offsets is not None:
                    added = taken * rows.offsets[block].to(out.device, out.dtype)[..., None]
                    targets += ((columns > 0).to(out.dtype) @ added.flatten(1)).view_as(targets)
        return out

    def affine(self, inputs: Tensor) -> Tensor:
        """The bias of each target, and x_t S_t with a skip path."""
        bias = self.b_dec.to(inputs.device, inputs.dtype)
        if self.skip is None:
            return bias
        return torch.einsum("bld,lde->ble", inputs, self.skip.to(inputs.device, inputs.dtype)) + bias

    def expand(self, layer: int) -> Tensor:
        """The decoder of one source layer, [F, L - layer, D], as the files have it."""
        rows = self.rows[layer]
        whole = Rows(rows.parts, rows.factors).all()  # `shift` speaks of offsets
        if not self.own_layer or layer == self.n_layers - 1:
            return whole
        expanded = whole.new_zeros(whole.shape[0], self.n_layers - layer, self.d_model)
        expanded[:, :1] = whole
        return expanded

    def shift(self, layer: int) -> Tensor | None:
        """What is added to a source layer's active features, [F]; None without offsets.

        Raises:
            Refused: it differs between target layers, which no rows can hold.
        """
        offsets = self.rows[layer].offsets
        if offsets is None:
            return None
        if bool((offsets != offsets[:, :1]).any()):
            raise Refused(
                "tying.feature_offset",
                "differs between target layers, which no decoder rows can hold; train without it to export",
            )
        return offsets[:, 0]

    def norms(self) -> Tensor:
        """‖decoder‖ of each feature, [L, F]; a block of rows is in memory at a time."""
        if self.known_norms is None:
            self.known_norms = torch.stack([_norms(rows) for rows in self.rows])
        return self.known_norms

    def views(self) -> dict[str, tuple[str, Callable[[Tensor], Tensor], int | None]]:
        """The files of an untied decoder, or of one for each layer; rows are read when a view is taken."""
        views: dict[str, tuple[str, Callable[[Tensor], Tensor], int | None]] = {"b_dec": ("b_dec", unchanged, None)}
        if self.skip is not None:
            views["W_skip"] = ("skip", unchanged, None)
        if self.own_layer:
            whole = lambda _: torch.stack([rows.all()[:, 0] for rows in self.rows])  # noqa: E731
            return {**views, "W_dec": ("b_dec", whole, 1)}
        for source, rows in enumerate(self.rows):
            views[f"W_dec.{source:02}"] = ("b_dec", lambda _, rows=rows: rows.all(), 0)  # type: ignore[misc]
        return views


def _norms(rows: Rows) -> Tensor:
    total = rows.parts[0].shape[0]
    blocks = (slice(begin, min(begin + ROWS, total)) for begin in range(0, total, ROWS))
    return torch.cat([rows.take(block).float().flatten(1).norm(dim=1) for block in blocks])


def unchanged(x: Tensor) -> Tensor:
    """The view of a parameter that files hold as it is."""
    return x
