"""Text from `datasets`: data sets of the hub, and local text, JSON-lines and Parquet files."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets

from clt_plugins import Refused
from clt_stream.library_errors import one_line, reason

if TYPE_CHECKING:
    from clt_stream import StreamConfig

READERS = {".txt": "text", ".jsonl": "json", ".parquet": "parquet"}
"""File endings, and the `datasets` builder that reads each."""

ABOUT = {
    "BuilderConfig": "source.subset",
    "Config name": "source.subset",
    "Unknown split": "source.split",
    "Bad split": "source.split",
}
"""Beginnings of messages of `datasets`, and the setting that each is about. All others are about the name."""


def open_dataset(config: StreamConfig) -> tuple[Any, str]:
    """A `Dataset`, or an `IterableDataset` if `config.streaming`; and the identity of its content.

    Raises:
        Refused: there are no such files, data set, subset or split; a file cannot be read; the hub does not answer.
    """
    name = config.text
    path = Path(name).expanduser()
    if path.exists() or name.startswith(("/", ".", "~")) or path.suffix in READERS:
        return _local(config, path)
    try:
        builder = datasets.load_dataset_builder(name, config.subset or None)
        content = f"revision {builder.hash}"
        if config.streaming:
            return builder.as_streaming_dataset(split=config.split), content
        builder.download_and_prepare()
        return builder.as_dataset(split=config.split), content
    except MemoryError:
        raise
    except Exception as error:  # types differ: OSError, ValueError, those of datasets, huggingface_hub and pyarrow
        setting = next((key for start, key in ABOUT.items() if str(error).startswith(start)), "source.text")
        kinds = " (text is a file, a folder, a hub data set, or 'python-stdlib')" if setting == "source.text" else ""
        raise Refused(setting, f"{reason(error, name)}{kinds}") from error


def _local(config: StreamConfig, path: Path) -> tuple[Any, str]:
    files = _files(path)
    kind = READERS[files[0].suffix]
    options = {"sample_by": config.sample_by} if kind == "text" else {}
    names = [str(file) for file in files]
    try:
        dataset = datasets.load_dataset(kind, data_files=names, split="train", streaming=config.streaming, **options)
        return dataset, _content(files)
    except MemoryError:
        raise
    except Exception as error:  # the files are damaged; a cache on a full disk is an OSError, and says so
        raise Refused("source.text", f"cannot read {path}: {one_line(error.__cause__ or error)}") from error


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
    filled = [file for file in files if not _is_empty(file)]
    if not filled:
        raise Refused("source.text", f"{str(path)!r} is empty")
    return filled


def _is_empty(file: Path) -> bool:
    try:
        with file.open("rb") as opened:
            return not opened.read(1)
    except OSError as error:
        raise Refused("source.text", f"cannot read {file}: {error.strerror}") from error


def _content(files: list[Path]) -> str:
    digests, size = hashlib.sha256(), 0
    for file in files:
        with file.open("rb") as opened:
            digests.update(hashlib.file_digest(opened, "sha256").digest())
            size += opened.tell()
    return f"sha256 {digests.hexdigest()} of {len(files)} file{'s' * (len(files) > 1)}, {size} bytes"
