"""Stages that are wrong in one way each: the kit finds the fault and says where to look. Without it they conform."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.kit_says import by_check, failures_of, installed

if TYPE_CHECKING:
    from tests.conftest import Distributions

STAGE = '''
import json
from pathlib import Path
from attrs import evolve, frozen
from clt_plugins import *

@frozen(kw_only=True)
class Config:
    """A smaller transcoder."""
    factor: float = 0.5
    """By which weights are multiplied."""

class Smaller:
    def __init__(self, config):
        self.config = config
        self.info = StageInfo(folder="smaller", needs="transcoder", returns_transcoder=RETURNS)

    def check(self, job):
        LOOK
        return job.transcoder if CHECKED else None

    def run(self, job):
        import torch
        transcoder = job.transcoder.clone() if COPY else job.transcoder
        with torch.no_grad():
            for parameter in transcoder.parameters():
                parameter.mul_(self.config.factor + NOISE)
        if ALSO:
            Path(ALSO).write_text("x")
        EARLIER
        try:
            (job.folder / "log.txt").write_text("smaller")
        except ERROR:
            pass
        if RECORD:
            (job.folder / "stage.json").write_text(json.dumps({"made_from": RECORD}))
        if TRAINS:
            job.transcoder.train()
        return transcoder if RETURNED else None

@hookimpl
def clt_stages():
    return [Spec("smaller", Config, lambda config, context: Smaller(config))]
'''

SWALLOWED = """import contextlib
        with contextlib.suppress(OSError):
            {}"""

RIGHT = {
    "RETURNS": "True",
    "LOOK": "pass",
    "CHECKED": "True",
    "COPY": "True",
    "NOISE": "0",
    "ALSO": "None",
    "EARLIER": "pass",
    "ERROR": "ZeroDivisionError",
    "RECORD": "None",
    "TRAINS": "False",
    "RETURNED": "True",
}


@pytest.fixture
def found(
    distributions: Distributions, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., dict[str, str]]:
    """Failures of the stage with some words replaced: check -> its message."""
    monkeypatch.chdir(tmp_path)  # one of the faults is a file written into the current folder

    def find(**faults: str) -> dict[str, str]:
        module = installed(distributions, STAGE, **{**RIGHT, **faults})
        wanted = ("run", "before_training", "broken_off", "repeatable")
        return by_check(failures_of(module, lambda case: case.check in wanted))

    return find


@pytest.mark.parametrize(
    ("faults", "check", "text"),
    [
        ({}, "", ""),
        ({"COPY": "False"}, "run", "of the job's transcoder as it was"),
        ({"ALSO": '"elsewhere.txt"'}, "run", "elsewhere.txt"),
        ({"ALSO": "job.folder.parent / 'beside.txt'"}, "run", "beside.txt"),
        ({"TRAINS": "True"}, "run", "it is in training mode"),
        ({"RECORD": "{'by': 'hand'}"}, "run", "stage.json with `made_from`"),
        ({"RETURNED": "False"}, "run", "run must return one, got nothing"),
        ({"RETURNS": "False", "CHECKED": "False"}, "run", "run must return None, got CrossLayerTranscoder"),
        ({"CHECKED": "False"}, "before_training", "a transcoder from `check` where `info.returns_transcoder`"),
        ({"LOOK": "float(job.transcoder.W_enc.sum())"}, "before_training", "meta"),
        ({"LOOK": "job.folder.mkdir(parents=True); (job.folder / 'x').touch()"}, "before_training", "no file from"),
        ({"ERROR": "OSError"}, "broken_off", "log.txt could not be opened for writing, and it went on"),
        ({"EARLIER": SWALLOWED.format("(job.folder / 'a.txt').write_text('x')")}, "broken_off", "a.txt could not be"),
        (
            {"EARLIER": SWALLOWED.format("open(job.folder / 'b.csv', 'w').close()")},
            "broken_off",
            "an error of any write to end `run`",
        ),
        ({"NOISE": "float(torch.rand(()))"}, "repeatable", "Use `generator`"),
    ],
    ids=lambda value: "-".join(value) or "none" if isinstance(value, dict) else "",
)
def test_a_stage_with_a_fault(found: Callable[..., dict[str, str]], faults: dict[str, str], check: str, text: str):
    failures = found(**faults)
    if not check:
        assert failures == {}
    else:
        assert check in failures, failures
        assert text in failures[check], failures[check]
