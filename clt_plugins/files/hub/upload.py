"""A folder of this disk, uploaded to a folder on the hub.

An upload that breaks off is taken up by doing it again: the hub says which files it has. What is uploaded becomes
visible by one commit.
"""

from __future__ import annotations

import glob
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from clt_plugins.errors import Refused
from clt_plugins.files.hub.download import matches
from clt_plugins.files.hub.library import api, asking, offline, persistently, token
from clt_plugins.files.hub.listing import Listing, list_commit
from clt_plugins.files.hub.names import HubPlace
from clt_plugins.files.untrusted import SMALL, parse_json

logger = logging.getLogger(__name__)


def check_upload(place: HubPlace) -> None:
    """Before work, refuse an upload that could not be made; asks nothing of the hub.

    Raises:
        Refused: the network is off, there is no token, or a commit is named.
    """
    if place.revision is not None and len(place.revision) == 40 and set(place.revision) <= set("0123456789abcdef"):
        raise Refused(str(place), "a commit cannot be changed: name a branch, or none")
    if offline():
        raise Refused(str(place), "the network is off (HF_HUB_OFFLINE): unset it to upload")
    if token() is None:
        raise Refused(
            str(place),
            "no token to upload with: make one with write access on https://huggingface.co/settings/tokens, and log in "
            "with `hf auth login`, or set HF_TOKEN",
        )


def upload(
    folder: Path,
    place: HubPlace,
    *,
    message: str,
    private: bool = True,
    replaces: Sequence[str] = (),
    marked: Mapping[str, str] | None = None,
) -> str:
    """Upload all files of a folder; afterwards the hub's list of files is compared with it.

    Args:
        place: the repository, made if there is none; the folder in it; and the branch, made if there is none.
        message: of the commit.
        private: of a new repository.
        replaces: patterns of older files in the folder on the hub that go if they are not in this one; with any, those
            that its `manifest.json` there lists go too, as this folder may be in another format.
        marked: files of the folder on the hub that are replaced only if they have a text in them: `{name: text}`.

    Returns:
        The commit.

    Raises:
        Refused: see `check_upload`; or the user may not write there; or a file has not its mark.
        OSError: the hub does not answer, or holds something else afterwards.
    """
    check_upload(place)
    hub, branch = api(), place.revision or "main"
    with asking(place):
        persistently(lambda: hub.create_repo(place.repository, private=private, exist_ok=True))
        if branch != "main" and not branch.startswith("refs/"):
            persistently(lambda: hub.create_branch(place.repository, branch=branch, exist_ok=True))
        head = persistently(lambda: hub.repo_info(place.repository, revision=branch).sha)
        before = persistently(lambda: list_commit(place, head))
        _check_marks(place, before, marked or {})
        patterns = [*replaces, *(_listed(place, before) if replaces else ())]
        commit = persistently(
            lambda: (
                hub.upload_folder(
                    repo_id=place.repository,
                    folder_path=folder,
                    path_in_repo=place.folder,
                    commit_message=message,
                    revision=branch,
                    delete_patterns=patterns or None,
                ).oid
            )
        )
        there = persistently(lambda: list_commit(place, commit)).under(place.folder)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if name not in there or not matches(path, there[name]):
            raise OSError(f"{place}: {name} arrived otherwise than it is here: upload it again")
    logger.info("%s: commit %s", place, commit)
    return commit


def _check_marks(place: HubPlace, before: Listing, marked: Mapping[str, str]) -> None:
    for name, mark in marked.items():
        path = place.path(name)
        if path not in before.files:
            continue
        content = _content(place, before, path)
        if content is None or mark.encode() not in content:
            raise Refused(str(place), f"has a {path} that was not made by this program, and it would be lost")


def _listed(place: HubPlace, before: Listing) -> list[str]:
    """Patterns of the manifest on the hub and of the files that it lists; none if it is not one of ours."""
    from clt_plugins.files.folders import MANIFEST, Manifest  # imports torch
    from clt_plugins.files.records import from_data

    path = place.path(MANIFEST)
    content = _content(place, before, path) if path in before.files else None
    try:
        listed = from_data(Manifest, parse_json(content or b"")).files
    except ValueError:  # other tools have files of this name too
        return []
    return [glob.escape(name) for name in (MANIFEST, *listed)]


def _content(place: HubPlace, before: Listing, path: str) -> bytes | None:
    """A small file on the hub; None if it is large."""
    from huggingface_hub import hf_hub_download

    if before.files[path].bytes > SMALL:
        return None
    return Path(persistently(lambda: hf_hub_download(place.repository, path, revision=before.commit))).read_bytes()
