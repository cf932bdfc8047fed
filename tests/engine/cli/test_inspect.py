"""`inspect`: one command for runs, transcoders, other tools' folders and data sets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from clt_plugins.cli.main import main_group
from tests.support.exports import TYINGS, make
from tests.support.formats import circuit_tracer
from tests.support.helpers import read_tensors
from tests.support.stored_data import write_numbered
from tests.support.trainer_formats import llamascopium


def inspect(*arguments: object) -> Result:
    return CliRunner().invoke(main_group, ["inspect", *map(str, arguments)])


def test_our_own_folder_is_described_without_its_decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transcoder = make(tying=TYINGS["per_source"], normalisation="rms")
    transcoder.step, transcoder.tokens = 7, 1234
    transcoder.save(tmp_path / "mine")
    read: list[str] = []
    from clt_plugins.files.sliced import SlicedTensors

    real = SlicedTensors.read
    monkeypatch.setattr(SlicedTensors, "read", lambda self, name: read.append(name) or real(self, name))
    done = inspect(tmp_path / "mine", "--json")
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert (said["format"], said["layers"], said["d_model"], said["features"]) == ("clt-plugins", 3, 6, 10)
    assert said["tying"] == {"name": "per_source", "feature_offset": False, "feature_scale": True, "skip": False}
    assert said["normalisation"] == {"name": "rms"} and (said["step"], said["tokens"]) == (7, 1234)
    threshold = transcoder.activation.threshold().detach()
    expected = {"least": threshold.min(), "median": threshold.median(), "largest": threshold.max()}
    assert said["thresholds"] == pytest.approx({name: float(value) for name, value in expected.items()})
    numbers = sum(value.numel() for value in transcoder.tensors().values())
    assert said["dtypes"] == {"F32": 4 * numbers}
    assert read == ["log_threshold"], "no other tensor is read"
    text = inspect(tmp_path / "mine").stdout
    assert "3 layers x 10 features" in text and "trained for 7 steps, 1,234 tokens" in text
    assert text.rstrip().endswith("checked: shapes; no fault")


def test_text_of_strangers_moves_no_cursor(tmp_path: Path) -> None:
    transcoder = make()
    transcoder.described_model = {"path": "\x1b]0;title\x07 \u202edas\nlast line"}
    transcoder.save(tmp_path / "theirs")
    text = inspect(tmp_path / "theirs").stdout
    assert r"model \x1b]0;title\x07 \u202edas\nlast line: reads" in text


def test_damage_is_told_and_ends_with_1(tmp_path: Path) -> None:
    make().save(tmp_path / "mine")
    path = tmp_path / "mine" / "transcoder.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    assert inspect(tmp_path / "mine").exit_code == 0, "only --verify reads everything"
    done = inspect(tmp_path / "mine", "--verify")
    assert done.exit_code == 1 and "! " in done.stdout and "transcoder.safetensors" in done.stdout

    (tmp_path / "theirs").mkdir()
    circuit_tracer(tmp_path / "theirs")
    from safetensors.torch import save_file

    path = tmp_path / "theirs" / "W_dec_1.safetensors"
    rows = read_tensors(path)["W_dec_1"]
    rows[2, 1, 3] = torch.nan
    save_file({"W_dec_1": rows}, path)
    done = inspect(tmp_path / "theirs", "--verify")
    assert done.exit_code == 1 and "tensor 'W_dec_1' holds numbers that are not finite" in done.stdout
    assert "reads hook_resid_mid, writes hook_mlp_out" in done.stdout

    # Numbers in another kind of file than safetensors.
    (tmp_path / "pickled").mkdir()
    llamascopium(tmp_path / "pickled", act_fn="relu", pickled=True)
    done = inspect(tmp_path / "pickled", "--verify")
    assert done.exit_code == 0 and done.stdout.rstrip().endswith("checked: all numbers; no fault")
    path = tmp_path / "pickled" / "sae_weights.pt"
    saved = torch.load(path, weights_only=True)
    saved["sae"]["W_D.1"][0, 0, 0] = torch.nan
    torch.save(saved, path)
    done = inspect(tmp_path / "pickled", "--verify")
    assert done.exit_code == 1 and "W_dec.00' holds numbers that are not finite" in done.stdout
    assert done.stdout.rstrip().endswith("checked: all numbers; 1 fault")


def test_data_sets_are_told_from_transcoders_and_from_nothing(tmp_path: Path) -> None:
    write_numbered(tmp_path / "data", [40])
    said = json.loads(inspect(tmp_path / "data", "--json").stdout)
    assert said["tokens"]["train"] == 40
    (tmp_path / "data" / "manifest.json").unlink()
    assert inspect(tmp_path / "data").exit_code == 2, "still a data set: its own command says what is missing"
    (tmp_path / "empty").mkdir()
    for place, text in (("empty", "not a transcoder"), ("nowhere", "no such folder")):
        done = inspect(tmp_path / place)
        assert done.exit_code == 2 and text in done.output
