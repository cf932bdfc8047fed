"""Checks of every choice: its settings are typed and documented, survive TOML, and the defaults build."""

from __future__ import annotations

import tomllib
from typing import Any
from unittest import SkipTest

import attrs

from clt_plugins.contract.spec import Selected
from clt_plugins.contract.types import check_config, field_docs, recipe_key, stated_default, summary
from clt_plugins.errors import Faults
from clt_plugins.model.assemble import close
from clt_plugins.recipe.structure import plain, structure_choice
from clt_plugins.testing.bench import Bench
from clt_plugins.testing.registry import check
from clt_plugins.testing.report import complain, expect
from clt_plugins.toml import toml_text

ASSEMBLED = (
    "source",
    "transforms",
    "encoder",
    "activation",
    "tying",
    "losses",
    "metrics",
    "parallel",
    "kernels",
    "normalisation",
)
"""The tables whose choices are built with the transcoder; others are built here."""


@check(trial=True, once=True)
def config(bench: Bench) -> None:
    """Every setting is a typed, documented field of a frozen, keyword-only class, and survives TOML.

    A name in the class body without a type (`weight = 1.0`) is no field: a recipe could never set it.
    """
    cls: Any = bench.spec.config
    look = f"the class {cls.__module__}.{cls.__qualname__}"
    try:
        check_config(cls)
    except TypeError as error:
        complain("a config that recipes can hold", str(error), look)
    positional = [a.name for a in attrs.fields(cls) if a.init and not a.kw_only]
    expect(
        not positional,
        "keyword-only fields, so that new ones can be added anywhere",
        f"{', '.join(positional)} positional",
        f"{look}: @attrs.frozen(kw_only=True)",
    )
    docs = field_docs(cls)
    silent = [a.name for a in attrs.fields(cls) if not docs.get(a.name)]
    expect(summary(cls), "a docstring that says what the choice is", "none", look)
    expect(
        not silent,
        "a string literal under each field: `plugins` shows it",
        f"none under {', '.join(silent)}",
        look,
    )
    typed = _typed(bench, {})
    if typed is None:
        typed = _typed(bench, bench.settings)
    if typed is None and bench.trial:
        return
    if typed is None:
        complain(
            "settings for the fields without a default",
            f"settings={dict(bench.settings)!r}",
            "`settings` of parametrize",
        )
    data = plain(typed)
    again = structure_choice(bench.plugins, bench.slot, tomllib.loads(toml_text(data)))
    expect(
        again.config == typed.config,
        f"the settings as they were after TOML and back: {typed.config}",
        str(again.config),
        f"{look}: a default that TOML cannot hold, or a converter that is no inverse",
    )


def _typed(bench: Bench, settings: Any) -> Selected | None:
    """The settings, typed; None where a field without a default is missing."""
    required = [recipe_key(a) for a in attrs.fields(bench.spec.config) if a.init and stated_default(a) is attrs.NOTHING]
    if set(required) - set(settings):
        return None
    try:
        return structure_choice(bench.plugins, bench.slot, {"name": bench.choice, **settings})
    except Faults as error:
        complain("settings that pass their own validators", str(error), f"the defaults of {bench.spec.config.__name__}")


@check(trial=True, once=True)
def default(bench: Bench) -> None:
    """The choice builds with its default settings, or says by `Refused` what it needs.

    Skipped where it cannot work with defaults alone.
    """
    required = [recipe_key(a) for a in attrs.fields(bench.spec.config) if a.init and stated_default(a) is attrs.NOTHING]
    if required:
        raise SkipTest(f"no default: a recipe must set {', '.join(required)}")
    bench = attrs.evolve(bench, settings={})
    try:
        parts = bench.parts(transcoder={"features": 2048})
        if bench.slot not in ASSEMBLED:
            folder = bench.folder / "run"
            folder.mkdir()
            built = bench.build(attrs.evolve(parts.context, folder=folder))
            if bench.slot == "loggers":
                built.close("finished")
    except Faults as error:
        lines = [fault.text for fault in error.faults if not fault.text or "\n" in fault.text]
        expect(not lines, "one line for each fault, that says what is missing", repr(lines), "what `build` raises")
        raise SkipTest(f"the default says what it needs: {error}") from error
    close(parts)
