"""A small transcoder, a run that trained it, and repositories of it."""

from __future__ import annotations

from pathlib import Path

from clt_plugins import run
from tests.support.helpers import tables
from tests.support.hub.repositories import File, Repository, is_large


def small_run(folder: Path, **changes: object) -> Path:
    """A run of less than a second, on made-up activations."""
    run(tables(**changes), out=folder)
    return folder


def repository_of(folder: Path) -> Repository:
    """A repository with the files of a folder."""
    repository = Repository()
    add(
        repository,
        {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()},
    )
    return repository


def add(repository: Repository, files: dict[str, bytes | File], branch: str = "main") -> str:
    """Commit files; returns the commit."""
    there = dict(repository.commits[repository.branches.get(branch, repository.branches["main"])])
    for path, file in files.items():
        there[path] = file if isinstance(file, File) else File(file, is_large(path, len(file)))
    return repository.commit(branch, there, "more files")
