"""Memory that a block takes at its peak, whatever the process had before."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@contextmanager
def peak() -> Iterator[Callable[[], int]]:
    """A block; what is yielded says by how many bytes the process has grown in it, at most. 0 where Linux's `/proc` is
    not there."""
    # The high-water mark begins anew: it never falls by itself, and would hide what is smaller than an earlier peak.
    with suppress(OSError):
        CLEAR.write_text("5")
    before = _bytes("VmRSS")
    yield lambda: max(0, _bytes("VmHWM") - before)


def _bytes(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", STATUS.read_text() if STATUS.exists() else "", re.M)
    return 1024 * int(found[1]) if found else 0
