"""The author's guide and its code: `python -m tests.support.guide` writes what comes from the code into its pages.

What is between these markers comes from the code; any text may stand around them.

- `<!-- example: KIND -->`: the template of a kind, a block for each of its files, each below `<!-- file: NAME -->`.
- `<!-- public -->`: a line with the public names.
- `<!-- checks -->` ... `<!-- end of checks -->`: the kit's checks by table, and what each asks: the first paragraph of
  its docstring.

Other files that the guide shows stand below `<!-- file: NAME -->`, and commands to run below `<!-- run -->`.
"""

from __future__ import annotations

import re
from pathlib import Path

import clt_plugins
from clt_plugins.cli.new import TEMPLATES, renamed
from clt_plugins.contract.slots import BY_TABLE
from clt_plugins.testing import CHECKS
from clt_plugins.testing.registry import Check, checks_of

PLUGINS = Path(__file__).resolve().parents[2] / "plugins"
PAGES = [PLUGINS / "README.md", *sorted((PLUGINS / "guide").glob("*.md"))]
"""The guide, in the order in which it is read."""


def guide() -> str:
    """All of the guide."""
    return "\n".join(page.read_text(encoding="utf-8") for page in PAGES)


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


def checks() -> str:
    """Two tables: which checks a recipe's table has, and what each check asks."""
    by_table = {table: checks_of(table) for table in CHECKS}
    every = [check for check in by_table["activation"].values() if check.tables == tuple(BY_TABLE)]
    listed = {"every choice": [check.name for check in every], **CHECKS}
    lines = ["| table | checks |", "| --- | --- |"]
    lines += [f"| {table} | {', '.join(f'`{name}`' for name in names)} |" for table, names in listed.items()]
    lines += ["", "| check | of | |", "| --- | --- | --- |"]
    told: list[Check] = []
    for check in (check for table in by_table.values() for check in table.values()):
        if check in told:
            continue
        told.append(check)
        of = "every choice" if check in every else ", ".join(check.tables)
        text = " ".join((check.run.__doc__ or "").split("\n\n")[0].split()).replace("|", "\\|")
        lines.append(f"| `{check.name}` | {of} | {text} |")
    return "\n".join(lines)


def examples(text: str) -> list[str]:
    """The kinds whose template the guide shows."""
    return re.findall(r"<!-- example: (\w+) -->", text)


def written(text: str) -> str:
    """The guide, with what comes from the code written anew."""
    for kind in examples(text):
        block = rf"\s*<!-- file: clt_example_{kind}/\S+ -->\n```python\n.*?^```\n"
        shown = re.compile(rf"<!-- example: {kind} -->\n(?:{block})*", re.S | re.M)
        text = shown.sub(lambda _, kind=kind: f"<!-- example: {kind} -->\n\n{example(kind)}", text)
    shown = re.compile(r"<!-- checks -->\n.*?<!-- end of checks -->\n", re.S)
    text = shown.sub(lambda _: f"<!-- checks -->\n\n{checks()}\n\n<!-- end of checks -->\n", text)
    return re.sub(r"<!-- public -->\n.*\n", lambda _: f"<!-- public -->\n{public()}\n", text)


def files(text: str) -> dict[str, str]:
    """Name -> content of every file that the guide shows."""
    return dict(re.findall(r"<!-- file: (\S+) -->\n```\w+\n(.*?)^```", text, re.S | re.M))


def package(name: str) -> dict[str, str]:
    """The files of a package that the guide shows, by `PACKAGE/FILE`."""
    return {file: text for file, text in files(guide()).items() if file.startswith(f"{name}/")}


def commands(text: str) -> list[str]:
    """Every command line that the guide says to run."""
    return [line for block in re.findall(r"<!-- run -->\n```bash\n(.*?)```", text, re.S) for line in block.splitlines()]


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(written(page.read_text(encoding="utf-8")), encoding="utf-8")
