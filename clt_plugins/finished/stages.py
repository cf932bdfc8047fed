"""The stages after training: convert, evaluate, export. Each writes a folder atomically.

A stage whose result is there, made from the same transcoder with the same settings, is not done again. Otherwise the
old result stays until the new one is complete.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import attrs
import torch

from clt_plugins.contract.abilities import Checks
from clt_plugins.errors import Fault, Faults, Stopped
from clt_plugins.files.records import FORMAT, write_json
from clt_plugins.finished import convert as conversion
from clt_plugins.finished import evaluate as evaluation
from clt_plugins.finished.convert import Conversion
from clt_plugins.finished.evaluate import Evaluation
from clt_plugins.finished.provenance import Provenance, identify, settings_of
from clt_plugins.finished.results import ReportLoggers, kept, raise_first, replacing
from clt_plugins.model.saved import put_transcoder
from clt_plugins.recipe.structure import plain
from clt_plugins.registry.build import build

if TYPE_CHECKING:
    from clt_plugins.contract.context import Context
    from clt_plugins.contract.reading.source import Source
    from clt_plugins.contract.recipe import ConvertConfig, EvaluateConfig, Recipe
    from clt_plugins.contract.results.exporter import Exporter
    from clt_plugins.contract.spec import Selected
    from clt_plugins.model.assemble import Parts
    from clt_plugins.model.transcoder import CrossLayerTranscoder
    from clt_plugins.registry.plugins import Plugins

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


@attrs.frozen(kw_only=True)
class Export:
    """What an export was made from; the content of `export.json` beside the exporter's files."""

    format: int = FORMAT
    """The version of this file."""
    made_from: Provenance
    """The transcoder, and the settings of the export."""


def check_stages(parts: Parts, recipe: Recipe, plugins: Plugins, *, data: bool = True) -> None:
    """Before training, refuse settings that would make training or a later stage fail.

    Args:
        parts: as built; the transcoder may be on the device "meta".
        data: whether the source is there, to be asked for held-out rows.

    Raises:
        Faults: all of them.
    """
    transcoder, source = parts.transcoder, parts.source
    faults: list[Fault] = []

    def collect(check: Callable[[], Result]) -> Result | None:
        try:
            return check()
        except Faults as error:
            faults.extend(error.faults)
            return None

    # What exporters will get: the converted transcoder, with any thresholds; None if it cannot be converted.
    exported: CrossLayerTranscoder | None = transcoder
    if recipe.convert is not None:
        config, thresholds = recipe.convert, torch.ones(transcoder.shape)
        collect(lambda: conversion.check_convertible(transcoder))
        collect(lambda: config.targets(transcoder.n_layers, transcoder.n_features))
        exported = collect(lambda: conversion.with_thresholds(transcoder, thresholds, config.activation, plugins))
    if recipe.evaluate is not None and data:
        evaluate_config = recipe.evaluate
        collect(lambda: evaluation.model_tokens(source, evaluate_config))
    # Training needs held-out text too. A plan alone (device "meta") does not ask for it, since a source may have to
    # run a language model to answer.
    if data and (recipe.convert is not None or recipe.evaluate is not None or transcoder.device.type != "meta"):
        collect(lambda: evaluation.check_held_out(source))
    for index, chosen in enumerate(recipe.exports):
        exporter: Exporter | None = collect(lambda chosen=chosen: build(chosen, parts.context))  # type: ignore[misc]
        if exported is not None and isinstance(exporter, Checks):
            faults += [Fault(("exports", index), text) for text in exporter.check(exported)]
    if faults:
        raise Faults(faults)


def convert_stage(
    transcoder: CrossLayerTranscoder,
    source: Source,
    config: ConvertConfig,
    plugins: Plugins,
    *,
    folder: Path,
    made_from: Provenance,
    show: Callable[[Conversion], None],
) -> CrossLayerTranscoder:
    """Convert into a folder: the transcoder, and the report as `convert.json`.

    Args:
        show: called with the report after it was saved, and also when it cannot be saved.

    Raises:
        Refused: it cannot be converted.
        Unreachable: a layer cannot reach its target; nothing is written.
    """
    report: Conversion | None = None
    try:
        with replacing(folder) as partial:
            converted, report = conversion.convert(transcoder, source, config, plugins)
            report = attrs.evolve(report, made_from=made_from)
            put_transcoder(converted, partial)
            write_json(partial / "convert.json", report)
    finally:
        if report is not None:  # a full disk does not take the numbers away
            show(report)
    return converted


def evaluate_stage(
    transcoder: CrossLayerTranscoder,
    source: Source,
    config: EvaluateConfig,
    *,
    recipe: Recipe,
    context: Context,
    folder: Path | None,
    made_from: Provenance,
    show: Callable[[Evaluation], None],
) -> list[Exception]:
    """Evaluate, and write the report as `evaluation.json` and by the recipe's loggers.

    Args:
        folder: where they are written; nothing is written if it is None.
        show: called with the report after it was saved, and also when it cannot be saved.

    Returns:
        What went wrong in loggers: the report is complete without them. The caller raises it at the end.

    Raises:
        Refused: the transcoder is for another model, there is no held-out text, or a logger refuses its settings.
    """
    report: Evaluation | None = None
    loggers = ReportLoggers()
    try:
        if folder is None:
            report = attrs.evolve(evaluation.evaluate(transcoder, source, config), made_from=made_from)
            return []
        with replacing(folder, report=("evaluation.json", made_from.transcoder)) as partial:
            loggers.start(recipe, attrs.evolve(context, folder=partial))
            status = "failed"
            try:
                report = attrs.evolve(evaluation.evaluate(transcoder, source, config), made_from=made_from)
                write_json(partial / "evaluation.json", report)
                step = made_from.transcoder.step
                loggers.log(recipe.train.steps if step is None else step, evaluation.as_metrics(report))
                status = "finished"
            except (KeyboardInterrupt, Stopped):
                status = "interrupted"
                raise
            finally:
                loggers.close(status)
    finally:
        if report is not None:
            show(report)
    return loggers.failures


def export_stage(transcoder: CrossLayerTranscoder, chosen: Selected, folder: Path, made_from: Provenance) -> None:
    """Export into a folder; `export.json` in it says what was exported.

    Raises:
        Refused: the format cannot hold the transcoder; nothing is written.
    """
    with replacing(folder) as partial:
        build(chosen, transcoder.context).export(transcoder, partial)
        write_json(partial / "export.json", Export(made_from=made_from))


def after_training(
    transcoder: CrossLayerTranscoder,
    source: Source,
    *,
    recipe: Recipe,
    context: Context,
    plugins: Plugins,
    folder: Path,
) -> CrossLayerTranscoder:
    """The stages that a recipe asks for; they write `converted/`, `evaluation/` and `exports/NAME/` in `folder`.

    Results of other stages, and what users put there, stay.

    Args:
        transcoder: the one in `folder/transcoder`.

    Returns:
        The transcoder; the converted one if the recipe has [convert].
    """
    origin = identify(folder / "transcoder")
    device = str(transcoder.device)
    if recipe.convert is not None:
        target = folder / "converted"
        made_from = Provenance(transcoder=origin, settings=settings_of(recipe, "convert", recipe.convert))
        if kept(target, "convert.json", Conversion, made_from) is not None:
            _say_kept(target)
            transcoder = type(transcoder).load(target, device=device, plugins=plugins)
        else:
            transcoder = convert_stage(
                transcoder,
                source,
                recipe.convert,
                plugins,
                folder=target,
                made_from=made_from,
                show=lambda report: logger.info("%s", conversion.as_table(report)),
            )
        origin = identify(target)
    failures: list[Exception] = []
    if recipe.evaluate is not None:
        target = folder / "evaluation"
        made_from = Provenance(transcoder=origin, settings=settings_of(recipe, "evaluate", recipe.evaluate))
        if kept(target, "evaluation.json", Evaluation, made_from) is not None:
            _say_kept(target)
        else:
            failures += evaluate_stage(
                transcoder,
                source,
                recipe.evaluate,
                recipe=recipe,
                context=context,
                folder=target,
                made_from=made_from,
                show=lambda report: logger.info("%s", evaluation.as_table(report)),
            )
    for name, chosen in zip(_folder_names(recipe.exports), recipe.exports, strict=True):
        target = folder / "exports" / name
        made_from = Provenance(transcoder=origin, settings={"exports": plain(chosen)})
        if kept(target, "export.json", Export, made_from) is not None:
            _say_kept(target)
        else:
            export_stage(transcoder, chosen, target, made_from)
            logger.info("exported to %s", target)
    raise_first(failures)
    return transcoder


def _say_kept(folder: Path) -> None:
    logger.info("%s: kept, it was made from this transcoder with these settings", folder)


def _folder_names(exports: Sequence[Selected]) -> list[str]:
    """A folder name for each export: its format, with a number from the second of the same format on."""
    names: list[str] = []
    for chosen in exports:
        earlier = sum(name.split(".")[0] == chosen.name for name in names)
        names.append(f"{chosen.name}.{earlier + 1}" if earlier else chosen.name)
    return names
