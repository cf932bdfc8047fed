"""Checks for exporters: see `clt_plugins.contract.results.exporter.Exporter`.

They use the first transcoder of `TRANSCODERS` that the format can hold, or the one that `recipe` names; and the first
with each of `OTHERS`, whose skip path, offsets and scales, or form of the encoder a format may forget.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import SkipTest

import torch
from safetensors.torch import save_file

from clt_plugins.contract.results.exporter import Checks
from clt_plugins.errors import Faults
from clt_plugins.model.assemble import Parts
from clt_plugins.model.normalisation.fit import fit_to_batches
from clt_plugins.model.transcoder import CrossLayerTranscoder
from clt_plugins.testing.bench import Bench
from clt_plugins.testing.registry import check
from clt_plugins.testing.report import Nonconformance, complain, expect, location, one_line, same

TRANSCODERS: tuple[dict[str, Any], ...] = (
    {"activation": {"name": "jumprelu"}, "normalisation": {"name": "mean_std"}},
    {"activation": {"name": "relu"}, "normalisation": {"name": "mean_std"}},
    {"activation": {"name": "topk", "k": 8}, "normalisation": {"name": "mean_std"}},
    {"activation": {"name": "jumprelu"}},
    {"activation": {"name": "relu"}},
    {"activation": {"name": "topk", "k": 8}},
    # For formats of transcoders whose features write to their own layer only.
    {"activation": {"name": "jumprelu"}, "normalisation": {"name": "mean_std"}, "tying": {"name": "per_layer"}},
)

OTHERS: tuple[dict[str, dict[str, Any]], ...] = (
    {"tying": {"name": "untied", "skip": True}},
    {"tying": {"name": "per_source", "feature_offset": True}},
    {"tying": {"name": "per_source", "feature_scale": True, "skip": True}},
    {"tying": {"name": "per_target", "feature_offset": True, "feature_scale": True}},
    {"encoder": {"name": "plain", "pre_bias": True}},
    {"tying": {"name": "per_layer", "skip": True}},
)
"""Tried besides the defaults, where they are installed."""


def _trained(bench: Bench, tables: dict[str, Any]) -> Parts:
    """A transcoder after a step, with the statistics of a batch."""
    parts = bench.parts(**{name: table for name, table in tables.items() if name not in bench.tables})
    transcoder = parts.transcoder
    fit_to_batches(transcoder, [bench.batch(seed=5)])
    optimizer = torch.optim.Adam(transcoder.parameters(), lr=0.01)
    bench.step(parts, bench.batch())
    optimizer.step()
    transcoder.eval()
    return parts


def _exported(bench: Bench, others: dict[str, dict[str, Any]] | None = None) -> tuple[Parts, Any, Path]:
    """A transcoder that the format can hold, the exporter, and the folder it wrote.

    Args:
        others: choices instead of the defaults.
    """
    reasons = []
    for number, tables in enumerate(TRANSCODERS):
        try:
            parts = _trained(bench, tables | (others or {}))
        except Faults as error:
            reasons.append(str(error))
            continue
        exporter = bench.build(parts.context)
        spelled = (str(value) for table in (others or {}).values() for value in table.values())
        folder = bench.folder / "-".join([f"export{number}", *spelled])
        folder.mkdir()
        try:
            exporter.export(parts.transcoder, folder)
        except Faults as error:
            reasons.append(str(error))
            expect(
                not list(folder.iterdir()),
                "nothing written where it refuses",
                "files",
                "`export`: look before you write",
            )
            continue
        return parts, exporter, folder
    return complain("a transcoder that the format can hold", "; ".join(dict.fromkeys(reasons)), "`recipe` of the cases")


def _all_exported(bench: Bench) -> Iterator[tuple[Parts, Any, Path]]:
    """What `_exported` returns, for each tying and encoder that the format can hold."""
    yield _exported(bench)
    for others in OTHERS:
        if all(t not in bench.tables and one["name"] in bench.plugins.choices(t) for t, one in others.items()):
            try:
                exported = _exported(bench, others)
            except Nonconformance as error:
                if "nothing written" in str(error):
                    raise
                continue  # the format has no place for it, and says so
            yield exported


def _digests(folder: Path) -> dict[str, str]:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


@check("exports", trial=True, basic=True)
def export(bench: Bench) -> None:
    """`export` writes files that are not empty, with the same bytes each time, and does not change the transcoder."""
    parts, exporter, folder = _exported(bench)
    before = {name: x.clone() for name, x in parts.transcoder.tensors().items()}
    first = _digests(folder)
    empty = [name for name in first if not (folder / name).stat().st_size]
    expect(first, "files", "none", "`export`: write into `folder`")
    expect(not empty, "files with something in them", f"empty: {', '.join(empty)}", "`export`: closed and flushed?")
    again = bench.folder / "again"
    again.mkdir()
    exporter.export(parts.transcoder, again)
    second = _digests(again)
    changed = sorted(name for name in first.keys() | second.keys() if first.get(name) != second.get(name))
    expect(
        not changed, "the same bytes each time", f"{', '.join(changed)} differ", "`export`: times, sets, random names"
    )
    for name, x in parts.transcoder.tensors().items():
        same(x, before[name], f"{name} as it was before the export", "`export`: work on copies")


@check("exports")
def every_choice(bench: Bench) -> None:
    """Every transcoder is exported, or `Refused` before anything is written: each activation and normalisation of
    `TRANSCODERS`, each of `OTHERS`, an encoder without `W_enc`, and each type of weights."""
    subjects = [{"tying": {"name": "untied"}, **tables} for tables in TRANSCODERS]
    subjects += [{**tables, **others} for others in OTHERS for tables in TRANSCODERS[:3]]
    subjects.append({**TRANSCODERS[0], "encoder": {"name": "low_rank"}})  # no tensor is called `W_enc`
    subjects += [{**tables, "transcoder": {"dtype": "bfloat16"}} for tables in TRANSCODERS[:3]]
    for number, tables in enumerate(subjects):
        chosen = {table: tables[table] for table in ("activation", "tying", "encoder") if table in tables}
        if not all(one["name"] in bench.plugins.choices(table) for table, one in chosen.items()):
            continue
        try:
            parts = _trained(bench, tables)
        except Faults:
            continue  # the plugin's `clt_check` refuses the recipe itself
        folder = bench.folder / f"every{number}"
        folder.mkdir()
        what = ", ".join(f"{table} {one}" for table, one in tables.items() if table != "normalisation")
        try:
            bench.build(parts.context).export(parts.transcoder, folder)
        except Faults:
            written = sorted(file.name for file in folder.iterdir())
            look = "`export`: look before you write"
            expect(not written, f"nothing written where it refuses ({what})", ", ".join(written), look)
        except Exception as error:
            look = f"{location(error, bench.file)}: ask by `isinstance(..., Thresholded)` for what not every choice has"
            if "transcoder" in tables:
                look = f"{location(error, bench.file)}: numpy has no bfloat16, so widen tensors first: `x.float()`"
            complain(f"an export, or `Refused` with the remedy, for {what}", one_line(error), look)


@check("exports", needs=("every_choice",))
def every_tensor(bench: Bench) -> None:
    """Each tensor of the transcoder is in the files: when a tensor changes, the files change.

    Also a skip path, offsets and scales, unless the format refuses transcoders that have them.
    """
    for parts, exporter, folder in _all_exported(bench):
        _every_tensor(bench, parts, exporter, folder)


def _every_tensor(bench: Bench, parts: Parts, exporter: Any, folder: Path) -> None:
    whole = _digests(folder)
    for number, (name, tensor) in enumerate(parts.transcoder.tensors().items()):
        if name == "normaliser.target_variance":
            continue  # it compares errors; the outputs do not depend on it
        kept = tensor.clone()
        out = bench.folder / f"{folder.name}-changed{number}"
        out.mkdir()
        try:
            with torch.no_grad():
                tensor.mul_(1.5).add_(0.25)
            exporter.export(parts.transcoder, out)
        except Faults:
            continue  # the format cannot hold that, and says so
        finally:
            with torch.no_grad():
                tensor.copy_(kept)
        expect(
            _digests(out) != whole,
            f"{name} {list(tensor.shape)} in the files",
            "the files are the same when it changes: it is left out",
            "`export`: go through `transcoder.tensors()`",
        )


@check("exports", needs=("every_tensor", "recognises"))
def round_trip(bench: Bench) -> None:
    """`CrossLayerTranscoder.load` reads the folder back, and the outputs on raw activations are the same.

    Skipped where the format has no `reader`.
    """
    if bench.spec.reader is None:
        raise SkipTest("it has no `reader`")
    for parts, _, folder in _all_exported(bench):
        chosen = ", ".join(f"{table} {parts.transcoder.choices[table].name!r}" for table in ("tying", "encoder"))
        try:
            loaded = CrossLayerTranscoder.load(folder, plugins=bench.plugins, kernels="torch")
        except Faults as error:
            expected = f"to read back what was exported ({chosen})"
            complain(expected, str(error), "`recognises` and `read`, and the shapes that `export` writes")
        inputs = bench.batch(seed=9).inputs
        with torch.no_grad():
            expected, outputs = parts.transcoder(inputs), loaded(inputs)
        # float32 weights; folding statistics into them rounds once more.
        what = f"the outputs of the transcoder that was exported ({chosen})"
        same(outputs, expected, what, "what `export` folds into weights, and what it leaves out", 1e-4)


@check("exports")
def recognises(bench: Bench) -> None:
    """The reader recognises what was exported, and neither an empty folder, a language model's, nor a run's.

    Skipped where the format has no `reader`.
    """
    if bench.spec.reader is None:
        raise SkipTest("it has no `reader`")
    reader = bench.spec.reader()
    parts, _, folder = _exported(bench)
    look = "`recognises`: a quick look at file names"
    expect(reader.recognises(folder), "its own folder recognised", "not recognised", look)
    empty, model, own = (bench.folder / name for name in ("empty", "model", "own"))
    empty.mkdir()
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "gpt2"}')
    save_file({"wte.weight": torch.zeros(4, 4)}, model / "model.safetensors")
    parts.transcoder.save(own)
    for other, what in ((empty, "an empty folder"), (model, "a language model's folder"), (own, "a transcoder's own")):
        expect(not reader.recognises(other), f"{what} not recognised", "it says that it can read it", look)


@check("exports")
def before_training(bench: Bench) -> None:
    """`check` returns texts, the same ones on the device "meta", and complains only of what `export` refuses.

    Skipped where the exporter has no `check`.
    """
    for number, tables in enumerate(TRANSCODERS):
        chosen = {name: table for name, table in tables.items() if name not in bench.tables}
        try:
            built = [bench.parts(device=device, stirred=False, **chosen) for device in ("meta", "cpu")]
        except Faults:
            continue  # the plugin's `clt_check` refuses the recipe itself
        exporters = [bench.build(parts.context) for parts in built]
        if not isinstance(exporters[0], Checks):
            raise SkipTest("it has no `check`")
        look = "`check`: look at the choices and settings, not at values"
        without, said = (exporter.check(parts.transcoder) for exporter, parts in zip(exporters, built, strict=True))
        expect(
            isinstance(said, list) and all(isinstance(f, str) and re.match(r"[\w.\[\]]+: \S", f) for f in said),
            "a list of texts `setting: what is wrong: remedy`",
            repr(said),
            "`check`",
        )
        expect(without == said, f"the same of a transcoder on the device meta: {said}", f"{without}", look)
        if not said:
            continue
        folder = bench.folder / f"refused{number}"
        folder.mkdir()
        try:
            exporters[1].export(_trained(bench, tables).transcoder, folder)
        except Faults:
            continue
        complain("`export` to refuse what `check` complains of", f"it wrote, though {said}", "`check`, or `export`")
