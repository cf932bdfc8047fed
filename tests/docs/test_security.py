"""What SECURITY.md promises about models, and that each of its promises has a test."""

from __future__ import annotations

import json
import re
import shutil
from contextlib import AbstractContextManager, suppress
from pathlib import Path

import pytest

from clt_plugins import Refused, build_source, read_recipe
from tests.support.helpers import plugins
from tests.support.tables import ROOT


@pytest.mark.parametrize(
    ("file", "outcome"),
    [
        ("config.json", pytest.raises(Refused, match=r"^model\.path: .* needs code of its own, which is never run")),
        # Newer versions of transformers read what is in tokenizer.json, older ones refuse.
        ("tokenizer_config.json", suppress(Refused)),
    ],
)
def test_a_models_own_code_is_never_run(
    file: str, outcome: AbstractContextManager[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even where the user answers yes to every question."""
    model, ran = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(ROOT / "examples" / "models" / "stdlib-gpt2", model)
    described = json.loads((model / file).read_text())
    own = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model", "AutoTokenizer": ["own.Tokenizer", None]}
    described |= {"model_type": "own", "tokenizer_class": "OwnTokenizer", "auto_map": own}
    (model / file).write_text(json.dumps(described))
    (model / "own.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    tables = {
        "name": "own-code",
        "model": {"path": str(model)},
        "source": {"name": "stream"},
        "transcoder": {"features": 8},
        "activation": "relu",
        "train": {"steps": 1},
    }
    with outcome:
        build_source(read_recipe(tables, plugins=plugins()))
    assert not ran.exists()


def test_every_promise_names_a_test_that_exists() -> None:
    rows = [line for line in (ROOT / "SECURITY.md").read_text().splitlines() if "::test_" in line]
    assert len(rows) > 15
    for row in rows:
        for file, name in re.findall(r"`([\w/]+\.py)::(test_\w+)`", row):
            path = ROOT / file if "/" in file else ROOT / "tests" / "plugins" / "datasets" / file
            assert re.search(rf"def {name}\(", path.read_text()), f"{file}::{name}"


def test_every_row_of_promises_has_a_test() -> None:
    text = (ROOT / "SECURITY.md").read_text()
    tables = re.findall(r"(?m)^\| promise \| test.*\n\| --- \| --- \|\n((?:\|.*\n)+)", text)
    assert len(tables) == 4
    assert all("::test_" in row for table in tables for row in table.splitlines())
