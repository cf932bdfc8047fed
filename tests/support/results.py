"""Commands for runs that have results, and what the results' files say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from clt_plugins.cli.main import main_group

CONVERT = {"tokens": 512, "calibration_tokens": 512, "tolerance": 0.05}
STAGES = {"convert": CONVERT, "evaluate": {"tokens": 256}, "exports": [{"name": "safetensors"}]}
FEW = ["--set", "stages.evaluate.tokens=256"]


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main_group, [str(argument) for argument in arguments])


def evaluate(place: Path, *arguments: object) -> dict[str, Any]:
    done = invoke("evaluate", place, "--json", *FEW, *arguments)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def origin(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text())["made_from"]["transcoder"]
