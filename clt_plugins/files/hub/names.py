"""Names of folders on the hub: `user/repository[/folder][@revision]`, with `hf://` before it where it must be clear.

A revision may also follow the repository, as in `hf://` addresses of other tools: `user/repository@v1/folder`.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import unquote

import attrs

from clt_plugins.errors import Refused

SCHEME = re.compile(r"hf:/{1,2}")
"""`Path` makes `hf:/` of `hf://`."""
NAME = re.compile(r"(?!.*(?:--|\.\.))[A-Za-z0-9_][A-Za-z0-9._-]{0,95}")
"""A user or a repository, as the hub accepts them."""
SPECIAL = re.compile(r"(refs/(?:pr|convert)/[^/]+)(?:/(.*))?")
"""Revisions with a slash of their own: pull requests and conversions."""
REVISION = re.compile(r"(?!.*(?:\.\.|@\{|//))[^\s~^:?*\[\\\x00-\x1f\x7f/-][^\s~^:?*\[\\\x00-\x1f\x7f]{0,255}")
"""What git accepts as the name of a branch or tag."""
CONTROL = re.compile(r"[\x00-\x1f\x7f\\]")
OTHER_KINDS = ("datasets", "spaces", "kernels", "buckets")


@attrs.frozen
class HubPlace:
    """A folder in a repository of the hub."""

    repository: str
    """`user/name`."""
    folder: str = ""
    """The folder in it, by slashes; empty for all of the repository."""
    revision: str | None = None
    """A branch, tag or commit; the branch `main` if it is None."""

    def __str__(self) -> str:
        end = f"@{self.revision.replace('/', '%2F')}" if self.revision else ""
        return "hf://" + "/".join(part for part in (self.repository, self.folder) if part) + end

    @classmethod
    def parse(cls, text: str) -> HubPlace:
        """A name, with or without `hf://`.

        Raises:
            Refused: it is no such name; says what is wrong.
        """
        return _parsed(SCHEME.sub("", text, count=1) if SCHEME.match(text) else text)

    def path(self, name: str) -> str:
        """The path in the repository of a file in the folder."""
        return f"{self.folder}/{name}" if self.folder else name


def hub_place(name: str | Path) -> HubPlace | None:
    """The folder on the hub that a user names; None where the name is one of this disk.

    A local file or folder of that name wins, also one of the name's first part: `runs/x` is local where there is a
    folder `runs`. With `hf://` before it, it is always the hub.

    Raises:
        Refused: it begins with `hf://` and is no such name.
    """
    text = os.fspath(name)
    if SCHEME.match(text):
        return HubPlace.parse(text)
    first = text.split("/", 1)[0]
    if "/" not in text or text[0] in "./~" or os.path.lexists(text) or os.path.lexists(first):
        return None
    try:
        return HubPlace.parse(text)
    except Refused:
        return None


def _parsed(text: str) -> HubPlace:
    where = "hf://" + CONTROL.sub("?", text[:300])
    before, _, after = text.partition("@")
    parts = [part for part in before.split("/") if part]
    if parts[:1] == ["models"] and len(parts) > 2:
        parts = parts[1:]
    if parts and parts[0] in OTHER_KINDS:
        raise Refused(where, f"{parts[0]} hold no transcoders: name a model repository, user/repository")
    if len(parts) < 2 or not all(NAME.fullmatch(part) for part in parts[:2]):
        raise Refused(where, "not a repository's name: write user/repository[/folder][@revision]")
    revision: str | None = None
    if "@" in text:
        rest = ""
        if len(parts) == 2 and (special := SPECIAL.fullmatch(after)) is not None:
            revision, rest = special[1], special[2] or ""
        elif len(parts) == 2:
            revision, _, rest = after.partition("/")
        else:
            revision = after
        revision = unquote(revision)
        parts += [part for part in rest.split("/") if part]
        if not is_revision(revision):
            raise Refused(where, f"not a revision: {revision!r}")
    folder = "/".join(parts[2:])
    if folder and not is_path(folder):
        raise Refused(where, f"not a folder in a repository: {folder!r}")
    return HubPlace("/".join(parts[:2]), folder, revision)


def is_path(path: str) -> bool:
    """Whether a path stays in its repository, and can be the name of a file on this disk."""
    parts = path.split("/")
    if CONTROL.search(path) or len(path) > 1024:
        return False
    return all(part not in ("", ".", "..") and len(part.encode()) <= 255 for part in parts)


def is_revision(text: str) -> bool:
    """Whether git accepts it as the name of a branch, tag or commit."""
    return bool(REVISION.fullmatch(text))


def place_of_copy(folder: Path) -> HubPlace | None:
    """The folder on the hub, with its commit, whose copy in the hub's cache a folder is; None if it is none.

    The cache has folders `models--USER--REPOSITORY/snapshots/COMMIT`.
    """
    parts = folder.parts
    for number in range(len(parts) - 1, 1, -1):
        kind, _, repository = parts[number - 2].partition("--")
        if parts[number - 1] == "snapshots" and kind == "models" and re.fullmatch(r"[0-9a-f]{40}", parts[number]):
            return HubPlace(repository.replace("--", "/"), "/".join(parts[number + 1 :]), parts[number])
    return None
