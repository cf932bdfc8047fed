"""Entry points -> plugins -> the choices a recipe has.

A broken plugin is recorded and passed over: it stops only a recipe that needs it, or a strict run. Plugins are
taken in sorted order, so that ranks agree, and everything is loaded before threads and process groups start.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pluggy

from clt_plugins.contract.hooks import Hooks
from clt_plugins.contract.slots import BY_TABLE, SLOTS
from clt_plugins.contract.spec import API_VERSION, Choice, Format
from clt_plugins.errors import Fault, Faults, PluginError, Refused, did_you_mean, parse_path
from clt_plugins.registry.by_name import imported, is_file
from clt_plugins.registry.discovery import Installed, find_plugins
from clt_plugins.registry.info import Failure, Info, name_of, source_file
from clt_plugins.registry.kernels import auto
from clt_plugins.registry.sound import check_spec, warn_of_mixed_install

if TYPE_CHECKING:
    import click

    from clt_plugins.contract.recipe import Recipe
    from clt_plugins.contract.results.inspector import Inspector

logger = logging.getLogger(__name__)


class Plugins:
    """The plugins of one run. Made by `load_plugins`; after that only `commands` adds failures."""

    def __init__(self) -> None:
        self.failures: list[Failure] = []
        self.infos: list[Info] = []
        self._manager = pluggy.PluginManager("clt_plugins")
        self._manager.add_hookspecs(Hooks)
        self._offers: dict[tuple[str, str], list[Choice]] = {}
        """(table, name or alias) -> who offers it; more than one is a clash."""
        self._offers["kernels", "auto"] = [
            auto(lambda: [choice for name, choice in self.choices("kernels").items() if name != "auto"])
        ]

    def choices(self, slot: str) -> dict[str, Choice]:
        """All choices for a recipe's table, by name (without aliases and clashes), sorted."""
        assert slot in BY_TABLE, slot
        named = {name: offers[0] for (table, name), offers in self._offers.items() if table == slot and not offers[1:]}
        return {name: named[name] for name in sorted(named) if named[name].spec.name == name}

    def pick(self, slot: str, name: str) -> Choice:
        """The choice of that name (or alias) for a recipe's table.

        Raises:
            Faults: there is none, or two; names the nearest, all that are known, and plugins that failed.
        """
        offers = self._offers.get((slot, name), [])
        if len(offers) == 1:
            return offers[0]
        if offers:
            raise Refused("", _clash(name, offers))
        known = sorted(word for table, word in self._offers if table == slot)
        text = f"unknown name {name!r}{did_you_mean(name, known)} (known: {', '.join(self.choices(slot)) or 'none'})"
        if self.failures:
            text += (
                f"; these plugins failed to load: {', '.join(sorted({failure.plugin for failure in self.failures}))}"
            )
        blocked = [info.name for info in self.infos if info.status == "blocked"]
        raise Refused("", text + (f"; blocked: {', '.join(blocked)}" if blocked else ""))

    def checks(self, recipe: Recipe) -> list[Fault]:
        """The complaints of all plugins about a typed recipe.

        Raises:
            PluginError: a plugin's `clt_check` is broken.
        """
        faults: list[Fault] = []
        for impl in self._impls("clt_check"):
            try:
                returned = impl.function(*([recipe] if "recipe" in impl.argnames else []))
                complaints = [] if isinstance(returned, str) else list(returned)
                if isinstance(returned, str) or not all(isinstance(text, str) for text in complaints):
                    raise TypeError(f"must return a list of str, got {returned!r}")
            except Faults as error:
                faults += error.faults
                continue
            except Exception as error:
                raise PluginError(self._named(impl.plugin_name, "clt_check", error)) from error
            faults += map(_as_fault, complaints)
        return faults

    def commands(self, reserved: Collection[str] = ()) -> dict[str, click.Command]:
        """The sub-commands that plugins add. A plugin whose hook fails is recorded and passed over.

        Args:
            reserved: names of the engine's own, which no plugin may give.
        """
        by_name: dict[str, click.Command] = {}
        for impl in self._impls("clt_commands"):
            try:
                for command in impl.function():
                    if not isinstance(getattr(command, "name", None), str):
                        raise TypeError(f"must return click commands, got {command!r}")
                    if command.name in reserved:
                        raise ValueError(f"{command.name!r} is a command of clt-plugins itself: give it another name")
                    if command.name in by_name:
                        raise ValueError(f"another plugin has a command {command.name!r} already")
                    by_name[command.name] = command
            except Exception as error:
                wrapped = PluginError(self._named(impl.plugin_name, "clt_commands", error))
                self._fail(impl.plugin_name, self._distribution(impl.plugin_name), wrapped)
                logger.warning("plugin failed: %s", self.failures[-1])
        return by_name

    def readers(self) -> dict[str, Callable[[], Any]]:
        """What makes the `ReadsBack` of each format that can be read, by the format's name, sorted."""
        readers = {f.name: f.reader for f in self._returned("clt_formats", Format)}
        written = self.choices("exports")
        readers |= {name: choice.spec.reader for name, choice in written.items() if choice.spec.reader is not None}
        return {name: readers[name] for name in sorted(readers)}

    def formats(self) -> list[Format]:
        """What `clt_formats` of all plugins returns."""
        return self._returned("clt_formats", Format)

    def inspectors(self) -> list[Inspector]:
        """What `clt_inspectors` of all plugins returns."""
        return self._returned("clt_inspectors", object)

    def _returned(self, hook: str, kind: type[Any]) -> list[Any]:
        """What a hook of all plugins returns. A plugin whose hook fails is recorded and passed over."""
        returned: list[Any] = []
        for impl in self._impls(hook):
            try:
                items = list(impl.function())
                if not all(isinstance(item, kind) for item in items):
                    raise TypeError(f"must return a list of {kind.__name__}, got {items!r}")
                returned += items
            except Exception as error:
                wrapped = PluginError(self._named(impl.plugin_name, hook, error))
                self._fail(impl.plugin_name, self._distribution(impl.plugin_name), wrapped)
                logger.warning("plugin failed: %s", self.failures[-1])
        return returned

    def module(self, name: str) -> Any:
        """The module (or other object) that was loaded as the plugin of that name."""
        return self._manager.get_plugin(name)

    def info(self, name: str) -> Info:
        """What is known of the plugin of that name."""
        return next(info for info in self.infos if info.name == name and info.status == "active")

    def _impls(self, hook: str) -> list[Any]:
        return sorted(getattr(self._manager.hook, hook).get_hookimpls(), key=lambda impl: impl.plugin_name)

    def _distribution(self, plugin: str) -> str:
        return next(info.distribution for info in self.infos if info.name == plugin and info.status == "active")

    def _named(self, plugin: str, hook: str, error: BaseException) -> str:
        return f"plugin {plugin!r} ({self._distribution(plugin)}), {hook}: {type(error).__name__}: {error}"

    def _fail(self, plugin: str, distribution: str, error: BaseException) -> None:
        self.failures.append(Failure(plugin, distribution, error))

    # -- loading, used by `load_plugins` ---------------------------------------------------------------------------

    def _add(self, name: str, distribution: str, importer: Callable[[], Any]) -> None:
        """Import and register one plugin; a failure leaves nothing of it behind."""
        plugin = None
        try:
            if holder := next((i for i in self.infos if i.name == name and i.status == "active"), None):
                raise PluginError(
                    f"entry point name {name!r} is already used by {holder.distribution}: "
                    f"block one with -p no:DISTRIBUTION, such as -p no:{name_of(distribution)}"
                )
            plugin = importer()
            api = getattr(plugin, "CLT_API", API_VERSION)
            if api != API_VERSION:
                raise PluginError(f"written for plugin API {api}, this is {API_VERSION}: install versions that agree")
            self._manager.register(plugin, name)
            self._refuse_unknown_hooks(plugin)
            if not self._manager.get_hookcallers(plugin):
                raise PluginError("has no hooks: mark its functions with @clt_plugins.hookimpl")
            offers = self._collect(plugin, name, distribution)
        except (Exception, SystemExit) as error:
            if plugin is not None and self._manager.get_plugin(name) is plugin:
                self._manager.unregister(plugin)
            self.infos.append(Info(name, distribution, "failed", source_file(plugin)))
            self._fail(name, distribution, error)
            return
        hooks = sorted(caller.name for caller in self._manager.get_hookcallers(plugin) or [])
        self.infos.append(Info(name, distribution, "active", source_file(plugin), tuple(hooks)))
        for slot, choice in offers:
            for word in (choice.spec.name, *choice.spec.aliases):
                others = self._offers.setdefault((slot, word), [])
                others.append(choice)
                if len(others) > 1:
                    self._fail(name, distribution, PluginError(f"{slot}: {_clash(word, others)}"))

    def _refuse_unknown_hooks(self, plugin: Any) -> None:
        """pluggy's `check_pending` for one plugin, with a suggestion."""
        known = [name for name in vars(Hooks) if name.startswith("clt_")]
        for caller in self._manager.get_hookcallers(plugin) or []:
            required = [i for i in caller.get_hookimpls() if i.plugin is plugin and not i.optionalhook]
            if not caller.has_spec() and required:
                raise PluginError(f"unknown hook {caller.name!r}{did_you_mean(caller.name, known)}")

    def _collect(self, plugin: Any, name: str, distribution: str) -> list[tuple[str, Choice]]:
        """What a plugin's slot hooks return, checked."""
        offers: list[tuple[str, Choice]] = []
        for slot in SLOTS:
            own = [i for i in getattr(self._manager.hook, f"clt_{slot.hook}").get_hookimpls() if i.plugin is plugin]
            for impl in own:
                try:
                    specs = list(impl.function())
                    for spec in specs:
                        check_spec(spec)
                    words = [word for spec in specs for word in (spec.name, *spec.aliases)]
                    if twice := {word for word in words if words.count(word) > 1}:
                        raise ValueError(f"offers a name twice: {', '.join(sorted(twice))}")
                except Exception as error:
                    text = f"plugin {name!r}, clt_{slot.hook}: {type(error).__name__}: {error}"
                    raise PluginError(text) from error
                file = source_file(plugin)
                offers += [(slot.table, Choice(spec, slot.table, name, distribution, file)) for spec in specs]
        return offers


def load_plugins(
    *, block: Sequence[str] = (), extra: Sequence[str] = (), autoload: bool = True, strict: bool = False
) -> Plugins:
    """Load plugins: those installed, and more by name.

    Args:
        block: plugins or distributions not to import (`-p no:NAME`).
        extra: modules that are no installed plugins (`-p package.module`), or their files (`-p folder/module.py`); or,
            where `autoload` is off, names of installed plugins or distributions to load all the same.
        autoload: load what is installed; also switched off by CLT_PLUGINS_DISABLE_AUTOLOAD=1.
        strict: a plugin that fails is fatal; also switched on by CLT_PLUGINS_STRICT=1.

    Raises:
        Refused: there is no module or file that `extra` names.
        PluginError: a plugin failed, and it is one of `extra`, or `strict` is on.
    """
    autoload = autoload and os.environ.get("CLT_PLUGINS_DISABLE_AUTOLOAD", "") in ("", "0")
    strict = strict or os.environ.get("CLT_PLUGINS_STRICT", "") not in ("", "0")
    plugins = Plugins()
    installed = find_plugins()
    for plugin in installed:
        if _names(plugin) & set(block):
            plugins.infos.append(Info(plugin.name, plugin.distribution, "blocked"))
        elif autoload or _names(plugin) & set(extra):
            plugins._add(plugin.name, plugin.distribution, plugin.entry.load)
    modules = [name for name in extra if not any(name in _names(plugin) for plugin in installed)]
    labels = {name: Path(name).stem if is_file(name) else name for name in modules}
    for name, label in labels.items():
        plugins._add(label, "by -p", partial(imported, name))
    wanted = {*extra, *labels.values()}
    fatal = [failure for failure in plugins.failures if strict or failure.plugin in wanted]
    for failure in fatal:
        if isinstance(failure.error, Faults):  # there is no such module: the user's mistake
            raise failure.error
    if fatal:
        raise PluginError("; ".join(map(str, fatal)))
    for failure in plugins.failures:
        logger.warning("plugin failed: %s", failure)
    warn_of_mixed_install(plugins.infos)
    return plugins


def _as_fault(complaint: str) -> Fault:
    """A complaint "activation.k: too large", with the path told apart."""
    path, colon, text = complaint.partition(": ")
    where = parse_path(path)
    return Fault(where, text) if colon and " " not in path else Fault((), complaint)


def _names(plugin: Installed) -> set[str]:
    return {plugin.name, name_of(plugin.distribution)}


def _clash(name: str, offers: Iterable[Choice]) -> str:
    offers = list(offers)
    blocks = " or ".join(f"-p no:{choice.plugin}" for choice in offers)
    return f"{name!r} is offered by {' and '.join(map(str, offers))}: block one with {blocks}"
