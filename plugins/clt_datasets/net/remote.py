"""The source `remote`: a data set on a server."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from clt_datasets.dataset import DatasetStore
from clt_datasets.format.files import digest
from clt_datasets.format.manifest import Manifest
from clt_datasets.net.client import Client
from clt_datasets.net.limits import LARGEST_BLOCK, LARGEST_MANIFEST, LARGEST_STATISTICS, LARGEST_SUMMARY
from clt_plugins import DamagedError, Refused, StoredSource

if TYPE_CHECKING:
    from clt_datasets import RemoteConfig
    from clt_plugins import Context


class RemoteData:
    """A data set on a server. Every byte is checked against the manifest.

    Raises:
        OSError: no answer.
        Refused: the server has no such data set, or sends something else.
    """

    def __init__(self, client: Client):
        self.client = client
        self.manifest = self._read_manifest()
        self._summaries: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._lock = threading.Lock()

    def read(self, number: int, begin: int, into: list[np.ndarray]) -> None:
        """Read a block; see `Data.read`. A block that arrives damaged is fetched once more."""
        checksum = int(self._summary(number)[0][begin // self.manifest.block_rows])
        with self._not_replaced():
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
        with self._not_replaced():
            # Mean and deviation of each dimension, a few numbers for each layer, and the header.
            size = 64 * self.manifest.n_layers * (self.manifest.d_model + 1) + 2**16
            data = self.client.get("statistics", min(size, LARGEST_STATISTICS))
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
        manifest, chunk = self.manifest, self.manifest.chunks[number]
        blocks = -(-chunk.rows // manifest.block_rows) + 1
        # Scales and errors of 4 and 8 bytes, two moments of 8, of each side.
        size = 8 * blocks + 2 * manifest.n_layers * (4 + 8 + 16 * manifest.d_model)
        with self._not_replaced():
            data = self.client.get(f"chunks/{number}/summary", min(size, LARGEST_SUMMARY))
            sums, rest = data[: 8 * blocks], data[8 * blocks :]
            checksums = np.frombuffer(sums, "<u8") if len(sums) == 8 * blocks else np.zeros(1, "<u8")
            if len(data) != size or xxhash.xxh3_128_hexdigest(sums) != chunk.checksum or digest(rest) != checksums[-1]:
                raise DamagedError(f"{self.client.base}: {chunk.file}: chunk {number}: its checksums are damaged")
        scales = np.frombuffer(rest[: 8 * manifest.n_layers], "<f4").reshape(2, -1).copy()
        with self._lock:
            self._summaries[number] = checksums, scales
        return checksums, scales

    def _read_manifest(self) -> Manifest:
        manifest = Manifest.from_json(self.client.get("manifest", LARGEST_MANIFEST), self.client.base)
        if manifest.largest_block > LARGEST_BLOCK:
            most = max(1, LARGEST_BLOCK // manifest.row_bytes)
            text = f"its blocks have more than {LARGEST_BLOCK:,} bytes, and no server sends these"
            raise Refused(
                self.client.base, f"{text}: generate it again with --block-rows {most} or fewer, into another folder"
            )
        return manifest

    @contextmanager
    def _not_replaced(self) -> Iterator[None]:
        """What fails inside fails by its true reason if the server has another data set by now.

        Raises:
            Refused: it has.
        """
        try:
            yield
        except (DamagedError, Refused):
            now = self._read_manifest()
            if (now.identity, now.statistics) != (self.manifest.identity, self.manifest.statistics):
                text = "the server has another data set of this name now: train on one of them from the beginning"
                raise Refused(self.client.base, text) from None
            raise


def build_remote(config: RemoteConfig, context: Context) -> StoredSource:
    """The source `remote`."""
    client = Client(config.url, config.dataset, patience_s=config.patience_s, ca_file=config.ca_file)
    try:
        store = DatasetStore(RemoteData(client), client.base)
        return StoredSource(
            store, context, buffer_tokens=config.buffer_tokens, on_corrupt=config.on_corrupt, setting="source.dataset"
        )
    except BaseException:
        client.close()
        raise
