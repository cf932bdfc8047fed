"""Files of a repository of the hub, downloaded into the hub's cache and checked.

Whoever wrote the repository is not trusted. A file's size is known before it is downloaded, tables are small, the
header of a safetensors file is read first, and what arrives has the checksum that the hub lists. Pickles, which can run
code, are never downloaded.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from clt_plugins.errors import Refused
from clt_plugins.files.atomic import remove
from clt_plugins.files.hub.library import api, asking, offline, persistently
from clt_plugins.files.hub.listing import Listing, RemoteFile
from clt_plugins.files.hub.names import HubPlace
from clt_plugins.files.untrusted import SMALL, opened

logger = logging.getLogger(__name__)

TABLES = {".json", ".jsonl", ".toml", ".yaml", ".yml", ".md", ".txt", ".csv"}
"""Endings of files that are read whole."""
TENSORS = {".safetensors"}
"""Endings of files that are mapped."""
AT_ONCE = 8
"""Files that are downloaded at the same time."""
HEADER_FROM = 2**20
"""Bytes of a safetensors file above which its header is read before the rest is downloaded."""


def is_readable(path: str) -> bool:
    """Whether a file is of a kind that is downloaded."""
    return PurePosixPath(path).suffix.lower() in TABLES | TENSORS


def fetch(listing: Listing, paths: Iterable[str], place: HubPlace) -> None:
    """Download files that are not in the cache; they are then in `listing.copy`.

    Args:
        paths: in the repository.
        place: how the user named it, for messages.

    Raises:
        Refused: a file is no kind that is downloaded, larger than its kind can be, or not what the hub lists; or the
            disk is too small; or the network is off.
        OSError: the hub does not answer.
    """
    missing: dict[str, RemoteFile] = {}
    for path in sorted(set(paths)):
        file = listing.files[path]
        _check_kind(path, file, place)
        copy = listing.copy / path
        if not copy.is_file() or copy.stat().st_size != file.bytes:
            missing[path] = file
    if not missing:
        return
    if offline():
        text = f"the network is off (HF_HUB_OFFLINE), and {next(iter(missing))} is not in the hub's cache: unset it"
        raise Refused(str(place), text)
    with asking(place):
        for path, file in missing.items():
            if PurePosixPath(path).suffix.lower() in TENSORS and file.bytes > HEADER_FROM:
                _check_header(listing, path, place)
        _check_disk(listing, missing, place)
        with ThreadPoolExecutor(AT_ONCE) as pool:
            work = [pool.submit(_download, listing, path, place) for path in missing]
            try:
                for one in work:
                    one.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def _check_kind(path: str, file: RemoteFile, place: HubPlace) -> None:
    if not is_readable(path):
        text = "is not downloaded: only safetensors files and tables are (a pickle can run code when it is read)"
        raise Refused(str(place), f"{path} {text}")
    if PurePosixPath(path).suffix.lower() in TABLES and file.bytes > SMALL:
        raise Refused(str(place), f"{path} has {file.bytes:,} bytes: no table has more than {SMALL:,}")


def _check_header(listing: Listing, path: str, place: HubPlace) -> None:
    """Look at the header of a safetensors file on the hub.

    Raises:
        Refused: it is none, or does not fit the size of the file.
    """
    from huggingface_hub.errors import SafetensorsParsingError

    try:
        header = persistently(
            lambda: api().parse_safetensors_file_metadata(listing.repository, path, revision=listing.commit)
        )
        ends = [tensor.data_offsets[1] for tensor in header.tensors.values()]
    except (SafetensorsParsingError, KeyError, IndexError, TypeError, RecursionError) as error:
        text = " ".join(str(error).split())[:200]
        raise Refused(str(place), f"{path} is not downloaded: not a safetensors file: {text}") from error
    if not all(isinstance(end, int) and 0 <= end < listing.files[path].bytes for end in ends):
        raise Refused(str(place), f"{path} is not downloaded: its header claims more than the file has")


def _check_disk(listing: Listing, missing: dict[str, RemoteFile], place: HubPlace) -> None:
    needed = sum(file.bytes for file in missing.values())
    above = listing.copy
    while not above.exists():
        above = above.parent
    free = shutil.disk_usage(above).free
    if needed > free:
        text = f"needs {needed:,} bytes, and {above} has {free:,} free: set HF_HOME to a folder on a larger disk"
        raise Refused(str(place), text)
    if needed > HEADER_FROM:
        logger.info("%s: downloading %s files, %s bytes", place, len(missing), f"{needed:,}")


def _download(listing: Listing, path: str, place: HubPlace) -> None:
    from huggingface_hub import hf_hub_download

    expected = listing.files[path]
    copy = listing.copy / path
    if copy.exists():  # of another size than the hub lists: an earlier download was cut off
        _forget(copy)
    persistently(lambda: hf_hub_download(listing.repository, path, revision=listing.commit))
    if not matches(copy, expected):
        _forget(copy)
        raise Refused(str(place), f"{path} is damaged: what arrived has not the checksum that the hub lists")


def _forget(copy: Path) -> None:
    """Remove a file of the cache: the link in the snapshot, and what it leads to."""
    content = copy.resolve()
    copy.unlink()
    if content != copy:
        remove(content)


def matches(file: Path, expected: RemoteFile) -> bool:
    """Whether a file has the size and the checksum that the hub lists."""
    size = file.stat().st_size
    if size != expected.bytes:
        return False
    with opened(file) as data:
        if expected.sha256 is not None:
            return hashlib.file_digest(data, "sha256").hexdigest() == expected.sha256
        content = data.read()
    return hashlib.sha1(b"blob %d\0" % size + content, usedforsecurity=False).hexdigest() == expected.git
