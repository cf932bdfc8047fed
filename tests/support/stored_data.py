"""Data sets for tests: written through `generate`, from a source that is small and known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from clt_datasets import LocalConfig, RemoteConfig, clt_sources
from clt_datasets.format.chunk import Style, write_chunk
from clt_datasets.format.manifest import write_manifest
from clt_datasets.make.generate import generate
from clt_plugins import Batch, Context, Single
from clt_plugins.recipe.read import read_recipe
from tests.support.helpers import plugins, tables

SMALL = {"tokens": 128, "held_out": 32, "chunk_bytes": 12_000, "block_rows": 8}
"""Options of `generated`: a few small chunks."""


def make_context(*, batch_tokens: int = 16, rank: int = 0, ranks: int = 1, seed: int = 3) -> Context:
    """The context of a stored source."""
    return Context(
        recipe=None,
        seed=seed,
        device=torch.device("cpu"),
        dtype=torch.float32,
        batch_tokens=batch_tokens,
        steps=1,
        parallel=Single(rank, ranks),
    )


def numbered(rows: int, first: int = 0, layers: int = 2, d_model: int = 3, dtype: torch.dtype = torch.float32) -> Batch:
    """Rows that can be told apart: the token id is the row's number."""
    random = torch.Generator().manual_seed(first)
    inputs, targets = (torch.randn(rows, layers, d_model, generator=random).to(dtype) for _ in range(2))
    ids = torch.arange(first, first + rows)
    return Batch(inputs, targets, ids, torch.stack([ids // 7, ids % 7], 1))


def write_numbered(
    folder: Path, sizes: list[int], held_out: int = 10, block_rows: int = 8, compression: Any = "none", **rows: Any
) -> list[Batch]:
    """A data set of numbered rows with chunks of these sizes; held-out rows have the numbers from a million on."""
    folder.mkdir()
    style = Style(str(rows.get("dtype", torch.float32)).removeprefix("torch."), compression, block_rows)
    starts = [sum(sizes[:n]) for n in range(len(sizes))]
    chunks = [numbered(size, start, **rows) for size, start in zip(sizes, starts, strict=True)]
    paths = [folder / f"train_{n:05}.h5" for n in range(len(sizes))]
    if held_out:
        chunks.append(numbered(held_out, 1_000_000, **rows))
        paths.append(folder / "held_out_00000.h5")
    for path, chunk in zip(paths, chunks, strict=True):
        write_chunk(path, chunk, style, {})
    write_manifest(folder, paths, about={})
    return chunks


def local(folder: Path, context: Any = None, **config: Any) -> Any:
    """The source, built as for a recipe."""
    spec = next(spec for spec in clt_sources() if spec.name == "local")
    return spec.build(LocalConfig(path=folder, **{"buffer_tokens": 64, **config}), context or make_context())


def remote(server: Any, dataset: str = "data", context: Any = None, **config: Any) -> Any:
    """The source, built as for a recipe; from a server or its address."""
    spec = next(spec for spec in clt_sources() if spec.name == "remote")
    settings = {"buffer_tokens": 64, "patience_s": 60.0} | config
    return spec.build(
        RemoteConfig(url=getattr(server, "url", server), dataset=dataset, **settings), context or make_context()
    )


def generated(folder: Path, *, recipe: dict[str, Any] | None = None, **options: Any) -> Any:
    """Generate a data set; returns the typed recipe."""
    typed = read_recipe(recipe or tables(), plugins=plugins())
    generate(typed, folder, **options)
    return typed


def join(batches: list[Batch]) -> Batch:
    """Batches one after the other."""
    names = ("inputs", "targets", "token_ids", "positions")
    return Batch(*(torch.cat([getattr(b, n) for b in batches]) for n in names if getattr(batches[0], n) is not None))


def equal(one: Batch, two: Batch) -> bool:
    """Bit for bit."""
    pairs = [(getattr(one, n), getattr(two, n)) for n in ("inputs", "targets", "token_ids", "positions")]
    return all(a.dtype == b.dtype and torch.equal(a, b) if a is not None else b is None for a, b in pairs)


def content(folder: Path) -> dict[str, bytes]:
    """All files but hidden ones."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if not path.name.startswith(".")}


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """By which a file that was written again differs."""
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in folder.glob("*.h5")}
