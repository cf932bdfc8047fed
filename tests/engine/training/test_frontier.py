"""The frontier: what is marked, means over seeds, the page and the picture."""

from __future__ import annotations

import json
import re
import statistics
from html.parser import HTMLParser
from typing import Any

import pytest
import torch

from clt_plugins.files.records import from_data
from clt_plugins.training.sweep.result.frontier import Frontier, Point, as_text, frontier, optimal, scores_of
from clt_plugins.training.sweep.result.page import page
from clt_plugins.training.sweep.result.picture import draw
from clt_plugins.training.sweep.run import write


def point(label: str, l0: float | None, nmse: float | None, ce: float | None = None, **settings: Any) -> Point:
    return Point(label=label, settings=settings, status="trained", l0=l0, nmse=nmse, ce_recovered=ce)


def test_a_member_that_no_other_is_better_than_is_on_the_frontier():
    points = [
        point("few", 10, 0.5),
        point("worse", 20, 0.6),
        point("many", 40, 0.2),
        point("equal L0", 40, 0.3),
        point("twin", 10, 0.5),
        point("unknown", None, 0.1),
        point("not defined", 5, None),
    ]
    assert optimal(points, "nmse", lower=True) == {"few", "twin", "many"}


@pytest.mark.parametrize("seed", range(5))
def test_the_frontier_is_what_a_search_over_thresholds_finds(seed):
    random = torch.Generator().manual_seed(seed)
    values = torch.randint(6, (30, 2), generator=random).double().tolist()
    points = [point(str(number), l0, None, score) for number, (l0, score) in enumerate(values)]
    # Independent: of all members within an L0 the best score counts, at the least L0 that reaches it.
    expected = set()
    for limit in sorted({l0 for l0, _ in values}):
        best = max(score for l0, score in values if l0 <= limit)
        least = min(l0 for l0, score in values if score == best and l0 <= limit)
        expected |= {str(n) for n, (l0, score) in enumerate(values) if (l0, score) == (least, best)}
    assert optimal(points, "ce_recovered", lower=False) == expected


def swept() -> Frontier:
    points = [
        point(
            f"k={k},seed={seed}",
            k + seed / 10,
            1 / k + seed / 100,
            k / 100 - seed / 500,
            **{"activation.k": k, "seed": seed},
        )
        for k in (8, 16)
        for seed in (0, 1, 2)
    ]
    failed = Point(label="<b>k=32</b>", settings={"activation.k": 32, "seed": 0}, status="failed", error="not finite")
    return frontier("name & more", ["activation.k", "seed"], [*points, failed])


def test_seeds_have_mean_and_spread():
    found = swept()
    assert [each.settings for each in found.seeds] == [{"activation.k": 8}, {"activation.k": 16}]
    of_8 = found.seeds[0].scores
    values = [1 / 8, 1 / 8 + 0.01, 1 / 8 + 0.02]
    assert of_8["nmse"].mean == pytest.approx(statistics.fmean(values))
    assert of_8["nmse"].std == pytest.approx(statistics.stdev(values))
    assert of_8["l0"].mean == pytest.approx(8.1)
    assert {p.label: p.optimal for p in found.members if p.optimal} == {
        "k=8,seed=0": ["nmse", "ce_recovered"],
        "k=16,seed=0": ["nmse", "ce_recovered"],
    }
    assert frontier("n", ["activation.k"], found.members).seeds == []


def test_a_table_shows_scores_marks_and_failures():
    lines = as_text(swept()).splitlines()
    assert lines[0].split() == ["member", "L0", "NMSE", "CE", "recovered", "on", "the", "frontier", "of"]
    assert lines[1].split() == ["k=8,seed=0", "8.0", "0.1250", "8.00%", "NMSE,", "CE"]
    assert lines[7].split() == ["<b>k=32</b>", "-", "-", "-", "failed"]
    assert "0.1350 ± 0.0100" in lines[10]


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_page_needs_no_network_and_shows_markup_as_text(tmp_path):
    text = page(swept())
    read = Page()
    read.feed(text)
    names = [tag for tag, _ in read.tags]
    assert not {"script", "link", "img", "iframe", "b"} & set(names)
    assert not re.search(r"(src|href|url\(|@import|https?:)", text)
    assert "<b>k=32</b>" in read.text and "name & more" in read.text
    circles = [attributes for tag, attributes in read.tags if tag == "circle"]
    assert len(circles) == 2 * 6, "six members with scores in each of two charts"
    assert sum("open" not in str(one["class"]) for one in circles) == 4
    for one in circles:
        assert 0 <= float(str(one["cx"])) <= 560 and 0 <= float(str(one["cy"])) <= 360
    rows = [attributes for tag, attributes in read.tags if tag == "tr" and attributes.get("class") == "optimal"]
    assert len(rows) == 2


def test_files_are_written_also_without_matplotlib_and_without_scores(tmp_path, monkeypatch):
    files = write(swept(), tmp_path)
    assert [file.name for file in files] == ["frontier.json", "frontier.html", "frontier.png"]
    assert (tmp_path / "frontier.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert from_data(Frontier, json.loads((tmp_path / "frontier.json").read_text())) == swept()
    none = frontier("n", ["seed"], [point("seed=0", None, None, seed=0)])
    assert draw(none, tmp_path / "none.png") and "<svg viewBox" not in page(none)
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    assert not draw(swept(), tmp_path / "without.png") and not (tmp_path / "without.png").exists()


def test_scores_are_those_of_the_report():
    report = {
        "l0": 3.0,
        "nmse": None,
        "dead_fraction": 0.5,
        "model": {"ce_recovered": 0.9, "cross_entropy": {"model": 2.0, "transcoder": 2.5, "zero": 7.0}},
    }
    assert scores_of(report) == {"l0": 3.0, "dead_fraction": 0.5, "ce": 2.5, "ce_model": 2.0, "ce_recovered": 0.9}
    assert scores_of({"l0": 3.0, "model": None}) == {"l0": 3.0}
