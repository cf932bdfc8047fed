"""Data that are damaged or do not fit: `local` refuses them by name, or skips the rows if asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from clt_plugins import DamagedError
from clt_plugins.errors import ExitCode
from clt_plugins.toml import toml_text
from tests.support.helpers import tables
from tests.support.results import invoke
from tests.support.stored_data import equal, join, local, make_context, write_numbered


def take(source: Any, count: int) -> Any:
    """The next batches, joined."""
    return join([source.next() for _ in range(count)])


class TestDamage:
    @pytest.fixture
    def data(self, tmp_path: Path) -> Path:
        write_numbered(tmp_path / "data", [64, 64])
        return tmp_path / "data"

    def flip(self, path: Path, row: int) -> None:
        """Flip one bit of a row's inputs."""
        import h5py

        with h5py.File(path) as file:
            place = file["inputs"].id.get_offset() + row * 2 * 3 * 4 + 5
        raw = bytearray(path.read_bytes())
        raw[place] ^= 4
        path.write_bytes(raw)

    def test_text_of_its_manifest_moves_no_cursor(self, data: Path) -> None:
        manifest = json.loads((data / "manifest.json").read_text())
        manifest["about"]["model"] = {"path": "x\x1b[31m\x1b]0;t\x07"}
        (data / "manifest.json").write_text(json.dumps(manifest))
        shown = invoke("inspect", data).stdout
        assert r"model x\x1b[31m\x1b]0;t\x07, text" in shown and "\x1b" not in shown

    def test_a_flipped_bit_is_named_and_stops(self, data: Path) -> None:
        self.flip(data / "train_00001.h5", 21)
        source = local(data)
        with pytest.raises(DamagedError, match=r"train_00001\.h5: chunk 1, rows 16 to 23: damaged"):
            take(source, 8)

    def test_or_is_skipped_if_asked(self, data: Path, caplog: pytest.LogCaptureFixture) -> None:
        self.flip(data / "train_00001.h5", 21)
        source = local(data, on_corrupt="skip")
        ids = torch.cat([source.next().token_ids for _ in range(8)])
        bad = set(range(64 + 16, 64 + 24))
        assert set(ids.tolist()) == set(range(128)) - bad
        assert "skipped: " in caplog.text and "train_00001.h5: chunk 1, rows 16 to 23" in caplog.text

    @pytest.mark.parametrize("how", ["missing", "truncated", "swapped"])
    def test_a_chunk_that_is_not_the_one_written(self, data: Path, tmp_path: Path, how: str) -> None:
        path = data / "train_00001.h5"
        if how == "missing":
            path.unlink()
        elif how == "truncated":
            path.write_bytes(path.read_bytes()[:-1000])
        else:
            path.write_bytes((data / "train_00000.h5").read_bytes())
        source = local(data)
        with pytest.raises(DamagedError, match=r"train_00001\.h5: "):
            take(source, 8)

    def test_every_bit_of_a_chunk_counts(self, data: Path) -> None:
        """Wherever a bit flips, the rows handed out are right or refused."""
        path = data / "train_00000.h5"
        whole = path.read_bytes()
        unharmed = local(data)
        good = join([unharmed.next() for _ in range(8)])
        refused = 0
        for place in range(3, len(whole), 211):
            raw = bytearray(whole)
            raw[place] ^= 1 << place % 8
            path.write_bytes(raw)
            source = local(data)
            try:
                assert equal(join([source.next() for _ in range(8)]), good)
            except DamagedError:
                refused += 1
            source.close()
        assert refused > 10

    def test_damaged_statistics(self, data: Path) -> None:
        (data / "statistics.safetensors").write_bytes(b"")
        with pytest.raises(DamagedError, match=r"statistics\.safetensors: damaged"):
            local(data).statistics()


class TestBadInput:
    @pytest.mark.parametrize(
        ("made", "path", "text"),
        [
            ("", "../none", "{here}/none: no such folder, nor beside the recipe: make one with `generate`"),
            ("", "{here}/none", "{here}/none: no such folder: make one with `generate`"),
            ("data/", "data", "{here}/recipes/data: not a data set: no manifest.json in it (make one with `generate`)"),
            (
                "data/train_0.h5",
                "data",
                "{here}/recipes/data: not a data set: no manifest.json in it (it is not finish",
            ),
            ("data", "data", "{here}/recipes/data: not a data set: it is no folder"),
        ],
    )
    def test_no_data_set(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: str, path: str, text: str
    ) -> None:
        recipes, here = tmp_path / "recipes", tmp_path / "here"
        for folder in (recipes, here):
            folder.mkdir()
        if made:
            (recipes / made).parent.mkdir(exist_ok=True)
            (recipes / made).mkdir() if made.endswith("/") else (recipes / made).touch()
        file = recipes / "r.toml"
        source = {"name": "local", "path": path.format(here=tmp_path)}
        file.write_text(toml_text(tables(source=source)))
        monkeypatch.chdir(here)
        done = invoke("run", file, "--out", tmp_path / "run")
        line = file.read_text().splitlines().index(f'path = "{source["path"]}"') + 1
        assert done.exit_code == ExitCode.USAGE
        assert done.stderr.startswith(f"{file}:{line}: source.path: {text.format(here=tmp_path)}"), done.stderr

    @pytest.mark.parametrize(
        "change",
        [
            {"layers": -1},
            {"layers": "2"},
            {"dtype": "float8"},
            {"block_rows": 0},
            {"tokens": {"train": 3, "held_out": 0}},
            {"format": 2},
            {"more": 1},
            {"chunks": [{"file": "../../etc/passwd", "part": "train", "rows": 1, "bytes": 1, "checksum": ""}]},
        ],
    )
    def test_a_manifest_nobody_wrote(self, tmp_path: Path, change: dict[str, Any]) -> None:
        write_numbered(tmp_path / "data", [20])
        path = tmp_path / "data" / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        with pytest.raises(ValueError, match=r"manifest\.json: not the manifest of a data set: "):
            local(tmp_path / "data")

    def test_batches_that_do_not_fit(self, tmp_path: Path) -> None:
        write_numbered(tmp_path / "data", [20])
        with pytest.raises(ValueError, match=r"^train\.batch_tokens: a batch of 21 tokens is larger than the data"):
            local(tmp_path / "data", make_context(batch_tokens=21))
        with pytest.raises(ValueError, match=r"^source\.buffer_tokens: 4 is less than a batch of 16 tokens$"):
            local(tmp_path / "data", buffer_tokens=4)
        with pytest.raises(ValueError, match=r"^train\.batch_tokens: 16 cannot be divided among 3 data ranks$"):
            local(tmp_path / "data", make_context(ranks=3))

    def test_nothing_held_out(self, tmp_path: Path) -> None:
        write_numbered(tmp_path / "data", [20], held_out=0)
        with pytest.raises(ValueError, match=r"holds no held-out tokens"):
            local(tmp_path / "data")

    def test_a_state_of_other_data(self, tmp_path: Path) -> None:
        write_numbered(tmp_path / "one", [20])
        write_numbered(tmp_path / "two", [21])
        with pytest.raises(ValueError, match=r"^source\.path: not the data that the state was saved with"):
            local(tmp_path / "two").load_state(local(tmp_path / "one").state())

    def test_values_a_type_cannot_hold(self, tmp_path: Path) -> None:
        from clt_datasets.format.encode import encode

        x = torch.tensor([[[1.0, 70000.0]]])
        with pytest.raises(ValueError, match=r"^--dtype: activations reach 70000, which float16 cannot hold"):
            encode(x, "float16")
        with pytest.raises(ValueError, match=r"^source: an activation of layer 0 is not a finite number: try"):
            encode(x * torch.inf, "float32")
