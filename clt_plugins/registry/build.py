"""Whose fault it is: an exception from inside a plugin becomes one message that names plugin, choice and remedy.

A `ValueError` of the form `path: what is wrong; remedy` is how plugins speak to users, and is left alone.
"""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clt_plugins.contract.interfaces import Activation, Exporter, Kernels, Logger, Loss, Parallel, Source, Tying
from clt_plugins.contract.spec import Broken, Selected, Spec, WrongReturn
from clt_plugins.errors import Stopped
from clt_plugins.registry.plugins import PluginError, remedy

if TYPE_CHECKING:
    from clt_plugins.recipe.read import Recipe
    from clt_plugins.registry.plugins import Choice, Info, Plugins

PROTOCOLS: dict[str, type] = {
    "activation": Activation,
    "tying": Tying,
    "source": Source,
    "losses": Loss,
    "loggers": Logger,
    "parallel": Parallel,
    "kernels": Kernels,
    "exports": Exporter,
}
"""What `build` returns, by recipe table."""


def check_built(made: Any, slot: str, spec: Spec) -> Any:
    """What `build` returned, if it has all that its protocol asks for.

    Raises:
        Broken: naming what is missing.
    """
    protocol = PROTOCOLS[slot]
    wanted = [*protocol.__annotations__, *(name for name, each in vars(protocol).items() if callable(each))]
    missing = [name for name in wanted if (name == "__call__" or name[0] != "_") and not hasattr(made, name)]
    if missing:
        raise Broken(
            spec,
            f"build returned {type(made).__name__}, which is no {protocol.__name__}: it has no {', '.join(missing)}",
        )
    return made


@contextmanager
def blaming(plugins: Plugins, recipe: Recipe) -> Iterator[None]:
    """Exceptions from inside plugins leave as `PluginError`; users' errors, and the engine's own, as they are.

    Raises:
        PluginError: a plugin is at fault; the text begins with the recipe's setting.
    """
    try:
        yield
    except Broken as error:
        choice = next((c for each in _slots(plugins) for c in each if c.spec is error.spec), None)
        raise PluginError(_text(plugins, recipe, choice, str(error), error.__cause__ or error)) from error
    except (PluginError, Stopped, OSError, MemoryError):
        raise
    except Exception as error:
        info = None if _is_for_users(error) else _owner(plugins, error)
        if info is None:
            raise
        used = [c for each in _slots(plugins) for c in each if c.plugin == info.name and _place(recipe, c)]
        near = [c for c in used if c.spec.name in "".join(traceback.format_tb(error.__traceback__))]
        text = f"failed in a step: {type(error).__name__}: {error}"
        blamed = next(iter(near or used), None)
        raise PluginError(_text(plugins, recipe, blamed, text, error, info)) from error


def _is_for_users(error: Exception) -> bool:
    return isinstance(error, ValueError) and re.match(r"\S[^\n]*: ", str(error)) is not None


def _slots(plugins: Plugins) -> Iterator[list[Choice]]:
    return (list(plugins.choices(slot).values()) for slot in PROTOCOLS)


def _owner(plugins: Plugins, error: BaseException) -> Info | None:
    """The plugin in whose files an exception was raised or last passed through, innermost first."""
    files = [Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, WrongReturn):
        files.append(Path(getattr(sys.modules[type(error.made).__module__], "__file__", "")))
    for file in reversed(files):
        for info in plugins.infos:
            own = Path(info.file)
            if info.status == "active" and info.file and (file == own or _inside(file, own)):
                return info
    return None


def _inside(file: Path, own: Path) -> bool:
    return own.name == "__init__.py" and own.parent in file.parents


def _place(recipe: Recipe, choice: Choice) -> str | None:
    """Where a recipe names a choice: `activation`, `losses[1]`; None if it does not."""
    for slot in PROTOCOLS:
        found = getattr(recipe, slot)
        for index, each in enumerate(found if isinstance(found, list) else [found]):
            if isinstance(each, Selected) and each.spec is choice.spec:
                return f"{slot}[{index}]" if isinstance(found, list) else slot
    return None


def _text(
    plugins: Plugins, recipe: Recipe, choice: Choice | None, what: str, error: BaseException, info: Info | None = None
) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    inside = [f for f in frames if info is None or _owner_file(info, Path(f.filename))]
    at = f" ({Path((inside or frames)[-1].filename).name}:{(inside or frames)[-1].lineno})" if frames else ""
    name = info.name if info else choice.plugin if choice else "?"
    owner = info.distribution if info else choice.distribution if choice else "unknown"
    setting = _place(recipe, choice) if choice else None
    who = f"{choice.spec.name!r} of plugin {name!r} ({owner})" if choice else f"plugin {name!r} ({owner})"
    told = " ".join(what.split())
    return f"{setting + ': ' if setting else ''}{who}: {told}{at}; {remedy(name, owner)}, or -v shows where"


def _owner_file(info: Info, file: Path) -> bool:
    own = Path(info.file)
    return file == own or _inside(file, own)
