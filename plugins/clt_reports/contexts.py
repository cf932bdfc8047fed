"""Where features are most active in held-out text.

A source tells the token id and the position of each row of a batch. Neighbours of a token are rows of the same context
at neighbouring positions. (The first token of each text is in no batch, so it is no neighbour.)

Shapes: T tokens, W chosen features, L layers, F features per layer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import attrs
import torch
from torch import Tensor

from clt_plugins import HasModel, Refused, printable

if TYPE_CHECKING:
    from clt_plugins import Batch, CrossLayerTranscoder, Features, Source

Token = str | int
"""A token's text, or its id where the source cannot spell it."""
Spell = Callable[[list[int]], Sequence[Token]]


@attrs.frozen
class Example:
    """A token at which a feature is active, with its neighbours."""

    value: float
    """The feature's activation there."""
    token: Token
    tokens: list[Token]
    """The token and its neighbours, in order."""
    values: list[float]
    """The feature's activation at each of `tokens`."""
    index: int
    """Which of `tokens` the token is."""
    context: int
    """The number of the context."""
    position: int
    """The position in the context."""


@attrs.frozen
class FeatureExamples:
    """Where one feature is most active."""

    layer: int
    feature: int
    density: float
    """The share of tokens at which it is active."""
    examples: list[Example]
    """The strongest first."""


@attrs.frozen
class TopActivations:
    """Where some features are most active."""

    tokens: int
    """How many held-out tokens were read."""
    features: list[FeatureExamples]


def parse(text: str, n_layers: int, n_features: int) -> list[tuple[int, int]]:
    """Features as (layer, number), from a text such as "0:17,2:5-9".

    Raises:
        Refused: the text has another form, or there is no such feature.
    """
    chosen: list[tuple[int, int]] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+):(\d+)(?:-(\d+))?\s*", part)
        if match is None:
            raise Refused("--features", f"expected LAYER:FEATURE or LAYER:FIRST-LAST, got {part!r}")
        layer, first = int(match[1]), int(match[2])
        last = int(match[3] or first)
        if layer >= n_layers or not first <= last < n_features:
            raise Refused("--features", f"no {part.strip()}: there are {n_layers} layers of {n_features} features")
        chosen += [(layer, number) for number in range(first, last + 1)]
    return list(dict.fromkeys(chosen))


@torch.no_grad()
def find_top(
    transcoder: CrossLayerTranscoder,
    source: Source,
    chosen: list[tuple[int, int]],
    *,
    tokens: int,
    top: int,
    window: int,
) -> TopActivations:
    """The tokens at which each of the chosen features is most active.

    Args:
        chosen: features as (layer, number).
        tokens: how many held-out tokens to read, at most.
        top: how many tokens to show for each feature, at most.
        window: how many neighbours to show on each side, at most.

    Raises:
        Refused: the transcoder is for another model, or the source does not know its tokens, or holds none out.
    """
    sizes, expected = (source.n_layers, source.d_model), (transcoder.n_layers, transcoder.d_model)
    if sizes != expected:
        raise Refused(
            "source",
            f"has {sizes[0]} layers of d_model {sizes[1]}, but the transcoder is for {expected[0]} layers of "
            f"d_model {expected[1]}: name the language model and layers that it was trained on",
        )
    device = transcoder.device
    columns = torch.full((transcoder.n_layers * transcoder.n_features,), -1, device=device)
    numbers = torch.tensor([layer * transcoder.n_features + feature for layer, feature in chosen], device=device)
    columns[numbers] = torch.arange(len(chosen), device=device)
    values, ids, positions = [], [], []
    for batch in source.held_out(tokens):
        batch_ids, batch_positions = _known(batch)
        features = transcoder.encode(batch.inputs.to(device))
        values.append(_columns(features, columns, numbers).cpu())
        ids.append(batch_ids.cpu())
        positions.append(batch_positions.cpu())
    if not values:
        raise Refused("source", "has no held-out text to look at")
    spell: Spell = source.language_model().spell if isinstance(source, HasModel) else list
    text = _Text(torch.cat(ids), torch.cat(positions), spell, window)
    return TopActivations(
        len(text.ids),
        [
            FeatureExamples(layer, feature, float((column > 0).double().mean()), text.examples(column, top))
            for (layer, feature), column in zip(chosen, torch.cat(values).unbind(1), strict=True)
        ],
    )


def _known(batch: Batch) -> tuple[Tensor, Tensor]:
    """The token ids and positions of a batch."""
    if batch.token_ids is None or batch.positions is None:
        raise Refused("source", "does not say which tokens its activations belong to: use a source that reads text")
    return batch.token_ids, batch.positions


def _columns(features: Features, columns: Tensor, numbers: Tensor) -> Tensor:
    """The values of the chosen features, [T, W].

    Args:
        columns: the column of each of the L * F features; -1 for those not chosen.
        numbers: layer * F + feature of each column, [W].
    """
    if features.pairs is None:
        return features.values.flatten(1)[:, numbers]
    column = columns[features.pairs.feature]
    chosen = column >= 0
    out = features.values.new_zeros(features.shape[0], len(numbers))
    out[features.pairs.token[chosen], column[chosen]] = features.values[chosen]
    return out


class _Text:
    """The held-out tokens that were read, [T], and which of them are neighbours."""

    def __init__(self, ids: Tensor, positions: Tensor, spell: Spell, window: int):
        self.ids, self.positions, self.spell, self.window = ids, positions, spell, window
        same_context = positions[1:, 0] == positions[:-1, 0]
        continues = same_context & (positions[1:, 1] == positions[:-1, 1] + 1)
        self.run = torch.cat([torch.zeros(1, dtype=torch.int64), (~continues).cumsum(0)])
        """The number of the run of neighbouring positions that each token is in."""

    def examples(self, values: Tensor, top: int) -> list[Example]:
        """The tokens at which a feature's values [T] are highest, among those above 0."""
        strongest = values.topk(min(top, int((values > 0).sum()))).indices.tolist()
        return [self._example(values, row) for row in strongest]

    def _example(self, values: Tensor, row: int) -> Example:
        begin, end = max(0, row - self.window), min(len(self.ids), row + self.window + 1)
        near = [other for other in range(begin, end) if self.run[other] == self.run[row]]
        context, position = self.positions[row].tolist()
        return Example(
            value=float(values[row]),
            token=self.spell([int(self.ids[row])])[0],
            tokens=list(self.spell(self.ids[near].tolist())),
            values=values[near].tolist(),
            index=near.index(row),
            context=context,
            position=position,
        )


def as_text(result: TopActivations) -> str:
    """For people: one line for each example, the token in brackets."""
    lines = [f"{result.tokens:,} held-out tokens"]
    for one in result.features:
        lines.append(f"\nlayer {one.layer}, feature {one.feature}, active at {one.density:.3%} of tokens")
        for example in one.examples:
            words = [f"[{word}]" if n == example.index else f"{word}" for n, word in enumerate(example.tokens)]
            joint = "" if isinstance(example.token, str) else " "
            lines.append(f"{example.value:10.4f}  {printable(joint.join(words))}")
    return "\n".join(lines)


def write(result: TopActivations, file: Path) -> None:
    """Write all of it as JSON into a new file.

    Raises:
        Refused: the file exists, or cannot be created.
    """
    try:
        with file.open("x", encoding="utf-8") as out:
            json.dump(attrs.asdict(result), out, indent=1, ensure_ascii=False)
            out.write("\n")
    except FileExistsError:
        raise Refused(file, "already there; give another name with --out") from None
    except FileNotFoundError:
        raise Refused(file, "there is no such folder; give another name with --out") from None
