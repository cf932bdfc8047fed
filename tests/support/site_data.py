"""Reads a site's data by what `data.md` says of them, without the code that writes them."""

from __future__ import annotations

import base64
import gzip
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np


class SiteData:
    """The data of a site on disk."""

    def __init__(self, folder: Path):
        self.folder = folder / "data"
        self.site: dict[str, Any] = self.value("site")

    @cache  # noqa: B019 - it lives as long as a test
    def value(self, key: str) -> Any:
        """What a file puts."""
        data = (self.folder / f"{key}.js").read_bytes()
        text = data.decode("ascii")  # nothing else may be in it
        assert "<" not in text and text.count("\n") == 1
        head, tail = f'CLT.put("{key}",', ");\n"
        assert text.startswith(head) and text.endswith(tail)
        return json.loads(text[len(head) : -len(tail)])

    def arrays(self, key: str, member: str | None = None) -> dict[str, np.ndarray[Any, Any]]:
        """The packed arrays of a file."""
        return dict(self._arrays(key, member))

    @cache  # noqa: B019
    def _arrays(self, key: str, member: str | None) -> dict[str, np.ndarray[Any, Any]]:
        value = self.value(key)
        packed = value[member] if member else value
        data = gzip.decompress(base64.b64decode(packed["data"], validate=True))
        assert len(data) == packed["bytes"]
        out = {}
        for name, (kind, shape, offset) in packed["arrays"].items():
            assert kind in ("u1", "u2", "u4", "i1", "i2", "i4", "f4", "f8") and offset % 8 == 0
            count = int(np.prod(shape))
            out[name] = np.frombuffer(data, np.dtype(f"<{kind}"), count, offset).reshape(shape)
        return out

    def bytes_of(self, words: Any) -> list[bytes]:
        """The bytes of words."""
        vocabulary = self.arrays("vocabulary")
        data, start = vocabulary["bytes"].tobytes(), vocabulary["start"].tolist()
        return [data[start[word] : start[word + 1]] for word in words]

    def text(self) -> dict[str, np.ndarray[Any, Any]]:
        """All rows: `word`, `context`, `position`."""
        rows = self.site["text"]["rows"]
        parts = [self.arrays(f"text/{number:04}") for number in range(len(rows) - 1)]
        assert [len(part["word"]) for part in parts] == np.diff(rows).tolist()
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def feature(self, layer: int, feature: int) -> dict[str, Any]:
        """Everything of a feature."""
        shard, number = divmod(feature, self.site["shard"])
        arrays = self.arrays(f"features/{layer:02}/{shard:04}")
        start, stop = arrays.pop("window_start")[number : number + 2].tolist()
        entries = {name: arrays.pop(name)[start:stop] for name in ("window_offset", "window_value")}
        return {**{name: array[number] for name, array in arrays.items()}, **entries}

    def find(self, key: str) -> dict[str, list[tuple[int, int]]]:
        """The features of a key, (number, share), by list; by the shards' first keys."""
        firsts = self.site["search"]["first"]
        shard = max((n for n, first in enumerate(firsts) if units(first) <= units(key)), default=None)
        if shard is None:
            return {}
        name = f"search/{shard:04}"
        keys = self.value(name)["keys"]
        assert keys == sorted(keys, key=units)
        if key not in keys:
            return {}
        index, arrays, out = keys.index(key), self.arrays(name, "packed"), {}
        for one in ("active", "promotes"):
            if f"{one}_start" in arrays:
                entries = slice(*arrays[f"{one}_start"][index : index + 2].tolist())
                features, shares = arrays[f"{one}_feature"][entries], arrays[f"{one}_share"][entries]
                out[one] = list(zip(features.tolist(), shares.tolist(), strict=True))
                assert arrays[f"{one}_count"][index] >= len(out[one])
        return out


def units(text: str) -> list[int]:
    """What JavaScript compares: UTF-16 units."""
    data = text.encode("utf-16-le", "surrogatepass")
    return list(np.frombuffer(data, "<u2").tolist())
