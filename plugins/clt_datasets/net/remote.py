"""The source `remote`: a data set on a server."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from clt_datasets.dataset import DatasetStore
from clt_datasets.format.files import digest
from clt_datasets.format.manifest import Manifest
from clt_datasets.net.client import Client
from clt_plugins import DamagedError, StoredSource

if TYPE_CHECKING:
    from clt_datasets import RemoteConfig
    from clt_plugins import Context


class RemoteData:
    """A data set on a server. Every byte is checked against the manifest."""

    def __init__(self, client: Client):
        self.client = client
        self.manifest = Manifest.from_json(client.get("manifest"), client.base)
        self._summaries: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._lock = threading.Lock()

    def read(self, number: int, begin: int, into: list[np.ndarray]) -> None:
        """Read a block; see `Data.read`. A block that arrives damaged is fetched once more."""
        checksum = int(self._summary(number)[0][begin // self.manifest.block_rows])
        for _ in range(2):
            self.client.fill(f"chunks/{number}/blocks/{begin}", into)
            if digest(*into) == checksum:
                return
        rows = f"rows {begin} to {begin + len(into[0]) - 1}"
        file = self.manifest.chunks[number].file
        raise DamagedError(f"{self.client.base}: {file}: chunk {number}, {rows}: damaged on the way, twice")

    def scales(self, number: int) -> np.ndarray:
        """Scales of a chunk's int8 rows, [2, L] float32."""
        return self._summary(number)[1]

    def statistics(self) -> bytes:
        """The statistics file."""
        data = self.client.get("statistics")
        if xxhash.xxh3_128_hexdigest(data) != self.manifest.statistics:
            raise DamagedError(f"{self.client.base}: statistics damaged on the way")
        return data

    def close(self) -> None:
        """Close the connections."""
        self.client.close()

    def _summary(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Checksums and scales of a chunk."""
        with self._lock:
            if number in self._summaries:
                return self._summaries[number]
        chunk = self.manifest.chunks[number]
        data = self.client.get(f"chunks/{number}/summary")
        blocks = -(-chunk.rows // self.manifest.block_rows) + 1
        sums, rest = data[: 8 * blocks], data[8 * blocks :]
        checksums = np.frombuffer(sums, "<u8") if len(sums) == 8 * blocks else np.zeros(1, "<u8")
        if xxhash.xxh3_128_hexdigest(sums) != chunk.checksum or digest(rest) != checksums[-1]:
            raise DamagedError(f"{self.client.base}: {chunk.file}: chunk {number}: its checksums are damaged")
        scales = np.frombuffer(rest[: 8 * self.manifest.n_layers], "<f4").reshape(2, -1).copy()
        with self._lock:
            self._summaries[number] = checksums, scales
        return checksums, scales


def build_remote(config: RemoteConfig, context: Context) -> StoredSource:
    """The source `remote`."""
    client = Client(config.url, config.dataset, patience_s=config.patience_s, ca_file=config.ca_file)
    try:
        store = DatasetStore(RemoteData(client), client.base)
        return StoredSource(store, context, buffer_tokens=config.buffer_tokens, on_corrupt=config.on_corrupt)
    except BaseException:
        client.close()
        raise
