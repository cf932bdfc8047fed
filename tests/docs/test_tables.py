"""Figures in documents come from JSON and arithmetic; nobody edits them by hand."""

from __future__ import annotations

import json
import re
from datetime import date
from pathlib import Path

import pytest

from tests.support.tables import COMPUTED, MEASUREMENTS, ROOT, documents, names, written


@pytest.mark.parametrize("document", documents(), ids=lambda path: path.name)
def test_tables_are_those_of_the_measurements(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    assert written(text) == text, "write the tables anew: python -m tests.support.tables"
    assert text.count("<!-- table: ") == text.count("<!-- end -->")


def test_every_measurement_is_shown_once() -> None:
    assert sorted(names()) == sorted([*COMPUTED, *(file.stem for file in MEASUREMENTS.glob("*.json"))])


@pytest.mark.parametrize("file", sorted(MEASUREMENTS.glob("*.json")), ids=lambda path: path.stem)
def test_a_measurement_says_when_on_what_and_how(file: Path) -> None:
    measured = json.loads(file.read_text(encoding="utf-8"))
    assert date.fromisoformat(measured["date"])
    assert measured["machine"]
    assert re.match(r"python -m (clt_plugins|tests\.benchmarks\.\w+) ", measured["command"])
    if "text" not in measured:
        assert all(len(row) == len(measured["columns"]) for row in measured["rows"])


def test_the_readme_states_the_quality_that_was_measured() -> None:
    rows = json.loads((MEASUREMENTS / "quality.json").read_text(encoding="utf-8"))["rows"]
    ratios = [row[-1] for row in rows if row[0].startswith(("our defaults,", "with exemplar_start,"))]
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"(\d\.\d\d) times", text) == [f"{float(ratio.split()[0]):.2f}" for ratio in ratios]
