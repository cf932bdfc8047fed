"""`inspect`: what a data set holds, and whether it still is what was written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import torch
from tqdm import tqdm

from clt_datasets.dataset import DatasetStore
from clt_datasets.format.folder import LocalData
from clt_datasets.format.manifest import Manifest
from clt_datasets.format.statistics import SIDES
from clt_plugins import Batch, DamagedError, printable

PREVIEW = 4
"""Rows that are shown."""


@attrs.frozen(kw_only=True)
class Report:
    """What `inspect` shows; its JSON has the same names."""

    path: str
    layers: int
    d_model: int
    dtype: str
    compression: str
    tokens: dict[str, int]
    """Rows of each part."""
    chunks: int
    chunk_rows: list[int]
    """Of the smallest and of the largest chunk."""
    block_rows: int
    bytes: int
    """Of all chunks."""
    bytes_per_token: int
    identity: str
    about: dict[str, Any]
    rounding_nmse: dict[str, list[float]]
    verified: str
    """What was checked."""
    faults: list[str]
    """What is damaged, a line each."""
    statistics: dict[str, list[float]] | None
    """`inputs.rms`, `inputs.std` and the same of targets, a number per layer; None if damaged."""
    preview: list[dict[str, Any]] | None
    """The first rows to train on; None if damaged."""

    def to_json(self) -> str:
        """Without what is damaged."""
        return json.dumps(attrs.asdict(self, filter=lambda _, value: value is not None), indent=1)


def inspect(path: Path, *, verify: bool = False) -> Report:
    """Describe a data set.

    Args:
        verify: read every row and check it; otherwise sizes and the chunks' summaries are checked.

    Raises:
        Refused: it is no data set.
    """
    data = LocalData(path)
    manifest = data.manifest
    store = DatasetStore(data, str(path))
    faults = _check(data, verify)
    statistics, preview = None, None
    try:
        statistics = _statistics(store)
        preview = _preview(store, manifest)
    except DamagedError as error:
        faults += [str(error)] if str(error) not in faults else []
    return Report(
        path=str(path),
        layers=manifest.n_layers,
        d_model=manifest.d_model,
        dtype=manifest.dtype,
        compression=manifest.compression,
        tokens=manifest.tokens,
        chunks=len(manifest.chunks),
        chunk_rows=[min(c.rows for c in manifest.chunks), max(c.rows for c in manifest.chunks)],
        block_rows=manifest.block_rows,
        bytes=sum(chunk.bytes for chunk in manifest.chunks),
        bytes_per_token=manifest.row_bytes,
        identity=manifest.identity,
        about=manifest.about,
        rounding_nmse=manifest.rounding_nmse,
        verified="all rows" if verify else "sizes and summaries",
        faults=faults,
        statistics=statistics,
        preview=preview,
    )


def _check(data: LocalData, verify: bool) -> list[str]:
    """What is damaged, a line each."""
    manifest = data.manifest
    faults: list[str] = []
    total = sum(chunk.rows for chunk in manifest.chunks)
    with tqdm(total=total, unit="tok", unit_scale=True, disable=None if verify else True) as bar:
        for number, chunk in enumerate(manifest.chunks):
            try:
                reader = data.chunk(number)
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
    tensors = store.statistics()
    rms = {f"{side}.rms": tensors[f"{side}.rms"].tolist() for side in SIDES}
    return rms | {f"{side}.std": tensors[f"{side}.std"].mean(1).tolist() for side in SIDES}


def _preview(store: DatasetStore, manifest: Manifest) -> list[dict[str, Any]]:
    """The first rows to train on: token, position, and the norms of what the layers read and wrote."""
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


def as_text(report: Report) -> str:
    """The report for people."""
    model, source = (_table(report.about.get(name)) for name in ("model", "source"))
    least, most = report.chunk_rows
    lines = [
        f"{report.path}: {report.tokens['train']:,} tokens to train on, {report.tokens['held_out']:,} held out",
        f"  {report.layers} layers x {report.d_model}, {report.dtype}, compression {report.compression}, "
        f"{report.bytes_per_token:,} bytes per token, {report.bytes / 1e9:.3f} GB in {report.chunks} chunks "
        f"of {least:,} to {most:,} rows, blocks of {report.block_rows}",
        f"  model {model.get('path', '?')}, text {source.get('text', '?')}, context {source.get('context', '?')}",
    ]
    if report.statistics is not None:
        lines.append("  layer  inputs rms      std  rounding   targets rms      std  rounding")
        for layer in range(report.layers):
            row = [
                f"{report.statistics[f'{side}.rms'][layer]:11.4g} {report.statistics[f'{side}.std'][layer]:8.4g} "
                f"{report.rounding_nmse[side][layer]:9.2g}"
                for side in SIDES
            ]
            lines.append(f"  {layer:5} {'  '.join(row)}")
    for shown in report.preview or []:
        norms = " ".join(f"{norm:.3g}" for norm in shown["targets_norm"])
        lines.append(f"  token {shown['token_id']} at {shown['position']}: norms of targets {norms}")
    lines += [f"! {fault}" for fault in report.faults]
    checked = f"checked: {report.verified}"
    lines.append(f"{checked}; {len(report.faults)} faults" if report.faults else f"{checked}; no fault")
    return "\n".join(map(printable, lines))


def _table(value: Any) -> dict[str, Any]:
    """`about` may have been written by another program."""
    return value if isinstance(value, dict) else {}
