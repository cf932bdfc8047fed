"""Extras: the tests have all of them, and where one is missing a message names it."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from clt_plugins import Refused
from tests.support.helpers import parts, plugins
from tests.support.tables import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]


def test_dev_has_all_that_other_extras_have() -> None:
    assert not [text for name, texts in EXTRAS.items() for text in texts if name != "dev" and text not in EXTRAS["dev"]]


def test_the_guide_to_installing_names_every_extra() -> None:
    guide = (ROOT / "examples" / "guides" / "install.md").read_text(encoding="utf-8")
    assert not [name for name in EXTRAS if f"| `{name}` |" not in guide]


def test_every_extra_is_installed_by_the_test_command() -> None:
    import gguf
    import hdf5plugin
    import matplotlib

    assert gguf and hdf5plugin and matplotlib


def test_without_gguf_a_message_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "gguf", None)
    tables = {
        "name": "gguf",
        "model": {"path": str(tmp_path / "model.gguf")},
        "source": {"name": "stream"},
        "transcoder": {"features": 8},
        "activation": "relu",
        "train": {"steps": 1},
    }
    from clt_plugins import build_source, read_recipe

    with pytest.raises(Refused, match=r"^model\.path: .*clt-plugins\[gguf\]"):
        build_source(read_recipe(tables, plugins=plugins()))


def test_without_matplotlib_thresholds_are_shown_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from click.testing import CliRunner

    transcoder: Any = parts(activation={"name": "jumprelu"}).transcoder
    transcoder.save(tmp_path / "transcoder")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    command = plugins().commands()["thresholds"]
    arguments = [str(tmp_path / "transcoder"), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    assert "median" in done.output
    assert "clt-plugins[plots]" in done.output
    assert not (tmp_path / "out" / "thresholds.png").exists()
    assert torch.is_tensor(transcoder.activation.threshold())
