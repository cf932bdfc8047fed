"""Machine code on disk that several processes share: one compiles, the others wait and read.

Numba's own cache is not made for processes that start together, as ranks do. Each compiles everything. And two that
compile a function for different types may give their results the same file: what is read later is code for other types.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from numba.core import sigutils
from numba.core.caching import IndexDataCacheFile
from numba.core.compiler_lock import global_compiler_lock

from clt_plugins import Lock

logger = logging.getLogger(__name__)

POLL_S, TOLD_AFTER_S = 0.05, 60.0
"""How often a process that waits looks, and when it says for whom it waits: all loops together take a minute or two."""


def keep(made: Any, stamp: Any) -> bool:
    """Keep what a dispatcher of Numba compiles; False if this Numba's cache is not as it is known here.

    Args:
        made: what `njit(cache=True)` returned.
        stamp: what is on disk counts only while this stays the same.
    """
    cache: Any = getattr(made, "_cache", None)
    before = getattr(cache, "_cache_file", None)
    if type(before) is not IndexDataCacheFile or not hasattr(cache, "_impl"):
        return False
    file = _Files(cache._cache_path, cache._impl.filename_base, stamp)
    cache._cache_file = file
    compile_it = made.compile

    def one_at_a_time(signature: Any) -> Any:
        # Numba's lock first: another thread that compiles may need this function, and wait for its file.
        with global_compiler_lock:
            known = tuple(sigutils.normalize_signature(signature)[0]) in made.overloads
            if known or cache._index_key(signature, made.targetctx.codegen()) in file._load_index():
                return compile_it(signature)  # only read: ranks that start need not wait for each other
            # Another process may be at it: what it has written is found.
            with _locked(Path(file._cache_path, f".{file._index_name}.lock")):
                return compile_it(signature)

    made.compile = one_at_a_time
    return True


class _Files(IndexDataCacheFile):
    """An index of what there is, and a file for each signature, whose name no other signature has."""

    def save(self, key: Any, data: Any) -> None:
        """Write the data, then the index: a process that is killed between them leaves no entry with other data."""
        digest = hashlib.sha256(repr((key, self._source_stamp)).encode()).hexdigest()
        name = self._data_name(int(digest[:12], 16))
        self._save_data(name, data)
        index = {**self._load_index(), key: name}
        self._save_index(index)
        before, after = self._data_name_pattern.split("{number:d}")
        for file in Path(self._cache_path).glob("*.nbc"):  # of files as they were
            if file.name.startswith(before) and file.name.endswith(after) and file.name not in index.values():
                with suppress(OSError):
                    file.unlink()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock; nothing is locked in a folder that can only be read."""
    lock, started, told = Lock(path), time.monotonic(), False
    try:
        while (holder := lock.try_acquire()) is not None:
            if not told and time.monotonic() - started > TOLD_AFTER_S:
                logger.warning("%s: waiting for %s, which compiles the kernels", path.parent, holder)
                told = True
            time.sleep(POLL_S)
    except OSError:
        yield
        return
    try:
        yield
    finally:
        lock.release()
