"""Text from anywhere shows as text; what is damaged or missing is said on the page."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clt_plugins.testing.stores import HOSTILE
from tests.support.sites import Made

pytestmark = pytest.mark.browser

MARKUP = ", ".join(f"main {name}" for name in ("img", "script", "b", "em", "i", "u", "a[href^=javascript]"))
ELEMENTS = f"document.querySelectorAll('{MARKUP}').length"
"""Elements that the texts of the site would be, if they were read as HTML."""


def test_hostile_tokens_show_as_text(made: Made, opened: Any) -> None:
    """Each of them, in some context of some feature: what is seen is what was written."""
    seen: dict[int, str] = {}
    page = opened(made.folder, "#/feature/0/0")
    page.wait_for_selector(".main .context, .main .empty")
    for layer in range(3):
        arrays = made.collected.layer(layer)
        for feature in range(300):
            rows = arrays["top_row"][feature]
            ids = {int(made.collected.ids[row]) for row in rows if row >= 0} - seen.keys()
            if not any(one < len(HOSTILE) for one in ids):
                continue
            page.evaluate(f"location.hash = '#/feature/{layer}/{feature}'")
            page.wait_for_selector(f"h1:has-text('{layer}/{feature}')")
            page.wait_for_selector(".main .context")
            peaks = page.locator(".main .contexts").first.locator(".peak").all_inner_texts()
            for text, row in zip(peaks, rows[rows >= 0], strict=True):
                seen.setdefault(int(made.collected.ids[row]), text)
            assert page.evaluate(ELEMENTS) == 0
    visible = {
        b"</script>": "</script>",
        b"<script>alert(1)</script>": "<script>alert(1)</script>",
        b"<img src=x onerror=alert(1)>": "<img src=x onerror=alert(1)>",
        b"&lt;": "&lt;",
        "\u202eabc".encode(): "U+202Eabc",
        "\u200f".encode(): "U+200F",
        "\u2028".encode(): "U+2028",
        b"\x00": "␀",
        b"a\x00b": "a␀b",
        b"\n": "⏎",
        b"\r\n": "␍⏎",
        b"\t": "⇥",
        b"\xff\xfe": "\\xFF\\xFE",
        b"x" * 100_000: "x" * 960 + "… 100,000 bytes",
        b"": "∅",
    }
    missing = [text for text in visible if HOSTILE.index(text) not in seen]
    assert not missing, "the store is large enough for each to be somewhere"
    wrong = {
        text[:20]: seen[HOSTILE.index(text)][:60] for text in visible if seen[HOSTILE.index(text)] != visible[text]
    }
    assert not wrong


def test_titles_recipes_notes_labels_and_graphs_show_as_text(made: Made, opened: Any) -> None:
    page = opened(made.folder)
    assert page.locator("h1").inner_text() == "A <em>run</em>"
    assert "<u>none</u>" in page.locator(".notes").inner_text()
    page.get_by_text("The recipe with all its settings").click()
    assert page.locator("pre").inner_text() == 'name = "</script>"\n'
    assert page.evaluate(ELEMENTS) == 0
    page.evaluate("location.hash = '#/graph/main'")
    page.wait_for_selector("[data-node]")
    page.locator("[data-node][aria-label*='onerror']").first.click()
    assert "<img src=x onerror=alert(1)>" in page.locator(".detail h2").inner_text()
    assert page.evaluate(ELEMENTS) == 0
    page.evaluate("location.hash = '#/feature/' + encodeURIComponent('<img src=x onerror=alert(1)>')")
    page.wait_for_selector("text=No such feature")
    page.evaluate("location.hash = '#/' + '%E0%A4%A'")
    page.wait_for_selector("text=No such page")


def test_bytes_become_the_text_that_a_utf_8_decoder_gives(made: Made, opened: Any) -> None:
    """Random bytes, also of characters split over tokens; what is no UTF-8 is written as \\xNN."""
    draw = random.Random(0)
    alphabet = ["a", "é", "中", "😀", "क्ष", "\ufffd"]
    page = opened(made.folder)
    for _ in range(200):
        whole = b"".join(
            draw.choice(alphabet).encode() if draw.random() < 0.7 else bytes(draw.randrange(128, 256) for _ in range(2))
            for _ in range(draw.randrange(1, 12))
        )
        cuts = sorted({0, len(whole), *(draw.randrange(len(whole) + 1) for _ in range(draw.randrange(8)))})
        text = page.evaluate(
            """([bytes, start]) => {
                const vocabulary = { bytes: Uint8Array.from(bytes), start };
                const words = start.slice(1).map((_, word) => word);
                const pieces = CLT.pieces(vocabulary, words);
                if (pieces.some((piece, i) => piece.from !== (i ? pieces[i - 1].to : 0))) throw new Error("a gap");
                const segments = pieces.flatMap((piece) => CLT.segments(piece.bytes));
                return segments.map((part) => part.glyph || part).join("");
            }""",
            [list(whole), cuts],
        )
        expected = "".join(
            f"U+{ord(one):04X}" if unicodedata.category(one) in ("Cc", "Cf", "Zl", "Zp", "Co", "Cn") else one
            for one in whole.decode("utf-8", "backslashreplace")
        )
        assert text.replace("◌", "").lower() == expected.lower()


@pytest.mark.parametrize(
    "file, route, message",
    [
        ("features/01/0000", "#/feature/1/7", "data/features/01/0000.js"),
        ("text/0000", "#/feature/1/7", "data/text/0000.js"),
        ("vocabulary", "#/feature/1/7", "data/vocabulary.js"),
        ("list/01", "#/features", "data/list/01.js"),
        ("graphs/main", "#/graph/main", "data/graphs/main.js"),
        ("site", "#/", "data/site.js"),
    ],
)
@pytest.mark.parametrize("how", ["missing", "other", "damaged"])
def test_a_file_that_cannot_be_loaded_is_named_on_the_page(
    copied: Callable[[], Path], opened: Any, file: str, route: str, message: str, how: str
) -> None:
    folder = copied()
    path = folder / "data" / f"{file}.js"
    whole = path.read_text()
    if how == "missing":
        path.unlink()
        opened.expected = ("ERR_FILE_NOT_FOUND",)
    elif how == "other":
        path.write_text('CLT.put("something", {});\n')
    elif file == "site":
        path.write_text(whole.replace('"format": 1', '"format": 99').replace('"format":1', '"format":99'))
        message = "another format"
    else:
        # Letters of base64 in the middle of the packed data: gzip's checksum fails.
        middle = whole.index('"data"') + (len(whole) - whole.index('"data"')) // 2
        path.write_text(whole[:middle] + ("A" if whole[middle] != "A" else "B") + whole[middle + 1 :])
        message = ""
    page = opened(folder, route)
    failure = page.locator(".failure").first
    failure.wait_for()
    assert message in failure.inner_text()
    assert "cannot be shown" in failure.inner_text()
    if how == "missing" and file not in ("site", "list/01"):
        path.write_text(whole)
        failure.get_by_role("button", name="Try again").click()
        page.wait_for_selector(".context, [data-node]")


def test_the_search_tells_of_a_missing_file_and_recovers(copied: Callable[[], Path], opened: Any) -> None:
    folder = copied()
    for path in (folder / "data" / "search").iterdir():
        path.unlink()
    opened.expected = ("ERR_FILE_NOT_FOUND",)
    page = opened(folder, "#/features?token=word")
    page.wait_for_selector(".failure:has-text('data/search/0000.js')")
    page.get_by_label("Token").fill("")
    page.wait_for_selector(".count:has-text('900 features')")


def test_a_feature_that_was_never_active_says_so(made: Made, opened: Any) -> None:
    dead = int(np.flatnonzero(made.collected.layer(0)["active"] == 0)[0])
    page = opened(made.folder, f"#/feature/0/{dead}")
    page.wait_for_selector("text=It was active at no token")
    assert page.locator(".flag").inner_text() == "dead"
