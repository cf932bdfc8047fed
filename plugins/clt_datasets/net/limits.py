"""What a server and a client allow the other to take: bytes, connections, time."""

from __future__ import annotations

import attrs

try:
    import resource
except ImportError:  # not on Windows
    resource = None  # type: ignore[assignment]

LARGEST_BLOCK = 2**26
"""Bytes of a block; larger ones are not served."""
LARGEST_MANIFEST = 2**25
"""Bytes of a manifest: about 150,000 chunks."""
LARGEST_STATISTICS = 2**26
LARGEST_SUMMARY = 2**28
"""Of a chunk."""
RESERVED = 40
"""Descriptors for everything but connections and uploads: standard streams, libraries, files that are read."""


@attrs.frozen(kw_only=True)
class Limits:
    """Limits of a server. Times are in seconds."""

    connections: int = 1000
    """Connections at a time, of all clients together; fewer where the process may not open so many descriptors."""
    head_s: float = 10.0
    """How long a request's head may take, and a TLS handshake."""
    idle_s: float = 120.0
    """How long a connection may wait for its next request."""
    stalled_s: float = 60.0
    """How long a client may take to accept, or to send, the next 256 KiB; it may continue later."""
    bodies: int = 16
    """Answers with rows that are in memory at a time; other requests wait for one to end."""
    body_stalled_s: float = 4.0
    """While others wait, a client that accepts nothing for so long is dropped."""
    body_s: float = 30.0
    """While others wait, an answer that takes longer is ended; its client asks for the rest."""
    uploads: int = 32
    """Uploads at a time."""
    partial_s: float = 7 * 86400.0
    """An unfinished upload that was not continued for so long is deleted."""

    def open_connections(self) -> int:
        """Connections at a time, so that descriptors for files are left."""
        if resource is None:
            return self.connections
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        if files == resource.RLIM_INFINITY:
            return self.connections
        return max(8, min(self.connections, files - RESERVED - self.uploads))
