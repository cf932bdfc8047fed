"""Atomic folders: complete, or as they were."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import sys
from pathlib import Path

import pytest

from clt_plugins import CrossLayerTranscoder, run
from clt_plugins.files import folders
from clt_plugins.files.atomic import exchange
from clt_plugins.files.folders import MANIFEST, Manifest, atomic_folder, check_folder, recover
from clt_plugins.files.records import read_json
from clt_plugins.finished.find import find_trained
from tests.support.helpers import plugins, tables


def put(folder: Path, text: str = "hello") -> None:
    with atomic_folder(folder) as partial:
        (partial / "a.txt").write_text(text)
        (partial / "b.txt").write_text("")


def test_a_folder_appears_at_the_end_with_a_manifest_of_its_files(tmp_path):
    with atomic_folder(tmp_path / "new/f") as partial:
        (partial / "a.txt").write_text("hello")
        assert not (tmp_path / "new/f").exists()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["f"]
    manifest = read_json(tmp_path / "new/f" / MANIFEST, Manifest)
    assert manifest.files["a.txt"].bytes == 5 and set(manifest.files) == {"a.txt"}
    assert list(json.loads((tmp_path / "new/f" / MANIFEST).read_text())) == ["format", "files"]
    check_folder(tmp_path / "new/f")


def fail(folder: Path, error: BaseException) -> None:
    with atomic_folder(folder) as partial:
        (partial / "a.txt").write_text("after")
        raise error


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt(), OSError("disk full")], ids=repr)
def test_after_an_error_the_folder_is_as_it_was(tmp_path, error):
    put(tmp_path / "f", "before")
    # The operating system does not always name a file; the error does.
    text = rf"^{tmp_path}/f: could not be written: disk full$" if isinstance(error, OSError) else None
    with pytest.raises(type(error), match=text):
        fail(tmp_path / "f", error)
    assert (tmp_path / "f/a.txt").read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["f"]
    check_folder(tmp_path / "f")


@pytest.mark.parametrize("read", [check_folder, recover], ids=lambda read: read.__name__)
def test_a_replacement_killed_between_its_two_renames_is_undone_by_the_next_reader(tmp_path, read, caplog):
    put(tmp_path / "f", "before")
    (tmp_path / "f").rename(tmp_path / ".f.old")  # where it was killed
    (tmp_path / ".f.partial").mkdir()
    read(tmp_path / "f")
    assert (tmp_path / "f/a.txt").read_text() == "before"
    check_folder(tmp_path / "f")
    assert not (tmp_path / ".f.old").exists()
    assert f"{tmp_path / 'f'}: its replacement was interrupted; the one before is back" in caplog.text


def test_a_transcoder_whose_replacement_was_killed_is_loaded(tmp_path):
    run(tables(train={"steps": 1}), out=tmp_path / "run")
    for load in (CrossLayerTranscoder.load, lambda folder: find_trained(folder.parent, plugins()).transcoder()):
        (tmp_path / "run/transcoder").rename(tmp_path / "run/.transcoder.old")
        load(tmp_path / "run/transcoder")
        assert (tmp_path / "run/transcoder").is_dir()


@pytest.mark.parametrize("rename", [0, 1], ids=["the old one", "the new one"])
def test_ctrl_c_at_a_rename_leaves_the_old_folder(tmp_path, rename, monkeypatch):
    put(tmp_path / "f", "before")
    real, calls = Path.rename, iter(range(10))

    def interrupted(path, target):
        if next(calls) == rename:
            raise KeyboardInterrupt
        return real(path, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    monkeypatch.setattr(folders, "exchange", lambda *_: False)  # as on NFS and macOS
    with pytest.raises(KeyboardInterrupt):
        put(tmp_path / "f", "after")
    monkeypatch.undo()
    assert (tmp_path / "f/a.txt").read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def cannot(*_: object) -> None:
    raise OSError(errno.EIO, "Input/output error")


@pytest.mark.skipif(sys.platform != "linux", reason="names are exchanged on Linux alone")
@pytest.mark.parametrize("done", [False, True], ids=["before the exchange", "after it"])
def test_a_disk_that_fails_for_good_leaves_the_old_folder_or_the_new_one(tmp_path, done, monkeypatch):
    put(tmp_path / "f", "before")
    if not done:
        monkeypatch.setattr(folders, "exchange", cannot)
    for name in ("rename", "unlink", "rmdir"):
        monkeypatch.setattr(Path, name, cannot)
    with pytest.raises(OSError, match="f: could not be written: "):
        put(tmp_path / "f", "after")
    monkeypatch.undo()
    assert (tmp_path / "f/a.txt").read_text() == ("after" if done else "before")
    check_folder(tmp_path / "f")
    put(tmp_path / "f", "again")
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


@pytest.mark.skipif(sys.platform != "linux", reason="names are exchanged on Linux alone")
def test_names_are_exchanged_or_nothing_happens(tmp_path, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    assert exchange(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a/b").exists() and (tmp_path / "b/a").exists()
    with pytest.raises(FileNotFoundError, match="none"):
        exchange(tmp_path / "a", tmp_path / "none")
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: object())  # a system without the call
    assert not exchange(tmp_path / "a", tmp_path / "b") and (tmp_path / "a/b").exists()


def test_all_is_on_the_disk_before_a_folder_has_its_name(tmp_path, monkeypatch):
    """Files of sub-folders too: after a power cut a folder with its name is whole."""
    events = []
    fsync, rename = os.fsync, Path.rename

    def record_fsync(handle):
        events.append(str(Path(f"/proc/self/fd/{handle}").readlink().relative_to(tmp_path)))
        fsync(handle)

    def record_rename(path, target):
        events.append("renamed")
        return rename(path, target)

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("needs /proc to tell which file is flushed")
    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(Path, "rename", record_rename)
    with atomic_folder(tmp_path / "f") as partial:
        (partial / "sub/deep").mkdir(parents=True)
        for name in ("a.txt", "sub/b.txt", "sub/deep/c.txt"):
            (partial / name).write_text("hello")
    before = {name.removeprefix(".f.partial").strip("/") for name in events[: events.index("renamed")]}
    assert before == {"", "a.txt", "sub", "sub/b.txt", "sub/deep", "sub/deep/c.txt", MANIFEST}
    assert events[events.index("renamed") + 1 :] == ["."], "the folder's own name"


def test_a_folder_is_replaced_as_a_whole_also_after_a_crash_between_its_two_renames(tmp_path):
    put(tmp_path / "f", "before")
    with atomic_folder(tmp_path / "f") as partial:
        (partial / "c.txt").write_text("after")
    assert sorted(path.name for path in (tmp_path / "f").iterdir()) == ["c.txt", MANIFEST]
    (tmp_path / ".f.old").mkdir()
    (tmp_path / ".f.old/left.txt").write_text("by a crash")
    (tmp_path / ".f.partial").mkdir()
    put(tmp_path / "f")
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_a_folder_may_be_named_in_any_way(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path / "work")
    put(Path("../other/"))
    put(tmp_path / "link")
    check_folder(tmp_path / "other")
    check_folder(tmp_path / "real")
    assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda folder: (folder / "a.txt").unlink(), "a.txt: missing"),
        (lambda folder: (folder / "a.txt").write_text("hell"), "a.txt: truncated: 4 bytes of 5"),
        (lambda folder: (folder / "a.txt").write_text("hullo"), "a.txt: damaged: its checksum is not the one in mani"),
        (lambda folder: (folder / MANIFEST).unlink(), "f: not a complete folder: manifest.json is missing"),
        (lambda folder: (folder / MANIFEST).write_text("{"), "manifest.json: not a readable JSON file"),
        (lambda folder: (folder / MANIFEST).write_text('{"format": 1}'), "manifest.json: files: required, but missing"),
        (lambda folder: (folder / MANIFEST).write_text("{}"), "manifest.json: written in format None, this version"),
    ],
)
def test_what_is_wrong_with_a_folder_is_named(damage, text, tmp_path):
    put(tmp_path / "f")
    damage(tmp_path / "f")
    with pytest.raises(ValueError, match=r"^/") as error:
        check_folder(tmp_path / "f")
    assert text in str(error.value) and len(str(error.value).splitlines()) == 1


def test_files_of_sub_folders_are_listed_and_verified(tmp_path):
    with atomic_folder(tmp_path / "f") as partial:
        (partial / "layer_0").mkdir()
        (partial / "layer_0" / "weights.bin").write_text("hello")
    assert set(read_json(tmp_path / "f" / MANIFEST, Manifest).files) == {"layer_0/weights.bin"}
    (tmp_path / "f/layer_0/weights.bin").write_text("hullo")
    with pytest.raises(ValueError, match=r"weights.bin: damaged"):
        check_folder(tmp_path / "f")


def test_files_have_the_mode_that_the_umask_asks_for(tmp_path):
    """Whatever a library made them with: safetensors' own are readable by their owner only."""
    plain = tmp_path / "plain"
    plain.touch()
    with atomic_folder(tmp_path / "f") as partial:
        (partial / "private").touch(mode=0o600)
        (partial / "private").chmod(0o600)
    assert (tmp_path / "f/private").stat().st_mode == plain.stat().st_mode


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "a/../../secret"])
def test_a_manifest_that_leads_out_of_its_folder_is_refused(tmp_path, name):
    put(tmp_path / "f")
    manifest = json.loads((tmp_path / "f" / MANIFEST).read_text())
    manifest["files"] = {name: manifest["files"]["a.txt"]}
    (tmp_path / "f" / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="is not in the folder"):
        check_folder(tmp_path / "f")
