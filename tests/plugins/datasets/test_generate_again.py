"""`generate` over what is there: what is missing or damaged is written again, and other data are not mixed in."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

import clt_datasets.format.files as files
from clt_datasets.format.folder import ChunkReader
from clt_datasets.make.inspect import inspect
from clt_plugins import Refused
from clt_synthetic.source import Synthetic
from tests.support.stored_data import SMALL, content, generated, stamps


def missing(out: Path) -> None:
    (out / "train_00001.h5").unlink()


def all_missing(out: Path) -> None:
    for path in out.glob("*.h5"):
        path.unlink()


def empty(out: Path) -> None:
    (out / "train_00000.h5").write_bytes(b"")


def flipped(out: Path) -> None:
    path = out / "train_00000.h5"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 3] ^= 4  # in the rows: their checksum alone shows it
    path.write_bytes(raw)


def held_out_flipped(out: Path) -> None:
    path = out / "held_out_00000.h5"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 3] ^= 4
    path.write_bytes(raw)


def held_out_missing(out: Path) -> None:
    (out / "held_out_00000.h5").unlink()


def swapped(out: Path) -> None:
    """Each file is complete, and its checksums are right."""
    (out / "train_00000.h5").rename(out / "x")
    (out / "train_00001.h5").rename(out / "train_00000.h5")
    (out / "x").rename(out / "train_00001.h5")


def of_another_set(out: Path) -> None:
    generated(out.with_name("other"), recipe=None, **{**SMALL, "tokens": 160})
    (out.with_name("other") / "held_out_00000.h5").replace(out / "train_00001.h5")


def other_statistics(out: Path) -> None:
    (out / "statistics.safetensors").write_bytes(b"x")


@pytest.mark.parametrize("finished", [True, False], ids=["finished", "unfinished"])
@pytest.mark.parametrize(
    "damage",
    [
        missing,
        all_missing,
        empty,
        flipped,
        held_out_flipped,
        held_out_missing,
        swapped,
        of_another_set,
        other_statistics,
    ],
    ids=lambda damage: damage.__name__,
)
def test_what_is_missing_or_damaged_is_written_again_and_nothing_else(
    tmp_path: Path, damage: Callable[[Path], None], finished: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "data"
    generated(out, **SMALL)
    before, written = content(out), stamps(out)
    damage(out)
    changed = {name for name, raw in content(out).items() if raw != before[name]} | (
        before.keys() - content(out).keys()
    )
    if not finished:
        (out / "manifest.json").unlink()
    generated(out, **SMALL)
    assert content(out) == before
    assert {name for name, stamp in stamps(out).items() if stamp != written[name]} == changed & written.keys()
    assert inspect(out, verify=True).faults == []
    generated(out, **SMALL)
    assert "complete already" in capsys.readouterr().err.splitlines()[-1]


def test_unchanged_files_are_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "data"
    generated(out, **SMALL)
    read: list[str] = []
    verify = ChunkReader.verify
    monkeypatch.setattr(ChunkReader, "verify", lambda self: (read.append(self.path.name), verify(self))[1])
    passed: dict[str, str | None] = {}
    generated(out, **SMALL, written=lambda path, digest: passed.update({path.name: digest}))
    assert read == []
    # What an upload needs is known.
    assert {name for name, digest in passed.items() if digest is None} == {"manifest.json", "statistics.safetensors"}
    assert all(files.file_digest(out / name) == digest for name, digest in passed.items() if digest)
    os.utime(out / "train_00001.h5", ns=(1, 1))  # the clock was set back
    generated(out, **SMALL)
    assert read == ["train_00001.h5"]
    generated(out, **SMALL, verify=True)
    assert sorted(read[1:]) == sorted(path.name for path in out.glob("*.h5"))


@pytest.mark.parametrize("damage", [b"", b"\xff{]", b'{"file": 3}\n', b"x" * 100, b'{"file": "train_00000.h5"'])
def test_a_damaged_ledger_costs_only_time(tmp_path: Path, damage: bytes) -> None:
    out = tmp_path / "data"
    generated(out, **SMALL)
    before, written = content(out), stamps(out)
    (ledger,) = out.glob(".written_*")
    ledger.write_bytes(ledger.read_bytes()[:-40] + damage)
    for _ in range(2):
        generated(out, **SMALL)
        assert content(out) == before and stamps(out) == written
    assert all(json.loads(line) for line in ledger.read_text().splitlines())


@pytest.mark.parametrize("name", [".generate.json", ".held_out.json", "manifest.json"])
@pytest.mark.parametrize("raw", [b"", b"x", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"rows": -1}', b'{"rows": NaN}'])
def test_damaged_state_is_refused_by_name(tmp_path: Path, name: str, raw: bytes) -> None:
    if name == ".generate.json" and b"-1" in raw:
        pytest.skip("an object, in which every setting is missing: see other settings")
    out = tmp_path / "data"
    generated(out, **SMALL)
    (out / name).write_bytes(raw)
    with pytest.raises(Refused, match=rf"{name}: [^\n]*$"):
        generated(out, **SMALL)


def test_other_content_under_the_same_name_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def of(text: str) -> None:
        monkeypatch.setattr(Synthetic, "identity", lambda self: {"source.features": text}, raising=False)

    out = tmp_path / "data"
    of("sha256 1")
    generated(out, **SMALL)
    assert json.loads((out / "manifest.json").read_text())["about"]["content"] == {"source.features": "sha256 1"}
    (out / "train_00001.h5").unlink()
    (out / "manifest.json").unlink()
    before = content(out)
    of("sha256 2")
    text = (
        r"^source\.features: its content is not the one that .*data was begun with: it was sha256 1, now it is sha256 2"
    )
    with pytest.raises(Refused, match=text):
        generated(out, **SMALL)
    assert content(out) == before
    of("sha256 1")
    generated(out, **SMALL)
    of("sha256 2")
    with pytest.raises(Refused, match=text):  # also where nothing is missing
        generated(out, **SMALL)
