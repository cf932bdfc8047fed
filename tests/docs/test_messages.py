"""Messages that the guide to troubles quotes are in the code, word for word."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
VARIES = r"\.\.\.|\b0x\w+|\b\d+\b|\b[NM]\b|'\w+'|\[\w+\]"
"""What differs from case to case in a quoted message."""


def quoted() -> Iterator[str]:
    """The messages of the first column: in double quotes, or as code with a space in it."""
    text = (ROOT / "examples/guides/troubleshooting.md").read_text(encoding="utf-8")
    for line in text.split("## What you see")[1].splitlines():
        if line.startswith("|"):
            seen = line.split("|")[1]
            yield from re.findall(r'"(.+?)"', seen)
            yield from (code for code in re.findall(r"`(.+?)`", seen) if " " in code)


def texts() -> str:
    """All texts of the code, a line each; what is filled in is a null character."""
    found = []
    for folder in ("clt_plugins", "plugins"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                parts = node.values if isinstance(node, ast.JoinedStr) else [node]
                pieces = [
                    part.value if isinstance(part, ast.Constant) and isinstance(part.value, str) else "\0"
                    for part in parts
                ]
                found.append("".join(pieces).replace("\n", " "))
    return "\n".join(found)


@pytest.fixture(scope="module")
def code() -> str:
    return texts()


@pytest.mark.parametrize("message", list(quoted()))
def test_a_quoted_message_is_in_the_code(code: str, message: str) -> None:
    pieces = [piece.strip(" :,?") for piece in re.split(VARIES, message)]
    assert any(pieces)
    assert [piece for piece in pieces if piece not in code] == []
