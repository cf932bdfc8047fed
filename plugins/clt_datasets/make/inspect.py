"""`inspect`: what a data set holds, and whether it still is what was written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from clt_datasets.dataset import DatasetStore, Folder
from clt_datasets.format.manifest import Manifest
from clt_plugins import Batch, DamagedError

PREVIEW = 4
"""Rows that are shown."""


def inspect(path: Path, *, verify: bool = False) -> dict[str, Any]:
    """Describe a data set as plain data.

    Args:
        verify: read every row and check it; otherwise sizes and the chunks' summaries are checked.

    Raises:
        ValueError: it is no data set.
    """
    folder = Folder(path)
    manifest = folder.manifest
    store = DatasetStore(folder, str(path))
    faults = _check(folder, verify)
    found: dict[str, Any] = {
        "path": str(path),
        "layers": manifest.layers,
        "d_model": manifest.d_model,
        "dtype": manifest.dtype,
        "compression": manifest.compression,
        "tokens": manifest.tokens,
        "chunks": len(manifest.chunks),
        "chunk_rows": [min(c.rows for c in manifest.chunks), max(c.rows for c in manifest.chunks)],
        "block_rows": manifest.block_rows,
        "bytes": sum(chunk.bytes for chunk in manifest.chunks),
        "bytes_per_token": manifest.row_bytes,
        "identity": manifest.identity,
        "about": manifest.about,
        "rounding_nmse": manifest.rounding_nmse,
        "verified": "all rows" if verify else "sizes and summaries",
        "faults": faults,
    }
    try:
        found["statistics"] = _statistics(store)
        found["preview"] = _preview(store, manifest)
    except DamagedError as error:
        faults += [str(error)] if str(error) not in faults else []
    return found


def _check(folder: Folder, verify: bool) -> list[str]:
    """What is wrong, a line each."""
    manifest, faults = folder.manifest, []
    total = sum(chunk.rows for chunk in manifest.chunks)
    with tqdm(total=total, unit="tok", unit_scale=True, disable=None if verify else True) as bar:
        for number, chunk in enumerate(manifest.chunks):
            try:
                reader = folder.chunk(number)
            except DamagedError as error:
                faults.append(str(error))
                continue
            for begin in range(0, chunk.rows if verify else 0, manifest.block_rows):
                rows = manifest.block(chunk, begin)
                into = [np.empty((rows, *shape), dtype) for dtype, shape in manifest.row_shapes]
                try:
                    reader.read(begin, into)
                except DamagedError as error:
                    faults.append(str(error))
                bar.update(rows)
    return faults


def _statistics(store: DatasetStore) -> dict[str, list[float]]:
    """One number per layer: the root mean square, and the standard deviation averaged over dimensions."""
    found = store.statistics()
    sides = ("inputs", "targets")
    rms = {f"{side}.rms": found[f"{side}.rms"].tolist() for side in sides}
    return rms | {f"{side}.std": found[f"{side}.std"].mean(1).tolist() for side in sides}


def _preview(store: DatasetStore, manifest: Manifest) -> list[dict[str, Any]]:
    """The first rows to train on: token, place, and the size of what the layers read and wrote."""
    rows = manifest.block(manifest.part("train")[0], 0)
    shape = rows, store.n_layers, store.d_model
    sides = [torch.empty(shape, dtype=store.dtype) for _ in range(2)]
    known = [torch.empty(rows, dtype=torch.int64), torch.empty(rows, 2, dtype=torch.int64)] if store.has_tokens else []
    batch = Batch(*sides, *known)
    store.read("train", 0, 0, batch)
    return [
        {
            "token_id": None if batch.token_ids is None else int(batch.token_ids[row]),
            "position": None if batch.positions is None else batch.positions[row].tolist(),
            "inputs_norm": batch.inputs[row].float().norm(dim=-1).tolist(),
            "targets_norm": batch.targets[row].float().norm(dim=-1).tolist(),
        }
        for row in range(min(PREVIEW, rows))
    ]


def as_text(found: dict[str, Any]) -> str:
    """The same for people."""
    about, tokens = found["about"], found["tokens"]
    model, source = about.get("model") or {}, about.get("source") or {}
    lines = [
        f"{found['path']}: {tokens['train']:,} tokens to train on, {tokens['held_out']:,} held out",
        f"  {found['layers']} layers x {found['d_model']}, {found['dtype']}, compression {found['compression']}, "
        f"{found['bytes_per_token']:,} bytes per token, {found['bytes'] / 1e9:.3f} GB in {found['chunks']} chunks "
        f"of {found['chunk_rows'][0]:,} to {found['chunk_rows'][1]:,} rows, blocks of {found['block_rows']}",
        f"  model {model.get('path', '?')}, text {source.get('text', '?')}, context {source.get('context', '?')}",
    ]
    if "statistics" in found:
        lines.append("  layer  inputs rms      std  rounding   targets rms      std  rounding")
        for layer in range(found["layers"]):
            row = [
                f"{found['statistics'][f'{side}.rms'][layer]:11.4g} {found['statistics'][f'{side}.std'][layer]:8.4g} "
                f"{found['rounding_nmse'][side][layer]:9.2g}"
                for side in ("inputs", "targets")
            ]
            lines.append(f"  {layer:5} {'  '.join(row)}")
    for row in found.get("preview", []):
        norms = " ".join(f"{norm:.3g}" for norm in row["targets_norm"])
        lines.append(f"  token {row['token_id']} at {row['position']}: targets' norms {norms}")
    lines += [f"! {fault}" for fault in found["faults"]]
    checked = f"checked: {found['verified']}"
    lines.append(f"{checked}; {len(found['faults'])} faults" if found["faults"] else f"{checked}; no fault")
    return "\n".join(lines)
