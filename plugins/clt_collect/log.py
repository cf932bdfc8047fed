"""The log of a pass over text: which features are active at which token, on disk, only ever appended to.

One rank's log has a file for each column:

| file | one number for each | |
| --- | --- | --- |
| ids, context, position | row (token) | what the token is |
| count | row | its pairs (active features) |
| feature | pair, by row | layer * F + feature |
| row, value | pair, by shard, then by feature, then by row | where it is active, and the value |
| start | own feature of each shard, and one more | where its pairs begin in `row` and `value` |

A shard is what was kept in memory before it was written. A commit says how many rows, pairs and shards of these files
count, and the checksum of each file up to there. After a kill, what is behind the last commit is cut off. A commit
whose files are damaged does not count.

A pair has 12 bytes on disk, a row 20, a shard 8 for each feature. In memory are the pairs of a shard, and what sorting
them needs: 60 bytes each.

Shapes: B rows of a batch, N pairs, G own features of all layers.
"""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
import time
import zlib
from pathlib import Path
from typing import Any

import attrs
import numpy as np

from clt_plugins import load_json, write_json

logger = logging.getLogger(__name__)

Array = np.ndarray[Any, Any]

ROWS = {"ids": np.int32, "context": np.int64, "position": np.int32, "count": np.int32}
PAIRS = {"feature": np.int32, "row": np.int32, "value": np.float32}
STARTS = {"start": np.int64}
COLUMNS = ROWS | PAIRS | STARTS

SHARD = 2**21
"""Pairs in memory at which a shard is written."""
SECONDS = 30.0
"""So often, at least, a shard is written: a kill costs no more than that."""
BLOCK = 2**24
"""Bytes of a file that are read at once."""
KEPT = 2
"""Commits that are remembered: of several ranks, one may have made one more than another when all were killed."""


@attrs.frozen(kw_only=True)
class Commit:
    """How much of a log counts."""

    batches: int = 0
    """Batches of the source that all ranks together have read."""
    rows: int = 0
    pairs: int = 0
    shards: int = 0
    lowest: float | None = None
    """The smallest active value."""
    highest: float | None = None
    """The largest active value."""
    source: dict[str, Any] | None = None
    """The source's state, for training text."""
    complete: bool = False
    """Whether all of the text was read."""
    checksums: dict[str, int] = attrs.field(factory=dict)
    """CRC-32 of what counts of each file, by column."""


class Log:
    """The log of one rank, to be written.

    Args:
        folder: where the files of all ranks are.
        rank: whose log it is.
        own: G, features of all layers that the rank has.
        key: what the log is of, as plain data. A log of something else is thrown away.
    """

    def __init__(self, folder: Path, rank: int, own: int, key: Any):
        self.folder, self.rank, self.own, self.key = folder, rank, own, json.loads(json.dumps(key))
        self.commits = self._commits()
        self.commit = Commit()
        """What is committed."""
        self._files: dict[str, Any] = {}
        self._waiting: list[dict[str, Array]] = []
        self._pairs = 0
        self._since = time.monotonic()

    def _path(self, column: str) -> Path:
        return self.folder / f"{column}-{self.rank}.bin"

    @property
    def _record(self) -> Path:
        return self.folder / f"commits-{self.rank}.json"

    def _commits(self) -> list[Commit]:
        """The commits of an earlier process that can be gone on from; the first one is that of an empty log."""
        commits = recorded = self._recorded()
        for column in COLUMNS:
            commits = self._undamaged(column, commits)
        if len(commits) < len(recorded):
            logger.warning("%s: damaged: reading goes on from what is whole before it", self.folder)
        return [Commit(), *commits]

    def _recorded(self) -> list[Commit]:
        """What the record says; nothing if it is of something else, or damaged."""
        if not self._record.is_file():
            return []
        try:
            record = load_json(self._record)
            if record["checksum"] != _checksum(record):
                raise ValueError("its checksum is another")
            return [Commit(**one) for one in record["commits"]] if record["key"] == self.key else []
        except (ValueError, TypeError, KeyError) as error:  # only a log: what it says is read from the text again
            logger.warning("%s: damaged (%s): reading starts anew", self._record, error)
            return []

    def _undamaged(self, column: str, commits: list[Commit]) -> list[Commit]:
        """The commits, in their order, of which a column's file has all that they count. It is read once."""
        path, kept, checksum, done = self._path(column), [], 0, 0
        try:
            with path.open("rb") if path.is_file() else io.BytesIO() as file:
                for commit in commits:
                    end = _bytes(column, commit, self.own)
                    while done < end and (block := file.read(min(BLOCK, end - done))):
                        checksum, done = zlib.crc32(block, checksum), done + len(block)
                    if done == end and checksum == commit.checksums.get(column, 0):
                        kept.append(commit)
        except OSError as error:
            raise OSError(f"{path}: cannot be read: {error.strerror}") from error
        return kept

    def begin(self, batches: int) -> Commit:
        """Go on from the commit after some batches, which is one of `commits`.

        Raises:
            OSError: a file cannot be written.
        """
        commit = next(one for one in reversed(self.commits) if one.batches == batches)
        self.commits = [one for one in self.commits if one.batches <= batches]
        self.commit = commit
        for column in COLUMNS:
            path = self._path(column)
            if path.is_symlink() or (path.exists() and not path.is_file()):
                raise OSError(f"{path}: not a regular file: remove {self.folder}, and start again")
            file = path.open("ab")
            file.truncate(_bytes(column, commit, self.own))
            file.seek(0, os.SEEK_END)
            self._files[column] = file
        return commit

    @property
    def full(self) -> bool:
        """Whether a shard is to be written."""
        return self._pairs >= SHARD or time.monotonic() - self._since > SECONDS

    @property
    def size(self) -> tuple[int, int]:
        """Rows and pairs so far."""
        return self.commit.rows + sum(len(one["ids"]) for one in self._waiting), self.commit.pairs + self._pairs

    def add(self, rows: dict[str, Array], feature: Array, own: Array, value: Array) -> None:
        """Add rows; they are kept in memory.

        Args:
            rows: the columns `ids`, `context`, `position` and `count`, [B].
            feature: layer * F + feature of each pair, [N], by row.
            own: the same, counted among the features of this rank, [N].
            value: [N] float32.
        """
        self._waiting.append({**rows, "feature": feature, "own": own, "value": value})
        self._pairs += len(feature)

    def write(self, batches: int, source: dict[str, Any] | None, *, complete: bool = False) -> None:
        """Write what is in memory as a shard, and commit it.

        Args:
            batches: all batches that were read.
            source: the source's state.
            complete: whether the pass ends with them.

        Raises:
            OSError: the disk is full or failed.
        """
        if self._waiting:
            self.commit = self._append()
        self.commit = attrs.evolve(self.commit, batches=batches, source=source, complete=complete)
        self.commits = [*self.commits, self.commit][-KEPT:]
        partial = self._record.with_suffix(".partial")
        record = {"key": self.key, "commits": [attrs.asdict(one) for one in self.commits]}
        write_json(partial, {**record, "checksum": _checksum(record)})
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(self._record)
        self._since = time.monotonic()

    def _append(self) -> Commit:
        """Write a shard."""
        before = self.commit
        parts = {name: np.concatenate([one[name] for one in self._waiting]) for name in (*ROWS, "feature")}
        own = np.concatenate([one["own"] for one in self._waiting])
        value = np.concatenate([one["value"] for one in self._waiting])
        self._waiting, self._pairs = [], 0
        order = by_feature(own, self.own)
        row = np.repeat(np.arange(before.rows, before.rows + len(parts["count"]), dtype=np.int32), parts["count"])
        parts["row"], parts["value"] = row[order], value[order]
        parts["start"] = before.pairs + np.concatenate([[0], np.cumsum(np.bincount(own, minlength=self.own))])
        checksums = dict(before.checksums)
        for column, dtype in COLUMNS.items():
            written = np.ascontiguousarray(parts[column], dtype).tobytes()
            checksums[column] = zlib.crc32(written, checksums.get(column, 0))
            self._files[column].write(written)
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        extremes = [number for number in (before.lowest, before.highest) if number is not None]
        if len(value):
            extremes += [float(value.min()), float(value.max())]
        return attrs.evolve(
            before,
            rows=before.rows + len(parts["count"]),
            pairs=before.pairs + len(value),
            shards=before.shards + 1,
            lowest=min(extremes, default=None),
            highest=max(extremes, default=None),
            checksums=checksums,
        )

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()
        self._files = {}


def _checksum(record: dict[str, Any]) -> int:
    """CRC-32 of a record of commits."""
    return zlib.crc32(json.dumps([record["key"], record["commits"]], sort_keys=True).encode())


def length_of(column: str, commit: Commit, own: int) -> int:
    """How many numbers of a column a commit has."""
    if column in ROWS:
        return commit.rows
    return commit.pairs if column in PAIRS else commit.shards * (own + 1)


def _bytes(column: str, commit: Commit, own: int) -> int:
    return length_of(column, commit, own) * np.dtype(COLUMNS[column]).itemsize


def by_feature(feature: Array, features: int) -> Array:
    """The order [N] of pairs by feature; those of one feature stay in their order."""
    # numpy sorts numbers of 16 bits by counting: two of them are several times as fast as one of 32.
    order = np.argsort((feature & 0xFFFF).astype(np.uint16), kind="stable")
    if features > 2**16:
        order = order[np.argsort((feature >> 16).astype(np.uint16)[order], kind="stable")]
    return order


def disk_bytes(rows: int, pairs: float, features: int) -> float:
    """What a log of so many rows and pairs takes on disk, about.

    Args:
        features: G.
    """
    return 20 * rows + 12 * pairs + 8 * features * (1 + pairs / SHARD)


def free_bytes(folder: Path) -> int:
    """What the disk of a folder has free."""
    return shutil.disk_usage(folder).free
