"""Lists in documents are those of the code."""

from __future__ import annotations

import re
from pathlib import Path

import attrs

from clt_plugins.contract import hooks
from clt_plugins.contract.recipe import Recipe, TranscoderConfig
from clt_plugins.contract.slots import SLOTS
from clt_plugins.contract.training.metric import Step
from clt_plugins.contract.types import recipe_key
from clt_plugins.recipe.changes import FREE_TABLES

ROOT = Path(__file__).parents[2]


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_guide_has_the_members_of_a_step() -> None:
    table = text("plugins/guide/training.md").split("| `Step` has | |\n| --- | --- |\n")[1].split("\n\n")[0]
    named = [name for row in table.splitlines() for name in re.findall(r"`(\w+)`", row.split("|")[1])]
    assert sorted(named) == sorted(a.name for a in attrs.fields(Step))


def test_the_guide_has_what_may_change_on_resume() -> None:
    (row,) = re.findall(r"^\| may change \| (.*) \|$", text("examples/guides/after-training.md"), re.MULTILINE)
    named = re.findall(r"`([\w.]+)`", row)
    assert set(named) >= FREE_TABLES <= {a.name for a in attrs.fields(Recipe)}
    free = [a for a in attrs.fields(TranscoderConfig) if a.metadata.get("free_on_resume")]
    assert {name for name in named if name.startswith("transcoder.")} == {f"transcoder.{recipe_key(a)}" for a in free}


def test_the_changelog_has_all_hooks() -> None:
    (line,) = re.findall(r"^Version 1: hooks (.*)", text("CHANGELOG.md"), re.MULTILINE)
    others = re.findall(r"def (clt_\w+)\(self", Path(hooks.__file__).read_text(encoding="utf-8"))
    known = {*others, *(f"clt_{slot.hook}" for slot in SLOTS)}
    assert set(re.findall(r"`(clt_\w+)`", line)) == known
