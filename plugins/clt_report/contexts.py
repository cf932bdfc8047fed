"""Where features are most active in held-out text.

A source tells which token each row of a batch is, and where it stands; neighbours are rows of one context at
neighbouring places. (The first token of each text is in no batch, and so among no neighbours.)

Shapes: T tokens, W wanted features, L layers, F features per layer.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clt_plugins import Refused

if TYPE_CHECKING:
    from clt_plugins import Batch, CrossLayerTranscoder, Features


def parse(text: str, layers: int, features: int) -> list[tuple[int, int]]:
    """Features by (layer, number): "0:17,2:5-9".

    Raises:
        ValueError: the text says something else, or there is no such feature.
    """
    found: list[tuple[int, int]] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+):(\d+)(?:-(\d+))?\s*", part)
        if match is None:
            raise Refused("--features", f"expected LAYER:FEATURE or LAYER:FIRST-LAST, got {part!r}")
        layer, first = int(match[1]), int(match[2])
        last = int(match[3] or first)
        if layer >= layers or not first <= last < features:
            raise Refused("--features", f"no {part.strip()}: there are {layers} layers of {features} features")
        found += [(layer, number) for number in range(first, last + 1)]
    return list(dict.fromkeys(found))


@torch.no_grad()
def find(
    transcoder: CrossLayerTranscoder, source: Any, wanted: list[tuple[int, int]], *, tokens: int, top: int, window: int
) -> dict[str, Any]:
    """The contexts in which each wanted feature is most active.

    Returns:
        Plain data: `tokens` read; and for each of `features` its `layer`, `feature`, `density` (share of tokens it is
        active at) and `examples`, strongest first: `value`, `token`, `tokens` (the window), `values` at them, `place`
        of the token in it, and `context` and `position` in it. Tokens are texts where the source can spell them,
        else numbers.

    Raises:
        ValueError: the transcoder is for another model, or the source does not know its tokens.
    """
    has, wants = (source.n_layers, source.d_model), (transcoder.n_layers, transcoder.d_model)
    if has != wants:
        raise Refused(
            "source",
            f"gives {has[0]} layers of d_model {has[1]}, but the transcoder is for {wants[0]} layers of "
            f"d_model {wants[1]}: name the language model and layers that it was trained on",
        )
    device = transcoder.W_enc.device
    columns = torch.full((transcoder.n_layers * transcoder.n_features,), -1, device=device)
    numbers = torch.tensor([layer * transcoder.n_features + feature for layer, feature in wanted], device=device)
    columns[numbers] = torch.arange(len(wanted), device=device)
    values, ids, places = [], [], []
    for batch in source.held_out(tokens):
        _check_known(batch)
        features = transcoder.encode(batch.inputs.to(device))
        values.append(_columns(features, columns, numbers).cpu())
        ids.append(batch.token_ids.cpu())
        places.append(batch.positions.cpu())
    if not values:
        raise Refused("source", "holds out no text to look at")
    spell = _speller(source)
    return {
        "tokens": sum(map(len, ids)),
        "features": _examples(torch.cat(values), torch.cat(ids), torch.cat(places), wanted, top, window, spell),
    }


def _check_known(batch: Batch) -> None:
    if batch.token_ids is None or batch.positions is None:
        raise Refused("source", "does not say which tokens its activations belong to: use one that reads text")


def _columns(features: Features, columns: Tensor, numbers: Tensor) -> Tensor:
    """The values of the wanted features, [B, W]."""
    if features.pairs is None:
        return features.values.flatten(1)[:, numbers]
    column = columns[features.pairs.feature]
    own = column >= 0
    out = features.values.new_zeros(features.shape[0], len(numbers))
    out[features.pairs.token[own], column[own]] = features.values[own]
    return out


def _speller(source: Any) -> Any:
    """Texts of token ids, where the source's language model has them; else the ids."""
    model: Any = source.language_model() if hasattr(source, "language_model") else None
    return model.spell if hasattr(model, "spell") else list


def _examples(
    values: Tensor,
    ids: Tensor,
    places: Tensor,
    wanted: list[tuple[int, int]],
    top: int,
    window: int,
    spell: Any,
) -> list[dict[str, Any]]:
    # Rows that continue the one before: same context, next position.
    goes_on = (places[1:, 0] == places[:-1, 0]) & (places[1:, 1] == places[:-1, 1] + 1)
    stretch = torch.cat([torch.zeros(1, dtype=torch.int64), (~goes_on).cumsum(0)])
    described = []
    for column, (layer, feature) in enumerate(wanted):
        own = values[:, column]
        active = own > 0
        strongest = own.topk(min(top, int(active.sum()))).indices.tolist()
        examples = []
        for row in strongest:
            begin, end = max(0, row - window), min(len(ids), row + window + 1)
            near = [at for at in range(begin, end) if stretch[at] == stretch[row]]
            examples.append(
                {
                    "value": float(own[row]),
                    "token": spell([int(ids[row])])[0],
                    "tokens": spell(ids[near].tolist()),
                    "values": own[near].tolist(),
                    "place": near.index(row),
                    "context": int(places[row, 0]),
                    "position": int(places[row, 1]),
                }
            )
        density = float(active.double().mean())
        described.append({"layer": layer, "feature": feature, "density": density, "examples": examples})
    return described


def as_text(found: dict[str, Any]) -> str:
    """For people: a line for each context, the token in brackets."""
    lines = [f"{found['tokens']:,} held-out tokens"]
    for each in found["features"]:
        lines.append(f"\nlayer {each['layer']}, feature {each['feature']}, active at {each['density']:.3%} of tokens")
        for example in each["examples"]:
            words = [f"[{word}]" if at == example["place"] else f"{word}" for at, word in enumerate(example["tokens"])]
            joint = "" if isinstance(example["token"], str) else " "
            text = joint.join(words).replace("\n", "\\n").replace("\t", "\\t")
            lines.append(f"{example['value']:10.4f}  {text}")
    return "\n".join(lines)


def write(found: dict[str, Any], file: Path) -> None:
    """Write it all as JSON.

    Raises:
        ValueError: there is such a file.
    """
    try:
        with file.open("x", encoding="utf-8") as out:
            json.dump(found, out, indent=1, ensure_ascii=False)
            out.write("\n")
    except FileExistsError:
        raise Refused(file, "already there; give another name with --out") from None
