"""Reading the files of circuit-tracer's local features as its page does, and what a store says of the same feature.

Written from the page's JavaScript, and from the description of the store; not from what writes the files.
"""

from __future__ import annotations

import gzip
import json
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np

from clt_plugins import Collected


def unpack(answer: bytes) -> Any:
    """The JSON that a range of a `.bin` file holds; the page asks for one byte too many."""
    (length,) = struct.unpack("<I", answer[:4])
    return json.loads(gzip.decompress(answer[4 : 4 + length]))


def from_disk(folder: Path, layer: int, feature: int) -> Any:
    index = json.loads(gzip.decompress((folder / "index.json.gz").read_bytes()))[layer]
    start, end = index["offsets"][feature], index["offsets"][feature + 1]
    with (folder / index["filename"]).open("rb") as file:
        file.seek(start)
        return unpack(file.read(end + 1 - start))


def to_bytes(token: str) -> bytes:
    """The bytes that the page makes of a token, before it puts neighbours together."""
    pieces = re.split(r"(\\x[0-9a-f]{2})", token)
    return b"".join(
        bytes([int(one[2:], 16)]) if re.fullmatch(r"\\x[0-9a-f]{2}", one) else one.encode() for one in pieces
    )


def same_as_the_store(feature: Any, collected: Collected, layer: int, number: int) -> None:
    """Everything in the JSON is what the store holds."""
    arrays = collected.layer(layer)
    examples = collected.examples(layer, number)
    assert feature["index"] == number
    assert np.float32(feature["act_min"]) == arrays["minimum"][number]
    assert np.float32(feature["act_max"]) == arrays["maximum"][number]
    assert feature["activation_frequency"] == arrays["active"][number] / collected.info.tokens
    assert abs(sum(feature["histogram"]) - arrays["histogram"][number].sum()) < 0.1, "rounded"
    for key, name in (("top_logits", "logits_up_id"), ("bottom_logits", "logits_down_id")):
        ids = arrays[name][number, -1] if name in arrays else []
        assert [to_bytes(token) for token in feature[key]] == collected.spell(id_ for id_ in ids if id_ >= 0)
    groups = [group for group in (examples.top, *examples.groups) if group]
    assert len(feature["examples_quantiles"]) == len(groups)
    seen: set[int] = set()
    for quantile, group in zip(feature["examples_quantiles"], groups, strict=True):
        for shown, example in zip(quantile["examples"], group, strict=True):
            tokens = collected.spell(collected.ids[example.start : example.stop])
            assert [to_bytes(token) for token in shown["tokens"]] == tokens
            assert (np.array(shown["tokens_acts_list"], np.float32) == example.values).all()
            assert shown["train_token_ind"] == example.row - example.start
            assert np.float32(shown["tokens_acts_list"][shown["train_token_ind"]]) == np.float32(example.value)
            assert shown["is_repeated_datapoint"] == (example.row in seen)
            seen.add(example.row)
