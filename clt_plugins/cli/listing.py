"""What plugins offer, as data and as text: every choice with its settings, their types, defaults and documentation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from clt_plugins.contract.recipe import (
    ModelConfig,
    Recipe,
    TrainConfig,
    TranscoderConfig,
)
from clt_plugins.contract.slots import BY_TABLE
from clt_plugins.contract.spec import Choice
from clt_plugins.contract.types import field_docs, recipe_key, stated_default, summary, type_text
from clt_plugins.errors import Refused, did_you_mean
from clt_plugins.recipe.structure import plain
from clt_plugins.registry.info import name_of
from clt_plugins.registry.plugins import Plugins
from clt_plugins.toml import inline

ENGINE_TABLES: dict[str, type] = {
    "model": ModelConfig,
    "transcoder": TranscoderConfig,
    "train": TrainConfig,
}


def tables() -> list[str]:
    """The keys a recipe may have at its top."""
    return [a.name for a in attrs.fields(Recipe)]


def fields(cls: Any) -> list[dict[str, Any]]:
    """The settings of a config class: name, type, whether required, default (None: not given) and doc."""
    attrs.resolve_types(cls)
    docs = field_docs(cls)
    described = []
    for a in attrs.fields(cls):
        default = stated_default(a)
        required = default is attrs.NOTHING
        described.append(
            {
                "name": recipe_key(a),
                "type": type_text(a.type),
                "required": required,
                "default": None if required else plain(default),
                "doc": docs.get(a.name, ""),
            }
        )
    return described


def listing(plugins: Plugins, name: str | None = None) -> dict[str, Any]:
    """Plugins, choices by table, the engine's own tables, and failures: plain data.

    Args:
        name: only what has this name: a plugin, a distribution, a table, or a choice.

    Raises:
        Refused: nothing has it.
    """
    listed: dict[str, Any] = {
        "plugins": [attrs.asdict(info) for info in plugins.infos],
        "choices": {slot: [_choice(choice) for choice in plugins.choices(slot).values()] for slot in BY_TABLE},
        "tables": {table: {"summary": summary(cls), "fields": fields(cls)} for table, cls in ENGINE_TABLES.items()},
        "failures": [
            {"plugin": each.plugin, "distribution": each.distribution, "error": str(each).split(": ", 1)[1]}
            for each in plugins.failures
        ],
    }
    return listed if name is None else _only(listed, name)


def _choice(choice: Choice) -> dict[str, Any]:
    return {
        "name": choice.spec.name,
        "aliases": list(choice.spec.aliases),
        "plugin": choice.plugin,
        "distribution": choice.distribution,
        "summary": summary(choice.spec.config),
        "fields": fields(choice.spec.config),
    }


def _only(listed: dict[str, Any], name: str) -> dict[str, Any]:
    def of_plugin(item: Mapping[str, Any], key: str) -> bool:
        return name in (item[key], item["distribution"], name_of(item["distribution"]))

    kept: dict[str, Any] = {
        "plugins": [item for item in listed["plugins"] if of_plugin(item, "name")],
        "choices": {
            slot: [c for c in offered if name in (slot, c["name"], *c["aliases"]) or of_plugin(c, "plugin")]
            for slot, offered in listed["choices"].items()
        },
        "tables": {table: value for table, value in listed["tables"].items() if table == name},
        "failures": [item for item in listed["failures"] if of_plugin(item, "plugin")],
    }
    if not (kept["plugins"] or any(kept["choices"].values()) or kept["tables"] or name in BY_TABLE):
        known = [*(item["name"] for item in listed["plugins"]), *BY_TABLE, *ENGINE_TABLES]
        known += [c["name"] for offered in listed["choices"].values() for c in offered]
        raise Refused("", f"no plugin, table or choice is called {name!r}{did_you_mean(name, known)}")
    return kept


def undocumented(plugins: Plugins) -> list[str]:
    """What a reader of the listing would miss: configs and fields without a word on them."""
    faults = []
    for slot in BY_TABLE:
        for choice in plugins.choices(slot).values():
            config = choice.spec.config
            where = f"{choice}: {slot} {choice.spec.name!r}: {config.__name__}"
            if not summary(config):
                faults.append(f"{where} has no docstring")
            faults += [
                f"{where}.{each['name']} has no doc: put a string literal under it"
                for each in fields(config)
                if not each["doc"]
            ]
    return faults


def as_text(listed: dict[str, Any]) -> str:
    """The listing for people."""
    lines = []
    for info in listed["plugins"]:
        status = "" if info["status"] == "active" else f"  {info['status'].upper()}"
        lines.append(f"{info['name']}  {info['distribution']}{status}  {_short(info['file'])}")
        if info["hooks"]:
            lines.append(f"    {', '.join(info['hooks'])}")
    for slot, offered in listed["choices"].items():
        if offered:
            lines += ["", BY_TABLE[slot].bracket]
        for choice in offered:
            also = f" (also {', '.join(choice['aliases'])})" if choice["aliases"] else ""
            lines.append(f"  {choice['name']}{also} - {choice['summary']}  <{choice['plugin']}>")
            lines += map(_field_text, choice["fields"])
    for table, described in listed["tables"].items():
        lines += ["", f"[{table}] - {described['summary']}", *map(_field_text, described["fields"])]
    if listed["failures"]:
        lines.append("")
    lines += [f"! {each['plugin']} ({each['distribution']}): {each['error']}" for each in listed["failures"]]
    return "\n".join(lines)


def _field_text(each: dict[str, Any]) -> str:
    default = ", required" if each["required"] else ", optional"
    if each["default"] is not None:
        default = f" = {inline(each['default'])}"
    return f"      {each['name']}: {each['type']}{default}  {each['doc']}"


def _short(file: str) -> str:
    path = Path(file)
    return str(path.relative_to(Path.cwd())) if file and path.is_relative_to(Path.cwd()) else file
