"""Small streams of activations, and their batches put back into documents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from clt_plugins import Batch
from clt_stream import StreamConfig, clt_sources
from clt_stream.text.documents import document
from clt_stream.text.stdlib import is_held_out
from tests.support.language_models import Hooked, make_context

CONTEXT = 24
"""Tokens in a context of these streams."""


def build(model: Path, text: Path | str, run: dict[str, Any] | None = None, **config: Any) -> Any:
    """The source `stream`, built exactly like that of a run."""
    (spec,) = clt_sources()
    settings = {"context": CONTEXT, "model_batch": 3, "buffer_tokens": 320, "held_out": 0.3} | config
    return spec.build(StreamConfig(text=str(text), **settings), make_context(model, **(run or {})))


def join(batches: list[Batch]) -> Batch:
    names = "inputs", "targets", "token_ids", "positions"
    return Batch(*(torch.cat([getattr(batch, name) for batch in batches]) for name in names))


def equal(one: Batch, two: Batch) -> bool:
    names = "inputs", "targets", "token_ids", "positions"
    return all(torch.equal(getattr(one, name), getattr(two, name)) for name in names)


def block(source: Any) -> Batch:
    """The whole first block of a source."""
    return join([source.next() for _ in range(320 // 32)])


def segments(batch: Batch) -> list[tuple[tuple[int, ...], torch.Tensor, torch.Tensor]]:
    """Shuffled rows put back into runs of neighbouring positions: (tokens, inputs, targets) of each."""
    places = [tuple(place) for place in batch.positions.tolist()]
    order = sorted(range(len(places)), key=places.__getitem__)
    runs: list[list[int]] = []
    for row in order:
        context, position = places[row]
        if runs and places[runs[-1][-1]] == (context, position - 1):
            runs[-1].append(row)
        else:
            runs.append([row])
    return [(tuple(batch.token_ids[run].tolist()), batch.inputs[run], batch.targets[run]) for run in runs]


def segments_by_context(rows: Batch) -> dict[int, list[tuple[int, ...]]]:
    """The token runs of each context, by its number."""
    grouped: dict[int, list[tuple[int, ...]]] = {}
    for context in sorted(set(rows.positions[:, 0].tolist())):
        chosen = rows.rows(rows.positions[:, 0] == context)
        grouped[context] = [tokens for tokens, *_ in segments(chosen)]
    return grouped


def order_of(batch: Batch) -> torch.Tensor:
    return torch.argsort(batch.positions[:, 0] * 1000 + batch.positions[:, 1])


def pieces(truth: Hooked, texts: list[str], start: tuple[int, ...] = ()) -> list[list[int]]:
    """How documents must be cut: CONTEXT tokens each, and what remains."""
    room = CONTEXT - len(start)
    whole = [truth.tokens(text) for text in texts]
    return [[*start, *tokens[at : at + room]] for tokens in whole for at in range(0, len(tokens), room)]


def trained(texts: list[str], share: float = 0.3, *, held_out: bool = False) -> list[str]:
    return [text for text in texts if is_held_out(document(text, "", "")[0], share) == held_out]
