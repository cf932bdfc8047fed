"""What a repository of the hub holds at a commit: paths, sizes and checksums.

A listing is kept in the hub's cache, beside the downloaded files (`models--USER--REPOSITORY/clt-plugins/COMMIT.json`).
So a folder that was downloaded once is complete without the network, and is known to be.
"""

from __future__ import annotations

import itertools
import logging
import re
from pathlib import Path
from urllib.parse import quote

import attrs

from clt_plugins.errors import Faults, Refused
from clt_plugins.files.atomic import write_file
from clt_plugins.files.hub.library import ATTEMPTS, api, asking, is_passing, offline, persistently
from clt_plugins.files.hub.names import HubPlace, is_path
from clt_plugins.files.records import json_text, read_json
from clt_plugins.files.untrusted import read_small

logger = logging.getLogger(__name__)

MOST_FILES = 50_000
"""Files of the largest repository that is listed."""


@attrs.frozen(kw_only=True)
class RemoteFile:
    """One file of a repository."""

    bytes: int = attrs.field(validator=attrs.validators.ge(0))
    """Its size."""
    sha256: str | None = None
    """Its SHA-256; None for a small file, which git itself holds."""
    git: str
    """The SHA-1 by which git names a small file's content; of a large one that of its pointer."""


@attrs.frozen(kw_only=True)
class Listing:
    """The files of a repository at a commit."""

    repository: str
    """`user/name`."""
    commit: str
    """The commit, 40 hexadecimal digits."""
    files: dict[str, RemoteFile]
    """By path."""

    @property
    def copy(self) -> Path:
        """The folder of this disk for the files of this commit; what was not downloaded is not there."""
        return storage(self.repository) / "snapshots" / self.commit

    def under(self, folder: str) -> dict[str, RemoteFile]:
        """The files in a folder, by their path in it."""
        start = f"{folder}/" if folder else ""
        return {path[len(start) :]: file for path, file in self.files.items() if path.startswith(start)}


def storage(repository: str) -> Path:
    """The folder of a repository in the hub's cache."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser().resolve() / f"models--{repository.replace('/', '--')}"


def find_listing(place: HubPlace) -> Listing:
    """What the repository holds at its revision: asked of the hub, or as it was last seen where there is no network.

    Raises:
        Refused: there is no such repository or revision, or it may not be read; or a path in it leads out of it; or the
            network is off, and the repository is not in the cache.
        OSError: the hub does not answer, and the repository is not in the cache.
    """
    revision = place.revision or "main"
    # What a commit holds does not change.
    if re.fullmatch(r"[0-9a-f]{40}", revision) and (known := _kept(place.repository, revision)) is not None:
        return known
    if offline():
        if (known := _last_seen(place.repository, revision)) is not None:
            return known
        text = "the network is off (HF_HUB_OFFLINE), and it is not in the hub's cache: unset the variable"
        raise Refused(str(place), f"no folder here, {text}")
    with asking(place):
        try:
            # Where the cache can serve, a hub that is away is not waited for.
            attempts = 2 if _last_seen(place.repository, revision) is not None else ATTEMPTS
            commit = persistently(lambda: api().repo_info(place.repository, revision=revision).sha, attempts)
        except Exception as error:
            known = _last_seen(place.repository, revision) if is_passing(error) else None
            if known is None:
                raise
            logger.warning("%s: the hub does not answer: commit %s from its cache is used", place, known.commit)
            return known
        listing = _kept(place.repository, commit)
        if listing is None:
            listing = persistently(lambda: list_commit(place, commit))
    _keep(listing, revision)
    return listing


def list_commit(place: HubPlace, commit: str) -> Listing:
    """Ask the hub what a repository holds at a commit.

    Raises:
        Refused: a path leads out of the repository, or there are too many.
    """
    from huggingface_hub.hf_api import RepoFile

    entries = api().list_repo_tree(place.repository, recursive=True, revision=commit)
    files: dict[str, RemoteFile] = {}
    for entry in itertools.islice(entries, 2 * MOST_FILES):
        if not isinstance(entry, RepoFile):
            continue
        if not is_path(entry.path):
            raise Refused(str(place), f"nothing is read from it: it lists {entry.path[:200]!r}, which leads out of it")
        if entry.size < 0 or len(files) == MOST_FILES:
            raise Refused(str(place), f"nothing is read from it: {entry.path[:200]!r} is beyond what a repository has")
        large = entry.lfs
        files[entry.path] = RemoteFile(
            bytes=entry.size, sha256=large.sha256 if large is not None else None, git=entry.blob_id
        )
    return Listing(repository=place.repository, commit=commit, files=files)


def _record(repository: str, commit: str) -> Path:
    return storage(repository) / "clt-plugins" / f"{commit}.json"


def _last(repository: str, revision: str) -> Path:
    """Holds the commit that a revision last was; the hub's library keeps its own for what was downloaded by it."""
    return storage(repository) / "clt-plugins" / "refs" / quote(revision, safe="")


def _kept(repository: str, commit: str) -> Listing | None:
    file = _record(repository, commit)
    if not file.is_file():
        return None
    try:
        return read_json(file, Listing)
    except Faults as error:
        logger.warning("%s", error)
        return None


def _last_seen(repository: str, revision: str) -> Listing | None:
    file = _last(repository, revision)
    return _kept(repository, read_small(file).decode().strip()) if file.is_file() else None


def _keep(listing: Listing, revision: str) -> None:
    try:
        file, last = _record(listing.repository, listing.commit), _last(listing.repository, revision)
        last.parent.mkdir(parents=True, exist_ok=True)
        if not file.is_file():
            write_file(file, json_text(listing) + "\n")
        write_file(last, listing.commit + "\n")
    except OSError as error:  # a cache that others fill
        logger.warning("%s: what the repository holds could not be noted: %s", listing.repository, error)
