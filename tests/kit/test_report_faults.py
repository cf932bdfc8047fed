"""Reports that are wrong in one way each: the kit finds the fault and says where to look. Without it they conform."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from tests.support.kit_says import by_check, failures_of, installed

if TYPE_CHECKING:
    from tests.conftest import Distributions

REPORT = '''
import json, os, time
from pathlib import Path
from attrs import frozen
from clt_plugins import *

@frozen(kw_only=True)
class Config:
    """A page of all features."""
    graphs: list[Path] = []
    """Nothing."""

class Page:
    CHECK

    def __init__(self, config, context):
        pass

    def write(self, collected, facts, folder):
        import numpy as np
        LOOK
        lines = [FACTS]
        for layer in range(LAYERS):
            arrays = collected.layer(layer)
            GEOMETRY
            for feature in range(FIRST, collected.info.n_features):
                top = collected.examples(layer, feature).top
                word = b"".join(collected.spell(collected.ids[[one.row for one in top]])).decode("utf-8", "replace")
                lines.append(f"{arrays['maximum'][feature]} {word}")
        ALSO
        try:
            (folder / "index.html").write_text("<ul>" + "".join(f"<li>{ESCAPED}" for line in lines) + STAMP)
        except ERROR:
            pass
        (folder / "end.txt").write_text(END)

@hookimpl
def clt_reports():
    return [Spec("page", Config, Page)]
'''

RIGHT = {
    "CHECK": "pass",
    "LOOK": "if not collected.info.spelled: raise Refused('reports', 'no text')",
    "FACTS": "facts.name, str(facts.curves)",
    "LAYERS": "collected.info.n_layers",
    "GEOMETRY": "pass",
    "FIRST": "0",
    "ALSO": "pass",
    "ESCAPED": "line.replace('<', '&lt;')",
    "STAMP": "''",
    "ERROR": "ZeroDivisionError",
    "END": "'end'",
    "LATE": "if not collected.info.geometry: raise Refused('reports', 'no geometry')",
}

CHECKED = ("write", "every_store", "every_feature", "markup", "broken_off", "before_training")


@pytest.fixture
def found(distributions: Distributions) -> Callable[..., dict[str, str]]:
    """Failures of the report with some words replaced: check -> its message."""

    def find(check: str, **faults: str) -> dict[str, str]:
        module = installed(distributions, REPORT, **{**RIGHT, **faults})
        # All for the report that is right; else the check that finds the fault, and the basic one.
        wanted = ("write", check) if check else CHECKED
        return by_check(failures_of(module, lambda case: case.check in wanted))

    return find


METHOD = "def check(self, transcoder): return {}"


@pytest.mark.parametrize(
    ("faults", "check", "text"),
    [
        ({}, "", ""),
        ({"STAMP": "str(time.perf_counter_ns())"}, "write", "index.html differ"),
        ({"END": "''"}, "write", "empty: end.txt"),
        ({"ALSO": "Path('here.txt').write_text('x')"}, "write", "here.txt"),
        ({"ALSO": "(folder.parent / 'beside.txt').write_text('x')"}, "write", "beside.txt"),
        ({"ALSO": "(collected.folder / 'notes.txt').write_text('x')"}, "write", "it was changed"),
        ({"GEOMETRY": "arrays['similar']"}, "every_store", "ask for what not every store has"),
        ({"GEOMETRY": "arrays['top_row'][:, 0]"}, "every_store", "IndexError"),
        ({"FACTS": "str(facts.evaluation['nmse'])"}, "every_store", "no facts"),
        (
            {"LOOK": "(folder / 'a').write_text('x')\n        LATE"},
            "every_store",
            "nothing written where it refuses",
        ),
        ({"LAYERS": "max(1, collected.info.n_layers - 1)"}, "every_feature", "of layer 1 in the files"),
        ({"FIRST": "min(20, collected.info.n_features - 1)"}, "every_feature", "of layer 0 in the files"),
        ({"ESCAPED": "line"}, "markup", "stands in it as it is"),
        (
            {"FACTS": "''", "ESCAPED": "line.replace('</', '&lt;/')"},
            "markup",
            "index.html without the markup of a token",
        ),
        ({"ERROR": "OSError"}, "broken_off", "index.html could not be opened for writing, and it went on"),
        ({"CHECK": METHOD.format("['no']")}, "before_training", "a list of texts"),
        ({"CHECK": METHOD.format("[f'x: {transcoder.device}']")}, "before_training", "device meta"),
    ],
)
def test_a_fault_is_found(found: Callable[..., dict[str, str]], faults: dict[str, str], check: str, text: str) -> None:
    failures = found(check, **faults)
    assert set(failures) == ({check} if check else set())
    assert not check or text in failures[check]
