"""Whole contexts of training text, for losses that run the language model.

They are the contexts of the stream in their order, from the first one on, read by a packer of their own. The blocks of
the stream cannot give them: a block holds rows of many contexts, shuffled, and each rank runs only the passes that it
needs. So batches stay what they are, and the position is one cursor, the same on every rank.

Shapes: C contexts, T tokens in the longest.
"""

from __future__ import annotations

from typing import Any

import attrs
import torch
from torch import Tensor

from clt_stream.contexts import Contexts, Cursor, Packer


class TrainingTexts:
    """Gives the next contexts of the trained part of the text.

    Args:
        packer: of that part, one context at a time.
        rank, ranks: this data rank of how many. Every rank tokenises all contexts, and takes every so many-th.
    """

    def __init__(self, packer: Packer, rank: int, ranks: int):
        self.packer, self.rank, self.ranks = packer, rank, ranks

    def read(self, count: int, position: Any) -> tuple[Contexts, Any]:
        """This rank's part of `count` contexts from a position on, and the position after them. Contexts of special
        tokens only are left out.

        Raises:
            Refused: the text has changed.
        """
        if position is not None:
            self.packer.seek(Cursor(**position))
        taken: list[Contexts] = []
        for number in range(count):
            context = self._next()
            if number % self.ranks == self.rank:
                taken.append(context)
        return joined(taken), attrs.asdict(self.packer.cursor())

    def _next(self) -> Contexts:
        while True:
            context = self.packer.next()
            assert context is not None, "the trained part of a text never ends"
            if len(context.rows):
                return context


def joined(contexts: list[Contexts]) -> Contexts:
    """Contexts as one forward pass, padded on the right. Their numbers are those of the first one and so on."""
    length = max(each.ids.shape[1] for each in contexts)

    def padded(x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x, (0, length - x.shape[1]))

    ids = torch.cat([padded(each.ids) for each in contexts])
    masks = [padded(each.attention_mask) for each in contexts if each.attention_mask is not None]
    # Where contexts are packed, padding is a sequence of its own: its positions begin at 0 again.
    positions = torch.cat(
        [torch.cat([each.position_ids, _counted(each, length - each.ids.shape[1])], 1) for each in contexts]
    )
    rows, begin = [], 0
    for each in contexts:
        width = each.ids.shape[1]
        rows.append((begin + each.rows // width) * length + each.rows % width)
        begin += len(each.ids)
    first, mask = contexts[0], torch.cat(masks) if masks else None
    return Contexts(ids, positions, mask, torch.cat(rows), first.first, first.gapless)


def _counted(contexts: Contexts, count: int) -> Tensor:
    """The positions of some padding, [C, count]."""
    return torch.arange(count).expand(len(contexts.ids), count)
