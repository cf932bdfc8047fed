"""Small text files, and what is read from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clt_plugins import Refused
from clt_stream import StreamConfig
from clt_stream.text import open_texts
from clt_stream.text.documents import Texts


def opened(path: Path | str, seed: int = 0, **config: Any) -> Texts:
    return open_texts(StreamConfig(text=str(path), **config), seed)


def documents(path: Path | str, **config: Any) -> list[str]:
    """An epoch, sorted."""
    texts, read = opened(path, **config), []
    while (document := texts.next()) is not None:
        read.append(document[1])
    return sorted(read)


def rows(path: Path, *texts: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def table(path: Path, **columns: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def refused(path: Path | str, message: str, **config: Any) -> None:
    with pytest.raises(Refused, match=message) as raised:
        opened(path, **config)
    assert len(str(raised.value).splitlines()) == 1
