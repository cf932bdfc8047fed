"""Tables of figures in the documents: `python -m tests.support.tables` writes them anew.

A document has `<!-- table: NAME -->`, then the table, then `<!-- end -->`. NAME is a file
`examples/measurements/NAME.json`, or one of `COMPUTED`, which no machine has to measure.

A file of measurements holds `what` (a sentence or two), `date`, `machine`, `command`, and either `columns` and `rows`,
or `text`: the lines that the command printed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MEASUREMENTS = ROOT / "examples" / "measurements"

BLOCK = re.compile(r"(<!-- table: ([\w-]+) -->\n)(.*?)(<!-- end -->\n)", re.S)


def documents() -> list[Path]:
    """All Markdown files of the project."""
    folders = (ROOT, ROOT / "plugins", ROOT / "examples", ROOT / "examples" / "guides")
    return sorted(file for folder in folders for file in folder.glob("*.md"))


def written(text: str) -> str:
    """A document with all its tables put in anew."""
    return BLOCK.sub(lambda found: f"{found[1]}{block(found[2])}{found[4]}", text)


def block(name: str) -> str:
    """What stands between a table's markers."""
    if name in COMPUTED:
        return table(*COMPUTED[name]())
    measured = json.loads((MEASUREMENTS / f"{name}.json").read_text(encoding="utf-8"))
    if "text" in measured:
        body = "```text\n" + "".join(f"{line}\n" for line in measured["text"]) + "```\n"
    else:
        body = table(measured["columns"], measured["rows"])
    source = f"Measured {measured['date']} on {measured['machine']}: `{measured['command']}`"
    return f"{measured['what']}\n\n{body}\n{source}\n"


def table(columns: list[str], rows: list[list[Any]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


# -- tables that are arithmetic -------------------------------------------------------------------------------------

SHAPES = {
    "stdlib-gpt2 (shipped)": (6, 128),
    "GPT-2 small": (12, 768),
    "Llama-3.2-1B": (16, 2048),
    "Gemma-2-2B": (26, 2304),
}
"""Model -> (layers, d_model)."""

ROW_BYTES = 20
"""Of a token besides its activations: its id (4) and its position (2 x 8)."""


def bytes_per_token() -> tuple[list[str], list[list[str]]]:
    """What a stored token takes on disk."""
    columns = ["model", "layers × d_model", "float32", "bfloat16, float16", "int8", "100 million tokens in bfloat16"]
    rows = []
    for model, (layers, d_model) in SHAPES.items():
        size = {width: 2 * layers * d_model * width + ROW_BYTES for width in (4, 2, 1)}
        sizes = [f"{size[width]:,} B" for width in (4, 2, 1)]
        rows.append([model, f"{layers} × {d_model}", *sizes, f"{size[2] / 1e4:.2g} TB"])
    return columns, rows


def bytes_per_step() -> tuple[list[str], list[list[str]]]:
    """What a rank of two sends in a step, for GPT-2 small."""
    layers, d_model, features, batch, ranks = 12, 768, 6144, 512, 2
    share = (ranks - 1) / ranks
    columns = ["what", "bytes per rank, W ranks", "L=12, D=768, F=6144, B=512, W=2"]
    rows = [
        ["the reconstruction, summed once per step", "2 (W−1)/W · 4 B L D", 2 * share * 4 * batch * layers * d_model],
        ["batchtopk's selection, 6 counts of 2048", "2 (W−1)/W · 6 · 8 KiB", 2 * share * 6 * 8192],
        ["for comparison: gathering dense features", "(W−1)/W · 4 B L F", share * 4 * batch * layers * features],
    ]
    return columns, [[what, formula, f"{size / 1e6:.3g} MB"] for what, formula, size in rows]


def formats() -> tuple[list[str], list[list[str]]]:
    """The formats that are read and written, as the built-in plugins offer them."""
    from clt_plugins import load_plugins
    from clt_plugins.contract.types import summary

    plugins = load_plugins(strict=True)
    written, read = plugins.choices("exports"), plugins.readers()
    docs = {name: summary(choice.spec.config) for name, choice in written.items()}
    docs = {one.name: one.doc for one in plugins.formats()} | docs
    rows = [
        [f"`{name}`", *("yes" if name in offered else "" for offered in (read, written)), _first_clause(docs[name])]
        for name in sorted(docs)
    ]
    return ["format", "read", "written", ""], rows


def _first_clause(text: str) -> str:
    return re.split(r"[.;:](?: |$)", text)[0]


COMPUTED = {"bytes-per-token": bytes_per_token, "bytes-per-step": bytes_per_step, "formats": formats}


def names() -> Iterator[str]:
    """The tables that documents show."""
    for document in documents():
        yield from (found[2] for found in BLOCK.finditer(document.read_text(encoding="utf-8")))


if __name__ == "__main__":
    for document in documents():
        document.write_text(written(document.read_text(encoding="utf-8")), encoding="utf-8")
