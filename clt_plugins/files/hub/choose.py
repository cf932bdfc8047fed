"""Which files of a folder on the hub are needed to load the transcoder in it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from clt_plugins.errors import Refused
from clt_plugins.files.folders import MANIFEST, Manifest
from clt_plugins.files.hub.download import TABLES, TENSORS, fetch, is_readable
from clt_plugins.files.hub.listing import Listing, RemoteFile, find_listing
from clt_plugins.files.hub.names import HubPlace
from clt_plugins.files.records import read_json

logger = logging.getLogger(__name__)

DESCRIPTION = "transcoder.json"
RECIPE = "recipe.toml"
FINAL = ("converted", "transcoder")
"""The folders of a run's transcoder; of several the first."""


def fetch_place(place: HubPlace, *, converted: bool = True) -> Path:
    """A folder of this disk with what is needed of a folder on the hub: a transcoder's files, those of another tool, or
    of a run its recipe and its final transcoder. It is in the hub's cache: nothing may be written there.

    Args:
        converted: of a run that has one, the converted transcoder is wanted.

    Raises:
        Refused: there is no transcoder in it, or it is refused; see `find_listing` and `fetch`.
        OSError: the hub does not answer.
    """
    listing = find_listing(place)
    within = listing.under(place.folder)
    if not within:
        if place.folder in listing.files:
            raise Refused(str(place), "a file: name the folder that it is in")
        raise Refused(str(place), f"the repository has no folder {place.folder!r}{_folders(listing)}")
    if DESCRIPTION in within:
        _fetch_transcoder(listing, place, place.folder)
    elif there := [name for name in FINAL if f"{name}/{DESCRIPTION}" in within]:
        if not converted and there == ["converted"]:
            own = HubPlace(place.repository, place.path("converted"), place.revision)
            raise Refused(
                str(place), f"holds only a transcoder that is converted already: name it, if you want it: {own}"
            )
        _fetch_transcoder(listing, place, place.path(there[0 if converted else -1]))
    else:
        _fetch_other(listing, place, within)
    logger.info("%s: commit %s", place, listing.commit)
    return listing.copy / place.folder


def final_transcoder(folder: Path) -> Path:
    """Of a run's folder that `fetch_place` returned its transcoder's; another folder is returned as it is."""
    if (folder / DESCRIPTION).is_file():
        return folder
    return next((folder / name for name in FINAL if (folder / name / DESCRIPTION).is_file()), folder)


def _fetch_transcoder(listing: Listing, place: HubPlace, folder: str) -> None:
    """The files that a transcoder's manifest lists, and the recipe of the run that it is in."""
    start = f"{folder}/" if folder else ""
    if f"{start}{MANIFEST}" not in listing.files:
        raise Refused(str(place), f"{start}{DESCRIPTION} has no {MANIFEST} beside it: not a complete folder")
    # The small files first: a repository with a wrong one is refused before gigabytes are downloaded.
    fetch(listing, [f"{start}{MANIFEST}", f"{start}{DESCRIPTION}"], place)
    paths = []
    for name in read_json(listing.copy / start / MANIFEST, Manifest).files:
        if f"{start}{name}" not in listing.files:
            raise Refused(str(place), f"{start}{MANIFEST} lists {name[:200]!r}, which the repository has not")
        paths.append(f"{start}{name}")
    above = PurePosixPath(f"{start}x").parents
    recipe = next((str(one / RECIPE) for one in above[:3] if str(one / RECIPE) in listing.files), None)
    if recipe is not None:
        fetch(listing, [recipe], place)
    fetch(listing, paths, place)


def _fetch_other(listing: Listing, place: HubPlace, within: Mapping[str, RemoteFile]) -> None:
    """The files of another tool's folder. Where it has tensors itself, its folders are left alone."""
    own = [path for path in within if "/" not in path]
    tensors = [path for path in own if PurePosixPath(path).suffix.lower() in TENSORS]
    paths = own if tensors else list(within)
    paths = [path for path in paths if is_readable(path)]
    if not any(PurePosixPath(path).suffix.lower() in TENSORS for path in paths):
        pickles = [path for path in within if PurePosixPath(path).suffix.lower() in (".bin", ".pt", ".pth", ".pkl")]
        why = f"; {pickles[0]} can run code when it is read, and is not" if pickles else ""
        raise Refused(str(place), f"no transcoder in it: no {DESCRIPTION}, no safetensors files{why}")
    several = sorted({path.split("/")[0] for path in within if path.endswith(f"/{DESCRIPTION}")})
    if several and not tensors:
        names = ", ".join(str(HubPlace(place.repository, place.path(name), place.revision)) for name in several[:5])
        raise Refused(str(place), f"it holds several transcoders: name one: {names}")
    fetch(listing, [place.path(path) for path in paths if PurePosixPath(path).suffix.lower() in TABLES], place)
    fetch(listing, [place.path(path) for path in paths], place)


def _folders(listing: Listing) -> str:
    names = sorted({path.split("/")[0] for path in listing.files if "/" in path})
    return f": it has {', '.join(names[:8])}" if names else ""
