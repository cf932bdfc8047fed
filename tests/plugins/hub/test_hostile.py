"""Repositories made to do harm: refused by name; nothing of them is run, and they take no memory and no disk."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import struct
from pathlib import Path

import pytest

from clt_plugins import CrossLayerTranscoder, Faults, Refused
from clt_plugins.files.hub import download, listing
from tests.support.hub.repositories import File, Repository
from tests.support.hub.small import add, repository_of
from tests.support.peak import peak

MARK = "ran.txt"


class Runs:
    """Unpickled, it writes a file."""

    def __reduce__(self):
        return os.system, (f"touch {MARK}",)


def header(table: object, length: int | None = None) -> bytes:
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text


def described(folder: Path, **changes: object) -> bytes:
    return json.dumps(json.loads((folder / "transcoder.json").read_bytes()) | changes).encode()


TENSORS = "transcoder.safetensors"
BIG = 3 * 2**20  # above what is downloaded without a look at the header


def listed(size: int, content: bytes = b"") -> File:
    """A file that is said to be of another size than it has."""
    return File(content, True, listed_size=size)


def entry(content: bytes) -> dict[str, object]:
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def with_manifest(files: dict[str, bytes | File]) -> dict[str, bytes | File]:
    """The files with a manifest that fits them: whoever writes a repository writes it too."""
    table = {name: entry(file.content if isinstance(file, File) else file) for name, file in files.items()}
    return {**files, "manifest.json": json.dumps({"format": 1, "files": table}).encode()}


def cases(folder: Path) -> dict[str, tuple[dict[str, bytes | File], str]]:
    """Name -> (files that replace those of a right repository, what is said)."""
    tensors = (folder / TENSORS).read_bytes()
    description = (folder / "transcoder.json").read_bytes()
    manifest = json.loads((folder / "manifest.json").read_bytes())
    huge_layer = {"W": {"dtype": "F32", "shape": [2**50, 4], "data_offsets": [0, 2**54]}}
    no_numbers = {"W": {"dtype": "F32", "shape": [2**50, 0], "data_offsets": [0, 0]}}

    def sized(**changes: int) -> dict[str, bytes | File]:
        return with_manifest({TENSORS: tensors, "transcoder.json": described(folder, **changes)})

    def tensors_of(content: bytes) -> dict[str, bytes | File]:
        return with_manifest({TENSORS: content, "transcoder.json": description})

    away = {**manifest, "files": {**manifest["files"], "../../../x.json": entry(b"")}}
    pickled = {**manifest, "files": {**manifest["files"], "training.pt": entry(pickle.dumps(Runs()))}}
    nested = b"[" * 10**6
    return {
        "path that leads out": ({"../../evil.json": b"{}"}, "it lists '../../evil.json', which leads out of it"),
        "absolute path": ({"/etc/cron.d/evil": b"x"}, "it lists '/etc/cron.d/evil', which leads out of it"),
        "path with a backslash": ({"a\\..\\b.json": b"{}"}, "which leads out of it"),
        "path of a control": ({"a\x1b[2Jb.json": b"{}"}, "which leads out of it"),
        "manifest that leads out": ({"manifest.json": json.dumps(away).encode()}, "which the repository has not"),
        "pickle": (
            {"training.pt": pickle.dumps(Runs()), "manifest.json": json.dumps(pickled).encode()},
            "training.pt is not downloaded: only safetensors files and tables are (a pickle can run code",
        ),
        "pickle as tensors": (tensors_of(pickle.dumps(Runs())), "not a readable safetensors file"),
        "header of 10 GB": (tensors_of(header(b"{}" + bytes(BIG), 10 * 2**30)), "is not downloaded: not a safetensors"),
        "small header of 10 GB": (tensors_of(header(b"{}", 10 * 2**30)), "not a readable safetensors file"),
        "header of a JSON bomb": (tensors_of(header(nested + bytes(BIG), len(nested))), "not a safetensors file"),
        "tensors beyond the file": (tensors_of(header(huge_layer) + bytes(BIG)), "claims more than the file has"),
        "shape without numbers": (tensors_of(header(no_numbers)), "tensor"),
        "10 GB table": ({"transcoder.json": listed(10 * 2**30)}, "has 10,737,418,240 bytes: no table has more"),
        "more than the disk": ({TENSORS: listed(2**60, tensors)}, "free: set HF_HOME to a folder on a larger disk"),
        "absurd features": (sized(features=10**17), f"no transcoder has 3 layers, d_model 6 and {10**17} features"),
        "absurd layers": (sized(layers=10**9), "no transcoder has 1000000000 layers"),
        "negative": (sized(d_model=-1), "no transcoder has"),
        "wrong size": (sized(features=10**12), "tensor"),
        "wrong checksum": (
            {TENSORS: File(tensors, True, sha256=64 * "0")},
            f"{TENSORS} is damaged: what arrived has not",
        ),
        "link": ({"transcoder.json": b"../../../../../etc/passwd"}, "transcoder.json"),
        "link to tensors": (tensors_of(b"/etc/passwd"), "not a readable safetensors file"),
        "submodule": ({"transcoder.json": File(b"", False, kind="directory")}, "transcoder"),
        "deep JSON": (with_manifest({TENSORS: tensors, "transcoder.json": nested}), "nested too deep"),
        "a plugin": (
            with_manifest({TENSORS: tensors, "transcoder.json": described(folder, activation={"name": "os.system"})}),
            "os.system",
        ),
    }


NAMES = [
    *("path that leads out", "absolute path", "path with a backslash", "path of a control", "manifest that leads out"),
    *("pickle", "pickle as tensors", "header of 10 GB", "small header of 10 GB", "header of a JSON bomb"),
    *("tensors beyond the file", "shape without numbers", "10 GB table", "more than the disk", "absurd features"),
    *("absurd layers", "negative", "wrong size", "wrong checksum", "link", "link to tensors", "submodule", "deep JSON"),
    "a plugin",
]


@pytest.mark.parametrize("case", NAMES)
def test_a_hostile_repository_is_refused_by_name_and_runs_nothing(hub, trained, tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    folder = trained / "transcoder"
    known = cases(folder)
    assert set(known) == set(NAMES)
    files, text = known[case]
    hub.repositories["evil/clt"] = repository = repository_of(folder)
    add(repository, files)
    with peak() as grown:
        with pytest.raises(Faults) as caught:
            CrossLayerTranscoder.load("evil/clt")
        assert grown() < 200 * 2**20
    said = str(caught.value)
    assert text in said and len(said.splitlines()) == 1 and said.isprintable(), said
    assert not (tmp_path / MARK).exists()
    home = tmp_path / "home"
    taken = sum(path.lstat().st_size for path in home.rglob("*"))
    assert taken < 8 * 2**20
    strays = [path for path in home.rglob("*") if path.is_symlink() and home not in path.resolve().parents]
    assert not strays


def test_a_damaged_download_is_done_anew(hub, trained):
    folder = trained / "transcoder"
    tensors = (folder / TENSORS).read_bytes()
    hub.repositories["user/clt"] = repository = repository_of(folder)
    commit = add(repository, {TENSORS: File(bytes(len(tensors)), True, sha256=None)})
    file = repository.commits[commit][TENSORS]
    file.sha256 = entry(tensors)["sha256"]  # the store has other bytes than the repository says
    with pytest.raises(Refused, match="damaged"):
        CrossLayerTranscoder.load("user/clt")
    hub.objects[file.digest] = file.content = tensors
    CrossLayerTranscoder.load("user/clt")


def test_a_listing_without_end_is_not_read_to_its_end(hub, monkeypatch):
    monkeypatch.setattr(listing, "MOST_FILES", 20)
    hub.repositories["evil/many"] = repository = Repository()
    add(repository, {f"{number}.json": b"{}" for number in range(200)})
    with pytest.raises(Refused, match="beyond what a repository has"):
        CrossLayerTranscoder.load("evil/many")
    assert sum("/tree/" in request for request in hub.requests) < 10


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (b"x", "expected a table"),
        (b"model_name: x", "must be [features, d_model], got [1099511627776, 0]"),
        (b"a: *b", "not a readable"),
    ],
)
def test_a_foreign_folder_of_nothing_is_refused(hub, config, text):
    hub.repositories["evil/ct"] = repository = Repository()
    table = {"W_enc_0": {"dtype": "F32", "shape": [2**40, 0], "data_offsets": [0, 0]}}
    rows = {"W_dec_0": {"dtype": "F32", "shape": [2**40, 1, 0], "data_offsets": [0, 0]}}
    add(repository, {"W_enc_0.safetensors": header(table), "W_dec_0.safetensors": header(rows), "config.yaml": config})
    with pytest.raises(Refused) as caught:
        CrossLayerTranscoder.load("evil/ct")
    assert text in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_kinds_that_are_downloaded():
    assert all(map(download.is_readable, ("a.safetensors", "x/y.json", "A.YAML", "recipe.toml")))
    assert not any(
        map(download.is_readable, ("a.bin", "a.pt", "a.pth", "a.pkl", "a.ckpt", "a.npy", "a.py", "a.so", "a"))
    )
