"""HDF5 files that may come from anybody.

An HDF5 file can lead out of itself: by links to objects of other files, by rows that lie in other files (external
storage), by rows that are put together from other files (virtual datasets), by filters that are loaded as code when
rows are read. It can also claim rows that were never stored: HDF5 fills them with zeros. All of this is refused by what
the file's headers say, before any row is read.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clt_plugins.errors import Refused
from clt_plugins.files.untrusted import open_regular, passing

if TYPE_CHECKING:
    import h5py

FILTERS = frozenset({1, 2, 3, 32000})
"""HDF5's own filters and h5py's: gzip, shuffle, Fletcher's checksum, LZF."""
LARGEST_CHUNK = 2**30
"""Bytes of a chunk that HDF5 decompresses as a whole."""
DEEPEST = 8
"""Groups within each other."""
MOST_LINKS = 100_000


def open_hdf5(path: Path, filters: frozenset[int] = FILTERS) -> h5py.File:
    """Open an HDF5 file to read it. Nothing outside the file is opened, now or when it is read.

    The file consists of groups and of datasets of plain numbers, all of whose rows lie in the file. No lock is taken:
    some shared file systems have none.

    Args:
        filters: the numbers of the filters that its datasets may have.

    Raises:
        Refused: it is missing, not a regular file, not an HDF5 file or a damaged one, or holds anything else: links
            that are not hard ones, external or virtual datasets, rows that were never stored, other types or filters.
        OSError: it cannot be read now (no permission, too many open files); names the file.
    """
    import h5py

    handle = open_regular(path)
    try:
        size = os.fstat(handle).st_size
    finally:
        os.close(handle)
    try:
        file = h5py.File(path, "r", locking=False)
    except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        if (now := passing(error, path)) is not None:
            raise now from error
        raise Refused(path, f"cannot be read: truncated or damaged, or not HDF5: {_one_line(error)}") from error
    try:
        _check(file.id, size, filters)
        return file
    except BaseException as error:
        file.close()
        if isinstance(error, _Unsafe):
            raise Refused(path, str(error)) from None
        if (now := passing(error, path)) is not None:
            raise now from error
        if isinstance(error, (OSError, RuntimeError, ValueError, KeyError, TypeError)):
            raise Refused(path, f"cannot be read: damaged: {_one_line(error)}") from error
        raise


class _Unsafe(Exception):
    """What is wrong with a file."""


def _check(root: Any, size: int, filters: frozenset[int]) -> None:
    """Look at every link and at the header of every dataset."""
    from h5py import h5d, h5g, h5l, h5o

    groups, links = [(h5g.open(root, b"/"), "", 0)], 0
    while groups:
        group, parent, depth = groups.pop()
        links += group.get_num_objs()
        if links > MOST_LINKS or depth > DEEPEST:
            raise _Unsafe(f"more than {MOST_LINKS:,} objects, or groups nested more than {DEEPEST} deep")
        names: list[bytes] = []
        group.links.iterate(names.append)
        for name in names:
            shown = f"{parent}/{name.decode(errors='replace')}"
            # The link's own header; nothing is opened yet.
            if group.links.get_info(name).type != h5l.TYPE_HARD:
                raise _Unsafe(f"{shown} is a link that may lead out of the file")
            child = h5o.open(group, name)
            if isinstance(child, h5g.GroupID):
                groups.append((child, shown, depth + 1))
            elif isinstance(child, h5d.DatasetID):
                _check_dataset(child, shown, size, filters)
            else:
                raise _Unsafe(f"{shown} is neither a group nor a dataset")


def _check_dataset(dataset: Any, name: str, size: int, filters: frozenset[int]) -> None:
    """Look at the header of a dataset in a file of `size` bytes."""
    from h5py import h5d, h5s, h5t

    # First where its rows lie: to ask a virtual dataset for its shape may already open other files.
    header = dataset.get_create_plist()
    layout = header.get_layout()
    if layout not in (h5d.COMPACT, h5d.CONTIGUOUS, h5d.CHUNKED):
        raise _Unsafe(f"{name} is a virtual dataset: its rows would be read from other files")
    if header.get_external_count():
        raise _Unsafe(f"{name} has external storage: its rows would be read from other files")
    for number in range(header.get_nfilters()):
        if (code := header.get_filter(number)[0]) not in filters:
            raise _Unsafe(f"{name} has a filter that is not accepted, number {code}")
    kind = dataset.get_type()
    if kind.get_class() not in (h5t.INTEGER, h5t.FLOAT) or kind.get_size() > 8:
        raise _Unsafe(f"{name} does not hold plain numbers")
    space = dataset.get_space()
    if space.get_simple_extent_type() != h5s.SIMPLE:
        raise _Unsafe(f"{name} is not an array")
    shape = space.get_simple_extent_dims()
    claimed = math.prod(shape) * kind.get_size()
    if layout == h5d.CHUNKED:
        chunk = header.get_chunk()
        if math.prod(chunk) * kind.get_size() > LARGEST_CHUNK:
            raise _Unsafe(f"{name} has chunks of more than {LARGEST_CHUNK:,} bytes")
        pieces = math.prod(-(-rows // length) for rows, length in zip(shape, chunk, strict=True))
        # The number that is claimed is compared first: to count the stored ones takes as long as there are some.
        stored = dataset.get_num_chunks() if pieces <= size else -1
        fits = stored == pieces and dataset.get_storage_size() <= size
    elif layout == h5d.CONTIGUOUS:
        offset = dataset.get_offset()
        fits = claimed == 0 or (offset is not None and offset + claimed <= size)
    else:
        fits = dataset.get_storage_size() >= claimed
    if not fits:
        raise _Unsafe(f"{name} claims {claimed:,} bytes that are not all in the file: truncated or damaged")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
