"""What the stand-in stores: repositories with commits, by content."""

from __future__ import annotations

import hashlib
from typing import Any

import attrs

LARGE_FROM = 10_000
"""Bytes from which a file is a large one (LFS); safetensors files always are."""


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_large(path: str, size: int) -> bool:
    return path.endswith(".safetensors") or size >= LARGE_FROM


@attrs.define
class File:
    """A file at a commit; the fields that lie are for hostile repositories."""

    content: bytes
    large: bool
    listed_size: int | None = None
    """What the listing says, if not the truth."""
    sha256: str | None = None
    """The same of the checksum."""
    kind: str = "file"

    @property
    def size(self) -> int:
        return len(self.content) if self.listed_size is None else self.listed_size

    @property
    def digest(self) -> str:
        return self.sha256 or hashlib.sha256(self.content).hexdigest()

    def entry(self, path: str) -> dict[str, Any]:
        """As the hub lists it."""
        entry: dict[str, Any] = {"type": self.kind, "path": path, "size": self.size, "oid": git_hash(self.content)}
        if self.large:
            pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.digest}\nsize {self.size}\n"
            entry["oid"] = git_hash(pointer.encode())
            entry["lfs"] = {"oid": self.digest, "size": self.size, "pointerSize": len(pointer)}
        return entry


@attrs.define
class Repository:
    """A model repository."""

    private: bool = False
    gated: bool = False
    branches: dict[str, str] = attrs.Factory(dict)
    """Name -> commit."""
    commits: dict[str, dict[str, File]] = attrs.Factory(dict)
    messages: dict[str, str] = attrs.Factory(dict)
    """Commit -> its message."""

    def __attrs_post_init__(self) -> None:
        if not self.branches:
            self.commit("main", {".gitattributes": File(b"*.safetensors filter=lfs\n", False)}, "initial commit")

    def commit(self, branch: str, files: dict[str, File], message: str) -> str:
        text = f"{branch} {message} {len(self.commits)} {sorted(files)}"
        oid = hashlib.sha1(text.encode()).hexdigest()
        self.commits[oid], self.messages[oid], self.branches[branch] = dict(files), message, oid
        return oid

    def resolve(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.branches.get(revision)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """Path -> content, without what the hub makes itself."""
        commit = self.resolve(revision)
        assert commit is not None
        return {path: file.content for path, file in self.commits[commit].items() if path != ".gitattributes"}
