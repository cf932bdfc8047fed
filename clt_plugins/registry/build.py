"""Building what a recipe chose: build, wrap and check in one place; and naming the plugin that an error comes from.

A plugin refuses a user's setting by `Refused`. Anything else that leaves it, a `ValueError` included, is an error of
the plugin: it becomes a `PluginError` that names setting, plugin, distribution and line.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from clt_plugins.contract.slots import BY_TABLE
from clt_plugins.contract.spec import Choice
from clt_plugins.errors import (
    DamagedError,
    Faults,
    PluginError,
    Stopped,
    Unreachable,
    Where,
    WrongReturn,
    exhausted,
    parse_path,
)
from clt_plugins.registry.info import remedy

if TYPE_CHECKING:
    from clt_plugins.contract.context import Context
    from clt_plugins.contract.recipe import Recipe
    from clt_plugins.contract.spec import Selected
    from clt_plugins.registry.info import Info

TOLD = (Faults, Stopped, Unreachable, PluginError, DamagedError)
"""Exceptions that say themselves what the user has to know."""


def build(chosen: Selected, context: Context) -> Any:
    """Build what a recipe chose, and check that it has all that its protocol asks for.

    Raises:
        Faults: the plugin refuses a setting.
        OSError: a file or the network failed; the text names the plugin.
        PluginError: `build` failed, or what it returned lacks something.
    """
    setting = _setting(context.recipe, chosen)
    try:
        built = chosen.spec.build(chosen.config, context)
    except Faults as error:
        raise _placed(error, chosen.choice.slot, parse_path(setting)) from error
    except Exception as error:
        named = _named(error, chosen.choice, setting, "build")
        if named is error:
            raise
        raise named from error
    if lacking := missing_members(built, chosen.choice.slot):
        protocol = BY_TABLE[chosen.choice.slot].protocol.__name__
        text = f"build returned {type(built).__name__}, which is no {protocol}: it has no {', '.join(lacking)}"
        raise plugin_error(chosen.choice, setting, text)
    return built


def _placed(error: Faults, table: str, setting: Where) -> Faults:
    """Faults of a choice, which calls its settings `table.key`, by the path that they have in the recipe."""
    faults = []
    for one in error.faults:
        # Faults of choices inside it have their place already; so has what names one of several.
        own = one.where[:1] == (table,) and not (len(one.where) > 1 and isinstance(one.where[1], int))
        inside = one.where[: len(setting)] == setting
        faults.append(attrs.evolve(one, where=(*setting, *one.where[1:])) if own and not inside else one)
    return error if faults == error.faults else Faults(faults)


def missing_members(built: Any, table: str) -> list[str]:
    """What an object lacks of the protocol of a slot."""
    protocol = BY_TABLE[table].protocol
    required = [
        *protocol.__annotations__,
        *(name for name, member in vars(protocol).items() if callable(member) or isinstance(member, property)),
    ]
    return [name for name in required if (name == "__call__" or name[0] != "_") and not hasattr(built, name)]


@contextmanager
def naming_plugins(infos: Sequence[Info], recipe: Recipe | None = None, *, phase: str = "a step") -> Iterator[None]:
    """Errors raised inside a plugin leave as `PluginError`; users' errors and the engine's own leave as they are.

    Args:
        phase: what fails, for the message.

    Raises:
        PluginError: names the plugin whose code the error passed through last; begins with its setting, where the
            recipe chooses just one thing of that plugin.
    """
    try:
        yield
    except Exception as error:
        info = _owner(infos, error)
        if info is None:
            raise
        selected = [] if recipe is None else recipe.selected()
        used = [(path, chosen) for path, chosen in selected if chosen.choice.plugin == info.name]
        setting, choice = (used[0][0], used[0][1].choice) if len(used) == 1 else ("", None)
        named = _named(error, choice or info, setting, phase)
        if named is error:
            raise
        raise named from error


def plugin_error(choice: Choice, setting: str, text: str) -> PluginError:
    """What is wrong with a plugin's object, with the names of setting, plugin and distribution."""
    return PluginError(_message(choice, setting, text), where=parse_path(setting))


def _named(error: Exception, owner: Choice | Info, setting: str, phase: str) -> Exception:
    """The error with its plugin's name; the error itself where it says all that the user has to know."""
    # A closed pipe (`| head`) is the command line's affair.
    if isinstance(error, (*TOLD, BrokenPipeError)) or exhausted(error):
        return error
    if isinstance(error, OSError):
        # A full disk or a lost connection is nobody's bug: no advice to update the plugin.
        who, told = _who(owner), " ".join(str(error).split())
        return OSError(f"{setting + ': ' if setting else ''}{who}: {told}")
    return PluginError(_text(owner, setting, error, phase), where=parse_path(setting))


def _setting(recipe: Recipe | None, chosen: Selected) -> str:
    """Where a recipe names a choice: `activation`, `losses[1]`; the table where there is no recipe."""
    paths = [] if recipe is None else [path for path, other in recipe.selected() if other is chosen]
    return paths[0] if paths else chosen.choice.slot


def _owner(infos: Sequence[Info], error: BaseException) -> Info | None:
    """The plugin in whose files an exception was raised or last passed through, innermost first."""
    files = [Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, WrongReturn):
        files.append(Path(getattr(sys.modules[type(error.returned_by).__module__], "__file__", None) or ""))
    active = [info for info in infos if info.status == "active" and info.file]
    return next((info for file in reversed(files) for info in active if _belongs(file, info.file)), None)


def _belongs(file: Path, plugin_file: str) -> bool:
    """Whether a file is the plugin's module, or in the plugin's package."""
    module = Path(plugin_file)
    return file == module or (module.name == "__init__.py" and module.parent in file.parents)


def _text(owner: Choice | Info, setting: str, error: BaseException, phase: str) -> str:
    """One line on an error: what failed, and at which line of the plugin."""
    frames = traceback.extract_tb(error.__traceback__)
    inside = [frame for frame in frames if owner.file and _belongs(Path(frame.filename), owner.file)] or frames
    line = f" ({Path(inside[-1].filename).name}:{inside[-1].lineno})" if inside else ""
    told = " ".join(str(error).split())
    return _message(owner, setting, f"failed in {phase}: {type(error).__name__}: {told}{line}")


def _message(owner: Choice | Info, setting: str, text: str) -> str:
    name = owner.plugin if isinstance(owner, Choice) else owner.name
    advice = f"{remedy(name, owner.distribution)}, or -v shows where"
    return f"{setting + ': ' if setting else ''}{_who(owner)}: {text}; {advice}"


def _who(owner: Choice | Info) -> str:
    """`'mse' of plugin 'losses' (clt-plugins 0.1.0)`."""
    if isinstance(owner, Choice):
        return f"{owner.spec.name!r} of {owner}"
    return f"plugin {owner.name!r} ({owner.distribution})"
