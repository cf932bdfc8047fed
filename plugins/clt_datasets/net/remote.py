"""The source `remote`: a data set on a server, as `local` is one in a folder."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from clt_datasets.dataset import DatasetStore
from clt_datasets.format.manifest import Manifest, digest
from clt_datasets.net.client import Connection
from clt_plugins import DamagedError, StoredSource

if TYPE_CHECKING:
    from clt_datasets import RemoteConfig
    from clt_plugins import Context


class Remote:
    """A data set on a server, as `folder.Folder` is one in a folder. Every byte is checked against the manifest."""

    def __init__(self, connection: Connection):
        self.connection = connection
        self.manifest = Manifest.from_json(connection.get("manifest"), connection.base)
        self._summaries: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._lock = threading.Lock()

    def read(self, number: int, begin: int, into: list[np.ndarray]) -> None:
        """Read a block; see `ChunkReader.read`. What arrives damaged is fetched once more."""
        wanted = int(self._summary(number)[0][begin // self.manifest.block_rows])
        for _ in range(2):
            self.connection.fill(f"chunks/{number}/blocks/{begin}", into)
            if digest(*into) == wanted:
                return
        rows = f"rows {begin} to {begin + len(into[0]) - 1}"
        file = self.manifest.chunks[number].file
        raise DamagedError(f"{self.connection.base}: {file}: chunk {number}, {rows}: damaged on the way, twice")

    def scales(self, number: int) -> np.ndarray:
        """Of int8 rows of a chunk, [2, L]."""
        return self._summary(number)[1]

    def statistics(self) -> bytes:
        """The statistics file, checked."""
        data = self.connection.get("statistics")
        if xxhash.xxh3_128_hexdigest(data) != self.manifest.statistics:
            raise DamagedError(f"{self.connection.base}: statistics damaged on the way")
        return data

    def close(self) -> None:
        """Close the connections."""
        self.connection.close()

    def _summary(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Checksums and scales of a chunk."""
        with self._lock:
            if number in self._summaries:
                return self._summaries[number]
        chunk = self.manifest.chunks[number]
        data = self.connection.get(f"chunks/{number}/summary")
        blocks = -(-chunk.rows // self.manifest.block_rows) + 1
        checksums = np.frombuffer(data[: 8 * blocks], "<u8")
        scales = np.frombuffer(data[8 * blocks :][: 8 * self.manifest.layers], "<f4").reshape(2, -1).copy()
        whole = len(checksums) == blocks and digest(data[8 * blocks :]) == checksums[-1]
        if not whole or xxhash.xxh3_128_hexdigest(checksums.tobytes()) != chunk.checksum:
            raise DamagedError(f"{self.connection.base}: {chunk.file}: chunk {number}: its checksums are damaged")
        with self._lock:
            self._summaries[number] = checksums, scales
        return checksums, scales


def build_remote(config: RemoteConfig, context: Context) -> StoredSource:
    """The source `remote`."""
    connection = Connection(config.url, config.dataset, patience_s=config.patience_s, ca_file=config.ca_file)
    try:
        store = DatasetStore(Remote(connection), connection.base)
        return StoredSource(store, context, buffer_tokens=config.buffer_tokens, on_corrupt=config.on_corrupt)
    except BaseException:
        connection.close()
        raise
