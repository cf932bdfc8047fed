"""Exports are for others: no path of this disk in any file, and files that others can read."""

from __future__ import annotations

import json
from pathlib import Path

import attrs
import pytest
from click.testing import CliRunner

from clt_plugins import Refused, write_tensors
from clt_plugins.cli.main import main_group
from clt_plugins.files.atomic import FILE_MODE
from clt_plugins.files.folders import check_folder
from clt_plugins.recipe.structure import structure_choice
from clt_plugins.registry.build import build
from tests.support.helpers import parts, plugins

FORMATS = list(plugins().choices("exports"))
MODEL = Path(__file__).parents[3] / "examples/models/stdlib-gpt2"


def transcoder(model: str, tying: str = "untied"):
    made = parts(
        tying={"name": tying},
        activation={"name": "jumprelu", "threshold": 0.1},
        source={"name": "synthetic", "layers": 3, "d_model": 6, "features": 24, "active": 2.0},
    ).transcoder
    made.described_model = {"path": model, "tokenizer": f"{model}/tokenizer"}
    return made.eval()


def exported(name: str, folder: Path, model: str = str(MODEL), **settings: object) -> Path:
    """The folder."""
    folder.mkdir()
    one = transcoder(model, "per_layer" if name == "transcoder-set" else "untied")
    exporter = build(structure_choice(plugins(), "exports", {"name": name, **settings}), one.context)
    exporter.export(one, folder)
    return folder


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("model", [str(MODEL), "/data/nobody/llama", "~/llama", "../models/llama"])
def test_no_path_of_this_disk_is_in_any_file(tmp_path, name, model):
    folder = exported(name, tmp_path / "export", model)
    leading = str(Path(model).parent)
    for path in (one for one in folder.rglob("*") if one.is_file()):
        content = path.read_bytes()
        for text in (f"{leading}/", str(MODEL.parent), str(tmp_path), str(Path.home()) + "/"):
            assert text.encode() not in content, (path.name, text)


@pytest.mark.parametrize("name", FORMATS)
def test_a_name_that_is_a_path_is_refused(tmp_path, name):
    config = plugins().choices("exports")[name].spec.config
    if "model_name" not in {a.name for a in attrs.fields(config)}:
        pytest.skip("it has no such setting")
    one = transcoder("user/model")
    exporter = build(structure_choice(plugins(), "exports", {"name": name, "model_name": str(MODEL)}), one.context)
    with pytest.raises(ValueError, match="is a path of this disk: give the name by which others know the model"):
        exporter.export(one, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", FORMATS)
def test_files_have_the_modes_that_the_umask_allows(tmp_path, name):
    """Also where no run writes them: `safetensors` by itself writes files that only their owner can read."""
    folder = exported(name, tmp_path / "export")
    for path in folder.rglob("*"):
        if path.is_file():
            assert path.stat().st_mode & 0o777 == FILE_MODE, path.name


def test_a_file_of_tensors_has_the_mode_that_the_umask_allows(tmp_path):
    write_tensors(tmp_path / "x.safetensors", {}, "float32")
    (tmp_path / "y").touch()
    modes = {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes == {FILE_MODE}, "that of a file which Python makes"


def test_the_manifest_of_an_export_lists_what_is_in_its_folders(tmp_path):
    transcoder("user/model").save(tmp_path / "transcoder")
    command = ["export", tmp_path / "transcoder", "--format", "saelens", "--out", tmp_path / "export"]
    done = CliRunner().invoke(main_group, [str(one) for one in command])
    assert done.exit_code == 0, done.output
    listed = json.loads((tmp_path / "export/manifest.json").read_text())["files"]
    assert {"layer_00/cfg.json", "layer_02/sae_weights.safetensors"} <= listed.keys()
    (tmp_path / "export/layer_01/cfg.json").write_text("{}")
    with pytest.raises(Refused, match=r"layer_01/cfg\.json: truncated"):
        check_folder(tmp_path / "export")
