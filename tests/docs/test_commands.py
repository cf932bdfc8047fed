"""Every command, option and setting that a document shows exists."""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import get_args

import attrs
import click
import pytest

from clt_plugins.cli.main import main_group
from clt_plugins.contract.recipe import Recipe
from clt_plugins.contract.slots import BY_TABLE
from clt_plugins.contract.types import recipe_key
from tests.support.helpers import plugins
from tests.support.tables import ROOT, documents

SHOWN = [*documents(), *sorted((ROOT / "examples").glob("*.toml")), ROOT / "examples" / "slurm.sh"]
"""Documents, recipes with commands in their comments, and the job script."""

START = re.compile(r"(?:python -m|torchrun\b.*?-m|-m) (?=(?:clt_plugins|tests\.\w)[\w.]*(?:\s|$))")
OTHERS = {
    "--nproc-per-node",
    "--nnodes",
    "--node-rank",
    "--master-addr",
    "--port",
    "--against",
    "--against-python",
    "--peer-python",
}
"""Options of torchrun and of the benchmarks that the text names by themselves."""


def commands(file: Path) -> Iterator[list[str]]:
    """The words after `python -m`, of each command in blocks and in running text."""
    text = file.read_text(encoding="utf-8").replace("\\\n", " ")
    if file.suffix == ".md":
        blocks = re.findall(r"^```bash\n(.*?)^```", text, re.S | re.M)
        lines = [line for block in blocks for line in block.splitlines()]
        lines += re.findall(
            r"`([^`\n]*python -m [^`\n]*|torchrun [^`\n]*)`", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
        )
    else:
        lines = text.splitlines()
    for line in lines:
        for found in START.finditer(line):
            words = re.split(r"\s(?:&&|&|#|\|)(?:\s|$)", line[found.end() :])[0].strip()
            yield shlex.split(words.replace("...", "").replace("[", "").replace("]", ""), comments=True)


@cache
def subcommands() -> dict[str, click.Command]:
    return {**main_group.commands, **plugins().commands()}


def options(command: click.Command) -> set[str]:
    return {word for parameter in command.params for word in parameter.opts} | {"--help", "-h"}


def fault(words: list[str]) -> str:
    """What is unknown in `clt_plugins run RECIPE --out DIR`; empty if nothing."""
    module, *rest = words
    if module != "clt_plugins":
        return "" if importlib.util.find_spec(module) else f"no module {module}"
    if not rest or rest[0].startswith("-"):
        return ""
    command = subcommands().get(rest[0])
    if command is None:
        return f"no command {rest[0]}"
    unknown = [word for word in rest if re.match(r"--?[a-z]", word) and word.split("=")[0] not in options(command)]
    # A value may follow the letter of an option: -pclt_gated.
    return ", ".join(word for word in unknown if word[:2] not in options(command) or word[:2] == "--")


@pytest.mark.parametrize("file", SHOWN, ids=lambda path: path.name)
def test_every_command_and_its_options_exist(file: Path) -> None:
    assert not [f"{' '.join(words)}: {text}" for words in commands(file) if (text := fault(words))]


def test_commands_are_found_at_all() -> None:
    assert len([words for file in SHOWN for words in commands(file)]) > 40


def test_faults_would_be_noticed() -> None:
    assert fault(["clt_plugins", "run", "recipe.toml", "--ouT", "x"]) == "--ouT"
    assert fault(["clt_plugins", "trian", "recipe.toml"]) == "no command trian"
    assert not fault(["clt_plugins", "run", "recipe.toml", "-pclt_gated", "--resume"])


@pytest.mark.parametrize("file", documents(), ids=lambda path: path.name)
def test_every_option_in_running_text_exists(file: Path) -> None:
    known = set().union(*(options(command) for command in subcommands().values()), OTHERS)
    shown = re.findall(r"`(--[a-z][\w-]*)", file.read_text(encoding="utf-8"))
    assert set(shown) <= known | kit_options()


def kit_options() -> set[str]:
    from clt_plugins.testing.__main__ import main

    return options(main) | {"--kind"}


@cache
def keys() -> dict[str, set[str]]:
    """Table -> the keys that it can have, of whatever choice."""
    known: dict[str, set[str]] = {}
    for a in attrs.fields(attrs.resolve_types(Recipe)):
        if a.name in BY_TABLE:
            configs = [choice.spec.config for choice in plugins().choices(a.name).values()]
            known[a.name] = {"name", *(recipe_key(each) for config in configs for each in attrs.fields(config))}
        else:
            configs = [tp for tp in (a.type, *get_args(a.type)) if attrs.has(tp)]
            known[a.name] = {recipe_key(each) for config in configs for each in attrs.fields(config)}
    return known


def settings(text: str) -> Iterator[tuple[str, str]]:
    """`table.key`, in code and after `--set`; files such as `transcoder.json` are none."""
    tables = "|".join(keys())
    yield from re.findall(rf"(?:`|--set )({tables})\.(?!json|toml|safetensors|pt)([a-z_]\w*)(?=[`= ])", text)


@pytest.mark.parametrize("file", [file for file in SHOWN if file.parent.name != "plugins"], ids=lambda path: path.name)
def test_every_setting_exists(file: Path) -> None:
    shown = set(settings(file.read_text(encoding="utf-8")))
    assert not [f"{table}.{key}" for table, key in shown if key not in keys()[table]]
