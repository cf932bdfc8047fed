"""The author's guide is held to the code: every hook and field described, every example and command executed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import attrs
import pytest

from clt_plugins import Context
from clt_plugins.cli.listing import undocumented
from clt_plugins.cli.new import KINDS
from clt_plugins.contract import hooks as hookspecs
from clt_plugins.contract.interfaces import Forward
from clt_plugins.registry.build import PROTOCOLS
from clt_plugins.registry.plugins import load_plugins
from clt_plugins.testing import CHECKS
from tests.support.guide import GUIDE, commands, files, written

TEXT = GUIDE.read_text()


def test_examples_and_names_are_those_of_the_code() -> None:
    assert written(TEXT) == TEXT, "write the guide anew: python -m tests.support.guide"


def section(title: str) -> str:
    found = re.search(rf"^### `{title}`\n(.*?)(?=^### |^## )", TEXT, re.S | re.M)
    assert found, f"the guide has no section on {title}"
    return found[1]


@pytest.mark.parametrize("hook", [name for name in vars(hookspecs.Hooks) if name.startswith("clt_")])
def test_every_hook_has_a_section_with_a_whole_example(hook: str) -> None:
    examples = files(section(hook))
    assert any(f"@hookimpl\ndef {hook}(" in text for text in examples.values())


@pytest.mark.parametrize("slot", PROTOCOLS)
def test_every_method_of_a_protocol_is_in_its_section(slot: str) -> None:
    hook = next(f"clt_{name}" for name, table in hookspecs.SLOTS.items() if table == slot)
    protocol = PROTOCOLS[slot]
    members = [*protocol.__annotations__, *(name for name in vars(protocol) if name[0] != "_")]
    missing = [name for name in members if not re.search(rf"\b{name}\b", section(hook))]
    assert not missing


@pytest.mark.parametrize("cls", [Context, Forward])
def test_every_field_of_what_plugins_are_given_is_described(cls: type) -> None:
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
    assert {name.split("/")[0] for name in shown if "/" in name} == {f"clt_example_{kind}" for kind in KINDS}
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
    assert '"loss/square"' in (tmp_path / "runs" / "try" / "metrics.jsonl").read_text()
    assert (tmp_path / "clt-mine" / "clt_mine" / "__init__.py").is_file()
    modules = [f"-pclt_example_{kind}" for kind in KINDS]
    listed = run("-m", "clt_plugins", "plugins", "--strict", *modules).stdout
    assert listed.count("  example - ") == len(KINDS)
    assert run("-m", "clt_plugins", "validate", "try.toml", "-psquare", "-peven").stdout.startswith('name = "try"')
    odd = [sys.executable, "-m", "clt_plugins", "validate", "try.toml", "-psquare", "-peven", "--set"]
    done = subprocess.run(
        [*odd, "transcoder.features=63"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert "transcoder.features=63: must be even, not 63" in done.stderr
    check = "import click.testing, clt_plugins.registry.plugins as l;"
    check += "c = l.load(extra=['count', 'square']).commands()['count'];"
    check += "print(click.testing.CliRunner().invoke(c, ['try.toml', '-psquare']).output)"
    assert run("-c", check).stdout.strip() == "64"
    run("-m", "pytest", "-q", "-p", "no:cacheprovider", "--import-mode=importlib", "test_square.py")
