"""Data sets of crosslayer-coding, written as its generator writes them, byte for byte in layout."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np
import torch

from clt_plugins import Batch

SIZES = (40, 25, 60)
"""Rows of each chunk."""


def write(
    folder: Path,
    sizes: Sequence[int] = SIZES,
    *,
    index: str = "per chunk",
    ending: str = "hdf5",
    dtype: str = "float32",
    chunk_rows: int = 16384,
    compression: str | None = "gzip",
) -> Batch:
    """Write a data set; returns its rows in order.

    Args:
        chunk_rows: rows that are compressed together, at most.
    """
    folder.mkdir()
    random = torch.Generator().manual_seed(0)
    rows = torch.randn(2, sum(sizes), 11, 4, generator=random)
    if dtype != "float32":
        rows = rows.to(torch.float16 if dtype == "float16" else torch.bfloat16)
    entries, first = [], 0
    for number, size in enumerate(sizes):
        with h5py.File(folder / f"chunk_{number}.{ending}", "w", libver="latest") as file:
            for layer in range(11):
                group = file.create_group(f"layer_{layer}")
                for side, name in enumerate(("inputs", "targets")):
                    x = rows[side, first : first + size, layer].contiguous()
                    stored = x.view(torch.int16).numpy().view(np.uint16) if dtype == "uint16" else x.numpy()
                    chunks = (min(size, chunk_rows), 4)
                    group.create_dataset(name, data=stored, chunks=chunks, compression=compression)
        entries += [(number, size, first)] if index == "per chunk" else [(number, row) for row in range(size)]
        first += size
    fields = [("chunk_id", np.int32), ("num_tokens", np.int32), ("offset", np.int64)]
    kind = np.dtype(fields) if index == "per chunk" else np.uint32
    (folder / "index.bin").write_bytes(np.array(entries, kind).tobytes())
    metadata = {"model_name": "gpt2", "num_layers": 11, "d_model": 4, "dtype": dtype, "total_tokens": first}
    (folder / "metadata.json").write_text(json.dumps(metadata))
    x = rows.double()
    stats = {
        str(layer): {
            name: {"mean": x[side, :, layer].mean(0).tolist(), "std": x[side, :, layer].std(0).tolist()}
            for side, name in enumerate(("inputs", "targets"))
        }
        for layer in range(11)
    }
    (folder / "norm_stats.json").write_text(json.dumps(stats))
    return Batch(rows[0], rows[1])
