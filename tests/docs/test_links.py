"""Links between the project's own files lead somewhere, headings included."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.tables import ROOT, documents

LINK = re.compile(r"(?<!`)\[[^\]]*\]\(([^)\s]+)\)")


def anchors(file: Path) -> set[str]:
    """The headings of a document, as links name them."""
    text = re.sub(r"^```.*?^```", "", file.read_text(encoding="utf-8"), flags=re.S | re.M)
    titles = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def markdown() -> list[Path]:
    more = [*(ROOT / "examples").rglob("README.md"), *(ROOT / "plugins").rglob("*.md")]
    return sorted({*documents(), *more})


@pytest.mark.parametrize("document", markdown(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_to_a_file_and_a_heading(document: Path) -> None:
    wrong = []
    for target in LINK.findall(document.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (document.parent / path).resolve() if path else document
        if not file.exists() or not file.is_relative_to(ROOT):
            wrong.append(f"{target}: no such file")
        elif anchor and anchor not in anchors(file):
            wrong.append(f"{target}: no such heading")
    assert not wrong


def test_every_guide_is_named_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert not [file.name for file in (ROOT / "examples" / "guides").glob("*.md") if f"guides/{file.name})" not in text]
