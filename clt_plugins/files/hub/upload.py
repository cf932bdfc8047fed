"""A folder of this disk, uploaded to a folder on the hub.

An upload that breaks off is taken up by doing it again: the hub says which files it has. What is uploaded becomes
visible by one commit.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from clt_plugins.errors import Refused
from clt_plugins.files.hub.download import matches
from clt_plugins.files.hub.library import api, asking, offline, persistently, token
from clt_plugins.files.hub.listing import list_commit
from clt_plugins.files.hub.names import HubPlace
from clt_plugins.files.untrusted import SMALL

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
        replaces: patterns of older files in the folder on the hub that go if they are not in this one.
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
        _check_marks(place, branch, marked or {})
        commit = persistently(
            lambda: (
                hub.upload_folder(
                    repo_id=place.repository,
                    folder_path=folder,
                    path_in_repo=place.folder,
                    commit_message=message,
                    revision=branch,
                    delete_patterns=list(replaces) or None,
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


def _check_marks(place: HubPlace, branch: str, marked: Mapping[str, str]) -> None:
    from huggingface_hub import hf_hub_download

    head = persistently(lambda: api().repo_info(place.repository, revision=branch).sha)
    there = persistently(lambda: list_commit(place, head)).files
    for name, mark in marked.items():
        path = place.path(name)
        if path not in there:
            continue
        if there[path].bytes <= SMALL:
            copy = persistently(partial(hf_hub_download, place.repository, path, revision=head))
            if mark.encode() in Path(copy).read_bytes():
                continue
        raise Refused(str(place), f"has a {path} that was not made by this program, and it would be lost")
