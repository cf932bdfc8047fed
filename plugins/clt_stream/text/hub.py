"""Text from `datasets`: hub data sets, and local text, JSON-lines and Parquet files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets

from clt_plugins import Refused
from clt_stream.text.documents import one_line

if TYPE_CHECKING:
    from clt_stream import StreamConfig

READERS = {".txt": "text", ".jsonl": "json", ".parquet": "parquet"}
"""File endings -> the `datasets` builder that reads them."""


def open_dataset(config: StreamConfig) -> Any:
    """A `Dataset`, or an `IterableDataset` where `config.streaming`.

    Raises:
        ValueError: no such files or data set, a file that cannot be read, no connection to the hub.
    """
    name = config.text
    path = Path(name).expanduser()
    if path.exists() or name.startswith(("/", ".", "~")) or path.suffix in READERS:
        return _local(config, path)
    try:
        return datasets.load_dataset(name, config.subset or None, split=config.split, streaming=config.streaming)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise Refused(
            "source.text",
            f"cannot get {name!r}: {one_line(error)} (text is a file, a folder, a hub data set, or 'python-stdlib')",
        ) from error


def _local(config: StreamConfig, path: Path) -> Any:
    files = _files(path)
    kind = READERS[files[0].suffix]
    options = {"sample_by": config.sample_by} if kind == "text" else {}
    names = [str(file) for file in files]
    try:
        return datasets.load_dataset(kind, data_files=names, split="train", streaming=config.streaming, **options)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        cause = error.__cause__ or error
        raise Refused("source.text", f"cannot read {path}: {one_line(cause)}") from error


def _files(path: Path) -> list[Path]:
    """The files that a path stands for, in order, all of one kind."""
    known = ", ".join(READERS)
    if not path.exists():
        raise Refused("source.text", f"no file or folder {str(path)!r}")
    files = sorted(p for p in path.rglob("*") if p.suffix in READERS and p.is_file()) if path.is_dir() else [path]
    kinds = sorted({file.suffix for file in files})
    if not files:
        raise Refused("source.text", f"no {known} files in {str(path)!r}")
    if len(kinds) > 1:
        raise Refused(
            "source.text", f"{str(path)!r} mixes {' and '.join(kinds)} files: put each kind in its own folder"
        )
    if kinds[0] not in READERS:
        raise Refused("source.text", f"{str(path)!r}: expected one of {known}")
    filled = []
    for file in files:
        try:
            with file.open("rb") as opened:
                filled += [file] if opened.read(1) else []
        except OSError as error:
            raise Refused("source.text", f"cannot read {file}: {error.strerror}") from error
    if not filled:
        raise Refused("source.text", f"{str(path)!r} is empty")
    return filled
