"""The author's guide is held to the code: every hook and field described, every example and command executed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import attrs
import pytest

import clt_plugins
from clt_plugins import Context, Forward
from clt_plugins.cli.listing import undocumented
from clt_plugins.contract import abilities
from clt_plugins.contract.hooks import Hooks
from clt_plugins.contract.slots import SLOTS
from clt_plugins.registry.plugins import load_plugins
from clt_plugins.testing import CHECKS
from tests.support.guide import GUIDE, commands, files, written

TEXT = GUIDE.read_text()
OPTIONAL = [name for name in vars(abilities) if name in clt_plugins.__all__]


def test_the_example_and_the_names_are_those_of_the_code() -> None:
    assert written(TEXT) == TEXT, "write the guide anew: python -m tests.support.guide"


def section(title: str) -> str:
    found = re.search(rf"^### `{title}`\n(.*?)(?=^### |^## )", TEXT, re.S | re.M)
    assert found, f"the guide has no section on {title}"
    return found[1]


def methods(protocol: type) -> list[str]:
    return [*protocol.__annotations__, *(name for name in vars(protocol) if name[0] != "_")]


@pytest.mark.parametrize("hook", [name for name in vars(Hooks) if name.startswith("clt_")])
def test_every_hook_has_a_section(hook: str) -> None:
    assert section(hook)


@pytest.mark.parametrize("slot", SLOTS, ids=lambda slot: slot.table)
def test_every_member_of_a_protocol_is_in_its_section_with_a_link_to_the_template(slot: Any) -> None:
    text = section(f"clt_{slot.hook}")
    assert not [name for name in methods(slot.protocol) if not re.search(rf"\b{name}\b", text)]
    assert re.search(rf"\.\./clt_plugins/templates/{slot.kind}/\w+\.py", text)


@pytest.mark.parametrize("name", OPTIONAL)
def test_every_member_of_an_optional_protocol_is_explained(name: str) -> None:
    rows = [line for line in TEXT.splitlines() if line.startswith(f"| `{name}`")]
    assert len(rows) == 1
    protocol = getattr(clt_plugins, name)
    assert not [member for member in methods(protocol) if not re.search(rf"\b{member}\b", rows[0])]


def test_every_public_name_is_explained() -> None:
    """Somewhere besides the list of them."""
    explained = re.sub(r"<!-- public -->\n.*\n", "", TEXT)
    assert not [
        name
        for name in clt_plugins.__all__
        if name != "__version__" and not re.search(rf"`[^`\n]*\b{name}\b", explained)
    ]


@pytest.mark.parametrize("cls", [Context, Forward])
def test_every_field_of_what_plugins_get_is_described(cls: type) -> None:
    rows = "\n".join(line for line in TEXT.splitlines() if line.startswith("| `"))
    assert not [a.name for a in attrs.fields(cls) if f"`{a.name}`" not in rows]


def test_every_check_is_listed() -> None:
    kit = TEXT[TEXT.index("## The conformance kit") :]
    rows = {line.split("|")[1].strip(): line for line in kit.splitlines() if line.startswith("| ")}
    for slot, checks in CHECKS.items():
        assert re.findall(r"`(\w+)`", rows[slot]) == list(checks)


def test_every_field_of_every_config_is_described() -> None:
    assert undocumented(load_plugins(strict=True)) == []


def test_every_example_and_command_runs(tmp_path: Path) -> None:
    """As a reader would, in an empty folder: the files first, then each command; then the guide's own test."""
    shown = files(TEXT)
    for name, text in shown.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.environ["PYTHONPATH"], str(tmp_path)])}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, f"{arguments}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
        return done

    assert len(commands(TEXT)) == 4
    for line in commands(TEXT):
        run(*line.split()[1:])
    assert '"loss/example"' in (tmp_path / "runs" / "try" / "metrics.jsonl").read_text()
    assert (tmp_path / "clt-mine" / "clt_mine" / "__init__.py").is_file()
    assert run("-m", "clt_plugins", "validate", "try.toml", "-pclt_example_loss", "-peven").stdout.startswith(
        'name = "try"'
    )
    odd = [sys.executable, "-m", "clt_plugins", "validate", "try.toml", "-pclt_example_loss", "-peven", "--set"]
    done = subprocess.run(
        [*odd, "transcoder.features=63"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert "transcoder.features=63: must be even, not 63" in done.stderr
    check = "import click.testing, clt_plugins.registry.plugins as l;"
    check += "c = l.load_plugins(extra=['count', 'clt_example_loss']).commands()['count'];"
    check += "print(click.testing.CliRunner().invoke(c, ['try.toml', '-pclt_example_loss']).output)"
    assert run("-c", check).stdout.strip() == "64"
    run("-m", "pytest", "-q", "-p", "no:cacheprovider", "--import-mode=importlib", "test_example.py")
