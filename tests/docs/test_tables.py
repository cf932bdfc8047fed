"""Figures in documents come from JSON and arithmetic; nobody edits them by hand."""

from __future__ import annotations

import json
import re
from datetime import date
from pathlib import Path

import pytest

from tests.support.tables import COMPUTED, MEASUREMENTS, documents, names, written


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
