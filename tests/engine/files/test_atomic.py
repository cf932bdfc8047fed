"""Single files, and the steps of atomic writing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from clt_plugins.files.atomic import remove, write_file
from clt_plugins.files.folders import atomic_folder, check_folder


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_names_it(tmp_path, monkeypatch, call):
    path = tmp_path / "recipe.toml"
    write_file(path, "old")

    def fail(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os if call == "fsync" else Path, call, fail)
        with pytest.raises(OSError, match=r"recipe\.toml: could not be written: Input/output error"):
            write_file(path, "new")
    assert path.read_text() == "old"
    assert [one.name for one in tmp_path.iterdir()] == ["recipe.toml"]


def test_folders_are_saved_where_the_system_cannot_flush_folders(tmp_path, monkeypatch):
    """Windows, and some file systems, cannot open a folder; a file that cannot be flushed is still an error."""
    real = os.open

    def opened(path, flags, *rest, **named):
        if Path(path).is_dir():
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, flags, *rest, **named)

    monkeypatch.setattr(os, "open", opened)
    with atomic_folder(tmp_path / "f") as partial:
        (partial / "sub").mkdir()
        (partial / "sub/a.txt").write_text("hello")
    check_folder(tmp_path / "f")

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with (
        pytest.raises(OSError, match=r"f: could not be written: .*No space left"),
        atomic_folder(tmp_path / "f") as partial,
    ):
        (partial / "a.txt").write_text("other")
    assert (tmp_path / "f/sub/a.txt").read_text() == "hello"


def test_of_a_link_only_the_link_is_removed(tmp_path, caplog):
    (tmp_path / "far").mkdir()
    (tmp_path / "far/a").write_text("kept")
    (tmp_path / "link").symlink_to("far")
    remove(tmp_path / "link")
    assert (tmp_path / "far/a").read_text() == "kept" and not (tmp_path / "link").is_symlink()
    assert "only the link is removed" in caplog.text
