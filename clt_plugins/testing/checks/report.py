"""Checks for reports: see `clt_plugins.contract.results.report.Report`.

They use random stores of collected features, with tokens that break careless pages, and no run, or all facts of one.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any
from unittest import SkipTest

import attrs
import numpy as np
import torch

from clt_plugins.collected.reader import Collected
from clt_plugins.contract.context import Context
from clt_plugins.contract.results.exporter import Checks
from clt_plugins.errors import Faults
from clt_plugins.finished.curves import Curve
from clt_plugins.finished.facts import Facts
from clt_plugins.finished.provenance import Origin
from clt_plugins.model.devices import bare_context
from clt_plugins.testing.bench import Bench
from clt_plugins.testing.checks.stage import FailingDisk
from clt_plugins.testing.registry import check
from clt_plugins.testing.report import Nonconformance, complain, expect, location, one_line
from clt_plugins.testing.stores import make_store

LAYERS, FEATURES = 2, 24

STORES: tuple[dict[str, Any], ...] = (
    {},
    {"geometry": False, "thresholds": False},
    {"hostile": False, "layers": 1, "features": 1},
    {"top": 0, "groups": 0, "per_group": 0, "coactive": 0},
    {"similar": 0, "virtual": 0, "logits": 0},
    {"tokens": 2, "contexts": 1, "most_active": 1},
)
"""What stores may hold, or lack: see `make_store`."""

FACTS = Facts(
    name="</script><script>alert(1)</script>",
    folder="run",
    recipe={"name": "x", "model": {"path": "<!-- \u2028"}, "source": {"name": "stream"}, "train": {"steps": 10}},
    recipe_text='name = "</script>"\n',
    versions={"clt_plugins": "0.1.0", "libraries": {"torch": "2"}, "plugins": {}, "command": ["<b>"]},
    history=[{"time": "2026-01-01T00:00:00", "step": 0}],
    transcoder=Origin(folder="transcoder", sha256="0" * 64, step=10, tokens=100),
    curves={
        "eval/nmse": Curve(step=[5, 10], value=[0.5, None]),
        "eval/l0_by_layer": Curve(step=[5, 10], value=[[1.0, 2.0], [None, 2.0]]),
    },
    evaluation={"tokens": 100, "nmse": None, "by_layer": {"nmse": [None, 0.5]}, "model": None, "notes": ["<i>"]},
    notes=["metrics.jsonl: 1 lines could not be read"],
)
"""A run of which everything is known; one of which nothing is, is `Facts()`."""

PAGES = (".html", ".htm", ".svg", ".js", ".xhtml")
MARKUP = (b"<script>alert(1)", b"<img src=x onerror", b"</script><script>alert(1)")
"""What stands in the tokens and facts; a page must not hold it as it is."""


def _context(collected: Collected) -> Context:
    info = collected.info
    return bare_context(torch.device("cpu"), n_layers=info.n_layers, d_model=info.d_model, n_features=info.n_features)


@cache
def _made() -> tempfile.TemporaryDirectory[str]:
    """Where this process has its stores, until it ends."""
    return tempfile.TemporaryDirectory(prefix="conformance-stores-")


def _store(number: int = 0) -> Collected:
    folder = Path(_made().name) / str(number)
    if not folder.exists():
        make_store(folder, **{"layers": LAYERS, "features": FEATURES, **STORES[number]})
    return Collected.open(folder, checksums=False)


def _written(bench: Bench, collected: Collected, facts: Facts, name: str) -> Path:
    folder = bench.folder / name
    folder.mkdir()
    try:
        bench.build(_context_of(bench, collected)).write(collected, facts, folder)
    except Faults as error:
        left = sorted(path.name for path in folder.iterdir())
        expect(not left, "nothing written where it refuses", ", ".join(left), "`write`: look before you write")
        raise SkipTest(str(error)) from error
    return folder


def _context_of(bench: Bench, collected: Collected) -> Context:
    return attrs.evolve(_context(collected), recipe=bench.recipe())


def _digests(folder: Path) -> dict[str, str]:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


@check("reports", trial=True, basic=True)
def write(bench: Bench) -> None:
    """`write` writes files that are not empty, into its folder only, with the same bytes each time; the store stays."""
    collected = Collected.open(shutil.copytree(_store().folder, bench.folder / "store"))
    before = _digests(collected.folder)
    working = bench.folder / "working"
    working.mkdir()
    with contextlib.chdir(working):
        folder = _written(bench, collected, FACTS, "first")
    first = _digests(folder)
    strayed = [path.name for path in bench.folder.iterdir() if path.name not in ("store", "working", "first")]
    strayed += [path.name for path in working.iterdir()]
    empty = [name for name in first if not (folder / name).stat().st_size]
    expect(first, "files", "none", "`write`: write into `folder`")
    expect(not empty, "files with something in them", f"empty: {', '.join(empty)}", "`write`: closed and flushed?")
    expect(not strayed, "files in `folder` only", ", ".join(strayed), "`write`: write into `folder`")
    expect(_digests(collected.folder) == before, "the store as it was", "it was changed", "`write`: it only reads it")
    second = _digests(_written(bench, Collected.open(collected.folder), FACTS, "second"))
    changed = sorted(name for name in first.keys() | second.keys() if first.get(name) != second.get(name))
    look = "`write`: times, sets, random names"
    expect(not changed, "the same bytes each time", f"{', '.join(changed)} differ", look)


@check("reports")
def every_store(bench: Bench) -> None:
    """Every store is written, or `Refused` before anything is written: without geometry, thresholds, examples or
    logits, of one feature, of two tokens; with all facts of a run, and with none."""
    for number, tables in enumerate(STORES):
        collected = _store(number)
        for facts in (Facts(), FACTS):
            what = f"a store with {tables or 'everything'}, {'all facts' if facts.name else 'no facts'}"
            try:
                _written(bench, collected, facts, f"every{number}{'full' if facts.name else 'bare'}")
            except SkipTest:
                continue
            except Nonconformance:
                raise
            except Exception as error:
                look = f"{location(error, bench.file)}: ask for what not every store has"
                complain(f"a report, or `Refused` with the remedy, for {what}", one_line(error), look)


@check("reports")
def every_feature(bench: Bench) -> None:
    """Each feature is in the files: when what was collected of one changes, in the first or the last layer, they
    change."""
    collected = _store()
    whole = _digests(_written(bench, collected, FACTS, "whole"))
    for layer in range(LAYERS):
        alive = np.flatnonzero(collected.layer(layer)["active"] > 0)
        for feature in (int(alive[0]), int(alive[-1])):
            changed = _Changed(collected, layer, feature)
            now = _digests(_written(bench, changed, FACTS, f"changed-{layer}-{feature}"))  # type: ignore[arg-type]
            expect(
                now != whole,
                f"feature {feature} of layer {layer} in the files",
                "the files are the same when all of it changes: it is left out",
                "`write`: go through all layers and features",
            )


class _Changed:
    """A store in which everything of one feature is another number."""

    def __init__(self, collected: Collected, layer: int, feature: int):
        self._collected, self._layer, self._feature = collected, layer, feature

    def __getattr__(self, name: str) -> Any:
        return getattr(self._collected, name)

    def layer(self, layer: int) -> dict[str, np.ndarray[Any, Any]]:
        arrays = dict(self._collected.layer(layer))
        if layer == self._layer:
            for name in ("active", "maximum", "minimum", "mean", "top_value", "group_value", "coactive_score"):
                arrays[name] = arrays[name].copy()
                arrays[name][self._feature] += 1
        return arrays

    def density(self, layer: int) -> np.ndarray[Any, Any]:
        return self.layer(layer)["active"] / self._collected.info.tokens

    def examples(self, layer: int, feature: int) -> Any:
        examples = self._collected.examples(layer, feature)
        if (layer, feature) != (self._layer, self._feature):
            return examples
        more = [attrs.evolve(one, value=one.value + 1) for one in examples.top]
        return attrs.evolve(examples, top=more)


@check("reports")
def markup(bench: Bench) -> None:
    """Tokens, names and recipes are text in every page: none ends a script or becomes an element.

    Skipped where the report writes no pages or scripts.
    """
    folder = _written(bench, _store(), FACTS, "pages")
    pages = [file for file in folder.rglob("*") if file.suffix.lower() in PAGES]
    if not pages:
        raise SkipTest("it writes no pages")
    for file in pages:
        data = file.read_bytes()
        present = [text.decode() for text in MARKUP if text in data]
        expect(
            not present,
            f"{file.relative_to(folder)} without the markup of a token",
            f"{present[0]} stands in it as it is" if present else "",
            "`write`: escape `<` where text goes into a page or a script",
        )


@check("reports")
def broken_off(bench: Bench) -> None:
    """An error while it writes, of any one of the first files, leaves `write`: an incomplete report counts as none."""
    collected = _store()
    report = bench.build(_context_of(bench, collected))
    for before in range(5):
        folder = bench.folder / f"disk{before}"
        folder.mkdir()
        disk = FailingDisk(folder, before)
        try:
            with disk:
                report.write(collected, FACTS, folder)
        except Faults as error:
            raise SkipTest(str(error)) from error
        except (OSError, RuntimeError):
            continue
        expect(
            not disk.refused,
            "an error of any write to end `write`",
            f"{disk.refused} could not be opened for writing, and it went on: its result is incomplete",
            "`write`: an `except` or a `suppress` that swallows errors?",
        )
        if before == 0:
            raise SkipTest("it opens no file by Python's `open`: a disk that fails cannot be played to it")
        return


@check("reports")
def before_training(bench: Bench) -> None:
    """`check` returns texts, the same ones on the device "meta". Skipped where the report has no `check`."""
    said = []
    for device in ("meta", "cpu"):
        parts = bench.parts(device=device, stirred=False)
        report = bench.build(parts.context)
        if not isinstance(report, Checks):
            raise SkipTest("it has no `check`")
        said.append(report.check(parts.transcoder))
    look = "`check`: look at the choices and settings, not at values"
    expect(
        all(isinstance(texts, list) and all(isinstance(one, str) and ": " in one for one in texts) for texts in said),
        "a list of texts `setting: what is wrong: remedy`",
        repr(said),
        "`check`",
    )
    expect(said[0] == said[1], f"the same of a transcoder on the device meta: {said[1]}", f"{said[0]}", look)
