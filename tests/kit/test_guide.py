"""The author's guide is held to the code: every hook and field described, every example and command executed."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import attrs
import pytest

import clt_plugins
from clt_plugins import Context, Forward, Step, load_plugins
from clt_plugins.cli.listing import undocumented
from clt_plugins.contract.hooks import Hooks
from clt_plugins.contract.slots import SLOTS, Slot
from clt_plugins.testing import CHECKS
from tests.support.commands import python
from tests.support.guide import PAGES, commands, example, examples, files, guide, written

TEXT = guide()
KINDS = [slot.kind for slot in SLOTS]
PUBLIC = [getattr(clt_plugins, name) for name in clt_plugins.__all__]
ABILITIES = [cls for cls in PUBLIC if getattr(cls, "_is_runtime_protocol", False)]
assert len(ABILITIES) >= 26


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples_and_names_are_those_of_the_code(page: Path) -> None:
    text = page.read_text()
    assert written(text) == text, "write the guide anew: python -m tests.support.guide"


@pytest.mark.parametrize("kind", KINDS)
def test_a_template_is_written_below_its_marker_whatever_stands_around(kind: str) -> None:
    text = f"before\n<!-- example: {kind} -->\nafter\n<!-- public -->\nnames\nthe end\n"
    new = written(text)
    assert example(kind) in new
    assert new.startswith("before\n")
    assert "\nafter\n<!-- public -->\n`API_VERSION`, " in new
    assert new.endswith("\nthe end\n")
    assert written(new) == new
    assert written(new.replace("from attrs import", "from elsewhere import")) == new


def section(title: str) -> tuple[str, Path]:
    """A section, and the folder of its page."""
    for page in PAGES:
        if found := re.search(rf"^## `{title}`\n(.*?)(?=^## |\Z)", page.read_text(), re.S | re.M):
            return found[1], page.parent
    raise AssertionError(f"the guide has no section on {title}")


@pytest.mark.parametrize("slot", SLOTS, ids=lambda slot: slot.kind)
def test_every_slot_has_a_section_that_links_its_template_and_explains_its_protocol(slot: Slot) -> None:
    text, folder = section(f"clt_{slot.hook}")
    (link,) = set(re.findall(rf"\]\((\S+/templates/{slot.kind}/\w+\.py)\)", text))
    assert (folder / link).is_file()
    members = [*slot.protocol.__annotations__, *(name for name in vars(slot.protocol) if name[0] != "_")]
    missing = [name for name in members if not re.search(rf"\b{name}\b", text)]
    assert not missing


@pytest.mark.parametrize("hook", ["clt_commands", "clt_check"])
def test_every_other_hook_has_a_section_with_a_complete_example(hook: str) -> None:
    assert hook in vars(Hooks)
    assert any(f"@hookimpl\ndef {hook}(" in text for text in files(section(hook)[0]).values())


@pytest.mark.parametrize("ability", ABILITIES, ids=lambda cls: cls.__name__)
def test_every_ability_and_its_methods_are_explained(ability: type) -> None:
    methods = [name for name in {**vars(ability), **vars(ability).get("__annotations__", {})} if name[0] != "_"]
    assert methods
    assert all(re.search(rf"`{name}[`(]", TEXT) for name in (ability.__name__, *methods))


@pytest.mark.parametrize("cls", [Context, Step, Forward])
def test_every_field_of_what_plugins_are_given_is_described(cls: type) -> None:
    rows = "\n".join(line for line in TEXT.splitlines() if line.startswith("| `"))
    named = {a.name.lstrip("_") for a in attrs.fields(cls)}  # `_active` is what `active` returns
    assert not [name for name in named if f"`{name}`" not in rows]


def test_every_check_is_listed_and_says_what_it_asks() -> None:
    kit = next(page for page in PAGES if page.name == "kit.md").read_text()
    rows = {line.split("|")[1].strip(): line for line in kit.splitlines() if line.startswith("| ")}
    for table, checks in CHECKS.items():
        assert sorted(re.findall(r"`(\w+)`", rows[table])) == sorted(checks)
        assert all(len(rows[f"`{name}`"].split("|")[3].split()) >= 3 for name in checks)


def test_every_field_of_every_config_is_described() -> None:
    assert undocumented(load_plugins(strict=True)) == []


def test_every_example_and_command_runs(tmp_path: Path) -> None:
    """As a reader would, in an empty folder: the files first, then each command; then the guide's own tests."""
    shown = files(TEXT)
    for name, text in shown.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.environ["PYTHONPATH"], str(tmp_path)])}

    def run(*arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        done = python(*arguments, cwd=tmp_path, env=environment)
        assert done.returncode == code, f"{arguments}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
        return done

    (kind,) = examples(TEXT)
    module = f"clt_example_{kind}"
    assert f"{module}/__init__.py" in shown
    assert len(commands(TEXT)) == 4
    for line in commands(TEXT):
        run(*line.split()[1:])
    assert f'"{kind}/example"' in (tmp_path / "runs" / "try" / "metrics.jsonl").read_text()
    assert (tmp_path / "clt-mine" / "clt_mine" / "__init__.py").is_file()
    assert len(shown["reverse_kl.py"].splitlines()) < 60
    run("-m", "clt_plugins", "plugins", "reverse_kl", "-preverse_kl", "--check")
    recipe = ("try.toml", f"-p{module}", "-peven")
    assert run("-m", "clt_plugins", "validate", *recipe).stdout.startswith('name = "try"')
    odd = run("-m", "clt_plugins", "validate", *recipe, "--set", "transcoder.features=63", code=2)
    assert "transcoder.features=63: must be even, not 63" in odd.stderr
    assert run("-m", "clt_plugins", "-pcount.py", "count", "try.toml", f"-p{module}").stdout.strip() == "64"
    tests = [name for name in shown if name.startswith("test_")]
    run("-m", "pytest", "-q", "-p", "no:cacheprovider", "--import-mode=importlib", *tests)
