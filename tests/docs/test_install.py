"""Extras: the tests have all of them, and where one is missing a message names it."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from clt_plugins import Refused, build_source, read_recipe
from clt_plugins.cli.main import main_group
from tests.support.helpers import parts, plugins
from tests.support.tables import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]


@pytest.mark.parametrize("file", ["README.md", "examples/guides/install.md"])
def test_documents_name_the_torch_of_the_constraints(file: str) -> None:
    pin = re.search(r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M)
    assert pin
    assert set(re.findall(r"torch (\d+\.\d+\.\d+)", (ROOT / file).read_text(encoding="utf-8"))) == {pin[1]}


def test_dev_has_all_that_other_extras_have_but_the_browsers() -> None:
    others = [text for name, texts in EXTRAS.items() for text in texts if name not in ("dev", "browser")]
    assert not [text for text in others if text not in EXTRAS["dev"]]


def test_the_guide_to_installing_names_every_extra() -> None:
    guide = (ROOT / "examples" / "guides" / "install.md").read_text(encoding="utf-8")
    assert not [name for name in EXTRAS if f"| `{name}` |" not in guide]


def test_every_extra_is_installed_by_the_test_command() -> None:
    import accelerate
    import gguf
    import hdf5plugin
    import matplotlib

    assert accelerate and gguf and hdf5plugin and matplotlib


@pytest.mark.parametrize("package", ["gguf", "accelerate"])
def test_without_gguf_a_message_names_the_extra(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, package, None)
    tables = {
        "name": "gguf",
        "model": {"path": str(tmp_path / "model.gguf")},
        "source": {"name": "stream"},
        "transcoder": {"features": 8},
        "activation": "relu",
        "train": {"steps": 1},
    }
    with pytest.raises(Refused, match=rf"^model\.path: .*package {package}: .*clt-plugins\[gguf\]"):
        build_source(read_recipe(tables, plugins=plugins()))


def test_without_matplotlib_a_message_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transcoder = parts(activation={"name": "jumprelu"}).transcoder
    transcoder.save(tmp_path / "transcoder")
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    arguments = ["thresholds", str(tmp_path / "transcoder"), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(main_group, arguments)
    assert done.exit_code == 2
    assert "clt-plugins[plots]" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    table = CliRunner().invoke(main_group, [*arguments[:2], "--no-plot"])
    assert table.exit_code == 0
    assert "median" in table.output
