"""How a file of `data/` is written: one JavaScript statement, in ASCII, whose values nothing can break out of."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

LEVEL = 6
"""Of gzip. 9 takes twice as long for 1% less."""

ALIGNED = 8
"""Bytes. A typed array of JavaScript must begin at a multiple of its numbers' size."""

TYPES = {np.dtype(name): name for name in ("u1", "u2", "u4", "i1", "i2", "i4", "f4", "f8")}
EXACT = 2**53
"""The largest integer below which a JavaScript number is exact."""


def put(folder: Path, key: str, value: Any) -> None:
    """Write `data/KEY.js` into a site's folder.

    Raises:
        OSError: it cannot be written.
        ValueError: the value holds NaN or an infinity outside of a packed array.
    """
    path = folder / "data" / f"{key}.js"
    path.parent.mkdir(parents=True, exist_ok=True)
    # ASCII, so U+2028 and the like come as escapes; without "<" there is no `</script>` and no `<!--`.
    text = json.dumps([key, value], ensure_ascii=True, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    path.write_bytes(b"CLT.put(" + text[1:-1].encode("ascii") + b");\n")


def packed(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Arrays as JSON can hold them: a header, and base64 of gzip of all their bytes. The same bytes each time.

    Floats become float32; integers get the smallest type that holds them.

    Raises:
        ValueError: an integer is too large for JavaScript.
    """
    header: dict[str, Any] = {}
    compressor = zlib.compressobj(LEVEL, zlib.DEFLATED, 16 + zlib.MAX_WBITS)
    parts, size = [], 0
    for name, array in arrays.items():
        array = np.ascontiguousarray(_narrow(array))
        header[name] = [TYPES[array.dtype], list(array.shape), size]
        data = array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
        data += bytes(-len(data) % ALIGNED)
        parts.append(compressor.compress(data))
        size += len(data)
    parts.append(compressor.flush())
    return {"arrays": header, "bytes": size, "data": base64.b64encode(b"".join(parts)).decode("ascii")}


def _narrow(array: np.ndarray) -> np.ndarray:
    """The array in the type that it is stored in."""
    if array.dtype.kind == "f":
        return array.astype(np.float32, copy=False)
    if array.dtype.kind == "b" or not array.size:
        return array.astype(np.uint8)
    lowest, highest = int(array.min()), int(array.max())
    for kind in (np.uint8, np.uint16, np.uint32) if lowest >= 0 else (np.int8, np.int16, np.int32):
        limits = np.iinfo(kind)
        if limits.min <= lowest and highest <= limits.max:
            return array.astype(kind)
    if max(-lowest, highest) > EXACT:
        raise ValueError(f"{max(-lowest, highest)} is too large for a number of JavaScript")
    return array.astype(np.float64)
