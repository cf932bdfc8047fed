"""One case per (choice, check) of a plugin. Nothing heavy is imported before a case runs."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import SkipTest

import attrs

from clt_plugins.errors import Refused
from clt_plugins.registry.info import Info
from clt_plugins.registry.plugins import Plugins, load_plugins
from clt_plugins.testing.report import Nonconformance, place

SLOTS_IN_WORDS = {"losses": "loss", "loggers": "logger", "exports": "exporter"}

EVERY = ("config", "default")
CHECKS: dict[str, tuple[str, ...]] = {
    "activation": (
        *(
            "selection",
            "gradient",
            "own_gradient",
            "sparse_is_dense",
            "save_load",
            "tensor_parallel",
            "bf16",
            "meta",
            "determinism",
        ),
        "no_sync",
    ),
    "tying": (
        *("decoder", "gradient", "sparse_is_dense", "save_load", "tensor_parallel", "bf16", "meta", "determinism"),
        "no_sync",
    ),
    "losses": (
        *("terms", "gradient_reconstruction", "gradient_features", "sparse_is_dense", "tensor_parallel", "bf16"),
        *("determinism", "no_sync"),
    ),
    "source": ("batches", "determinism", "resume", "exactly_once", "held_out", "statistics", "ranks"),
    "loggers": ("protocol", "resume", "flush", "prompt"),
    "kernels": ("products", "edges", "rows", "strides", "threads", "gradient"),
    "exports": ("export", "every_tensor", "round_trip", "before_training"),
    "parallel": ("shard", "sums", "gradients"),
}
"""Recipe table -> its checks, besides `config` and `default`, which every choice has.

The docstring of `clt_plugins.testing.<table>.<check>` says what each one asks for.
"""


@attrs.frozen(kw_only=True)
class Case:
    """One check of one choice; `str(case)` is `choice/check`, or `choice#2/check` for its second settings."""

    plugin: str
    """As it was named to `cases`."""
    label: str
    """The choice, with the number of its settings where there are several."""
    check: str
    slot: str = ""
    choice: str = ""
    settings: Mapping[str, Any] = attrs.field(factory=dict)
    tables: Mapping[str, Any] = attrs.field(factory=dict)
    plugins: Plugins = attrs.field(repr=False, eq=False)
    module: str | None = None
    """What other processes import the plugin by, where it is not installed."""
    problem: str | None = None
    """Why nothing else can be checked."""

    def __str__(self) -> str:
        return f"{self.label}/{self.check}"

    def run(self) -> None:
        """Do it.

        Raises:
            Nonconformance: what was expected, what came, where to look.
            unittest.SkipTest: it cannot be checked here, and why; pytest shows it as skipped.
        """
        if self.problem is not None:
            raise Nonconformance(f"{self.plugin} cannot be loaded\n     got: {self.problem}")
        from clt_plugins.testing.bench import Bench

        module = "configs" if self.check in EVERY else SLOT_MODULES.get(self.slot, self.slot)
        check = getattr(import_module(f"clt_plugins.testing.{module}"), self.check)
        offered = self.plugins.pick(self.slot, self.choice)
        title = f"{SLOTS_IN_WORDS.get(self.slot, self.slot)} {self.choice!r} of {offered}, check {self.check!r}"
        with tempfile.TemporaryDirectory(prefix="conformance-") as folder:
            try:
                bench = Bench(
                    self.plugins, self.slot, self.choice, self.settings, self.tables, self.module, Path(folder)
                )
                check(bench)
            except SkipTest:
                raise
            except Nonconformance as error:
                raise Nonconformance(f"{title}:\n{error}") from error
            except Exception as error:
                text = " ".join(f"{type(error).__name__}: {error}".split())
                raise Nonconformance(
                    f"{title}:\nexpected: the check runs through\n     got: {text}\n look at: {place(error)}"
                ) from error


SLOT_MODULES = {
    "activation": "activations",
    "tying": "tyings",
    "source": "sources",
    "exports": "exporters",
    "parallel": "parallels",
}


def cases(
    plugin: str | ModuleType | Any,
    *,
    settings: Mapping[str, Mapping[str, Any] | Sequence[Mapping[str, Any]]] | None = None,
    recipe: Mapping[str, Any] | None = None,
) -> list[Case]:
    """All cases of a plugin.

    Args:
        plugin: the name of an installed plugin or distribution, or a module: its name, or itself.
        settings: choice -> its settings in the checks (`config` and `default` take the defaults), as a recipe's table
            has them; or a list of such, each checked by itself. The checks' transcoder has 3 layers of 41 features.
        recipe: further tables that the checks' recipe needs, such as `model`.

    Raises:
        ValueError: `settings` names a choice that the plugin does not offer.
    """
    plugins, infos, module = _loaded(plugin)
    name = plugin if isinstance(plugin, str) else getattr(plugin, "__name__", repr(plugin))
    failures = [str(each) for each in plugins.failures if each.plugin in {info.name for info in infos}]
    if failures or not infos:
        problem = "; ".join(failures) or f"no plugin or module is called {name!r}"
        return [Case(plugin=name, label=name, check="load", plugins=plugins, problem=problem)]
    given = dict(settings or {})
    found = []
    for slot in CHECKS:
        for choice in plugins.choices(slot).values():
            if choice.plugin not in {info.name for info in infos}:
                continue
            for label, used in _variants(choice.spec.name, given.pop(choice.spec.name, {})):
                found += [
                    Case(
                        plugin=name,
                        label=label,
                        check=check,
                        slot=slot,
                        choice=choice.spec.name,
                        settings=used,
                        tables=recipe or {},
                        plugins=plugins,
                        module=module,
                    )
                    for check in (*EVERY, *CHECKS[slot])
                    if check not in EVERY or label in (choice.spec.name, f"{choice.spec.name}#1")
                ]
    if given:
        raise Refused("settings", f"{name} offers no choice {', '.join(map(repr, given))}")
    return found


TRIAL = {
    "activation": "determinism",
    "tying": "determinism",
    "losses": "determinism",
    "source": "batches",
    "kernels": "products",
    "exports": "export",
}
"""The check that shows whether a choice works at all. Loggers are only built: a step of theirs may reach a network."""


def trial(plugins: Plugins, names: Collection[str]) -> list[str]:
    """What goes wrong when the choices of some plugins are built with their defaults, and used for a step.

    Args:
        names: of the plugins.
    """
    faults = []
    for slot in CHECKS:
        for choice in plugins.choices(slot).values():
            if choice.plugin not in names:
                continue
            for check in ("default", TRIAL.get(slot)):
                made = Case(
                    plugin=choice.plugin,
                    label=choice.spec.name,
                    check=check or "",
                    slot=slot,
                    choice=choice.spec.name,
                    plugins=plugins,
                )
                try:
                    if check is not None:
                        made.run()
                except SkipTest:
                    break  # it wants settings that only its recipe can give
                except Nonconformance as error:
                    faults.append(" ".join(str(error).split()))
                    break
    return faults


def _variants(choice: str, given: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if isinstance(given, Mapping):
        yield choice, given
        return
    for number, each in enumerate(given, start=1):
        yield f"{choice}#{number}", each


def _loaded(plugin: Any) -> tuple[Plugins, list[Info], str | None]:
    """All plugins, those of them that were meant, and the module to import elsewhere."""
    plugins = load_plugins()
    name = plugin if isinstance(plugin, str) else getattr(plugin, "__name__", type(plugin).__name__)
    found = [info for info in plugins.infos if name in (info.name, info.distribution.split()[0]) or _is(info, plugin)]
    if found:
        return plugins, found, None
    importer = (lambda: import_module(plugin)) if isinstance(plugin, str) else (lambda: plugin)
    plugins._add(name, "not installed", importer)
    return plugins, [info for info in plugins.infos if info.name == name], name


def _is(info: Info, plugin: Any) -> bool:
    """Whether a module, or one of this name, is that plugin."""
    if isinstance(plugin, str):
        import importlib.util

        try:
            spec = importlib.util.find_spec(plugin)
        except (ImportError, ValueError):
            return False
        return spec is not None and bool(info.file) and spec.origin == info.file
    return bool(info.file) and getattr(plugin, "__file__", None) == info.file


def parametrize(
    plugin: str | ModuleType | Any,
    *,
    expected_failures: Mapping[str, str] | None = None,
    settings: Mapping[str, Mapping[str, Any] | Sequence[Mapping[str, Any]]] | None = None,
    recipe: Mapping[str, Any] | None = None,
) -> Callable[[Any], Any]:
    """A pytest decorator: the test gets each case of a plugin in turn, as `case`; see `cases`.

    Args:
        expected_failures: `choice/check` -> why it is meant to fail (a straight-through gradient). One that passes
            all the same is a failure: take it from the list.

    Raises:
        ValueError: `expected_failures` names a case that does not exist.
    """
    import pytest

    expected = dict(expected_failures or {})
    parameters = []
    found = cases(plugin, settings=settings, recipe=recipe)
    for case in found:
        reason = expected.pop(str(case), None)
        marks = [] if reason is None else [pytest.mark.xfail(strict=True, raises=Nonconformance, reason=reason)]
        parameters.append(pytest.param(case, id=str(case), marks=marks))
    if expected and not any(case.problem for case in found):
        raise Refused("expected_failures", f"there is no case {', '.join(map(repr, expected))}")
    return pytest.mark.parametrize("case", parameters)
