"""The author's guide and its code: `python -m tests.support.guide` writes templates and public names into the guide."""

from __future__ import annotations

import re
from pathlib import Path

import clt_plugins
from clt_plugins.cli.new import TEMPLATES, renamed

GUIDE = Path(__file__).resolve().parents[2] / "plugins" / "README.md"


def example(kind: str) -> str:
    """A template as the guide shows it: its files, each in a block under its name."""
    blocks = []
    for file in sorted((TEMPLATES / kind).glob("*.py")):
        text = renamed(file.read_text(), kind, f"clt_example_{kind}", "example")
        blocks.append(f"<!-- file: clt_example_{kind}/{file.name} -->\n```python\n{text}```\n")
    return "\n".join(blocks)


def public() -> str:
    names = [name for name in clt_plugins.__all__ if name != "__version__"]
    return ", ".join(f"`{name}`" for name in names) + "."


def written(text: str) -> str:
    """The guide with the one full example and the public names put in anew."""
    start = "<!-- example: loss -->\n"
    before, after = text.split(start)
    rest = after[re.search(r"^### |^## ", after, re.M).start() :]  # type: ignore[union-attr]
    text = f"{before}{start}\n{example('loss')}\n{rest}"
    return re.sub(r"<!-- public -->\n.*\n", lambda _: f"<!-- public -->\n{public()}\n", text)


def files(text: str) -> dict[str, str]:
    """Name -> content of every file that the guide shows."""
    return dict(re.findall(r"<!-- file: (\S+) -->\n```\w+\n(.*?)```", text, re.S))


def commands(text: str) -> list[str]:
    """Every command line that the guide says to run."""
    return [line for block in re.findall(r"<!-- run -->\n```bash\n(.*?)```", text, re.S) for line in block.splitlines()]


if __name__ == "__main__":
    GUIDE.write_text(written(GUIDE.read_text()))
