"""The stages after training: convert, evaluate, export. Each writes a folder atomically."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import attrs
import torch

from clt_plugins.contract.abilities import Checks
from clt_plugins.errors import Fault, Faults
from clt_plugins.files.folders import atomic_folder
from clt_plugins.files.records import write_json
from clt_plugins.finished import convert as conversion
from clt_plugins.finished import evaluate as evaluation
from clt_plugins.model.saved import put_transcoder
from clt_plugins.recipe.read import recipe_data
from clt_plugins.registry.build import build

if TYPE_CHECKING:
    from clt_plugins.contract.context import Context
    from clt_plugins.contract.interfaces import Exporter, Source
    from clt_plugins.contract.recipe import ConvertConfig, EvaluateConfig, Recipe
    from clt_plugins.contract.spec import Selected
    from clt_plugins.finished.convert import Conversion
    from clt_plugins.finished.evaluate import Evaluation
    from clt_plugins.model.assemble import Parts
    from clt_plugins.model.transcoder import CrossLayerTranscoder
    from clt_plugins.registry.plugins import Plugins

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


def check_stages(parts: Parts, recipe: Recipe, plugins: Plugins) -> None:
    """Before training, refuse settings that would make training or a later stage fail.

    Args:
        parts: as built; the transcoder may be on the device "meta".

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
        config, thresholds = recipe.convert, torch.ones(transcoder.W_enc.shape[:2])
        collect(lambda: conversion.check_convertible(transcoder))
        collect(lambda: config.targets(transcoder.n_layers, transcoder.n_features))
        exported = collect(lambda: conversion.with_thresholds(transcoder, thresholds, config.activation, plugins))
    if recipe.evaluate is not None:
        evaluate_config = recipe.evaluate
        collect(lambda: evaluation.model_tokens(source, evaluate_config))
    # Training needs held-out text too. A plan alone (device "meta") does not ask for it, since a source may have to
    # run a language model to answer.
    if recipe.convert is not None or recipe.evaluate is not None or not transcoder.W_enc.is_meta:
        collect(lambda: evaluation.check_held_out(source))
    for index, chosen in enumerate(recipe.exports):
        exporter: Exporter | None = collect(lambda chosen=chosen: build(chosen, parts.context))  # type: ignore[misc]
        if exported is not None and isinstance(exporter, Checks):
            faults += [Fault(("exports", index), text) for text in exporter.check(exported)]
    if faults:
        raise Faults(faults)


def convert_stage(
    transcoder: CrossLayerTranscoder, source: Source, config: ConvertConfig, plugins: Plugins, folder: Path
) -> tuple[CrossLayerTranscoder, Conversion]:
    """Convert into a folder: the transcoder, and the report as `convert.json`.

    Raises:
        Refused: it cannot be converted.
        Unreachable: a layer cannot reach its target; nothing is written.
    """
    converted, report = conversion.convert(transcoder, source, config, plugins)
    with atomic_folder(folder) as partial:
        put_transcoder(converted, partial)
        write_json(partial / "convert.json", report)
    return converted, report


def evaluate_stage(
    transcoder: CrossLayerTranscoder,
    source: Source,
    config: EvaluateConfig,
    *,
    recipe: Recipe,
    context: Context,
    folder: Path | None,
) -> Evaluation:
    """Evaluate, and write the report as `evaluation.json` and by the recipe's loggers.

    Args:
        folder: where they are written; nothing is written if it is None.

    Raises:
        Refused: the transcoder is for another model, or there is no held-out text.
    """
    report = evaluation.evaluate(transcoder, source, config)
    if folder is None:
        return report
    with atomic_folder(folder) as partial:
        write_json(partial / "evaluation.json", report)
        for chosen in recipe.loggers:
            metrics_logger = build(chosen, attrs.evolve(context, folder=partial))
            metrics_logger.start(recipe_data(recipe), 0)
            try:
                metrics_logger.log(recipe.train.steps, evaluation.as_metrics(report))
            finally:
                metrics_logger.close("finished")
    return report


def export_stage(transcoder: CrossLayerTranscoder, chosen: Selected, folder: Path) -> None:
    """Export into a folder.

    Raises:
        Refused: the format cannot hold the transcoder; nothing is written.
    """
    with atomic_folder(folder) as partial:
        build(chosen, transcoder.context).export(transcoder, partial)


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

    Returns:
        The transcoder; the converted one if the recipe has [convert].
    """
    for stage in ("converted", "evaluation", "exports"):
        # A resumed run may have ended before: what is there then belongs to a transcoder with fewer steps.
        shutil.rmtree(folder / stage, ignore_errors=True)
    if recipe.convert is not None:
        transcoder, converted = convert_stage(transcoder, source, recipe.convert, plugins, folder / "converted")
        logger.info("%s", conversion.as_table(converted))
    if recipe.evaluate is not None:
        report = evaluate_stage(
            transcoder, source, recipe.evaluate, recipe=recipe, context=context, folder=folder / "evaluation"
        )
        logger.info("%s", evaluation.as_table(report))
    for name, chosen in zip(_folder_names(recipe.exports), recipe.exports, strict=True):
        export_stage(transcoder, chosen, folder / "exports" / name)
        logger.info("exported to %s", folder / "exports" / name)
    return transcoder


def _folder_names(exports: Sequence[Selected]) -> list[str]:
    """A folder name for each export: its format, with a number from the second of the same format on."""
    names: list[str] = []
    for chosen in exports:
        earlier = sum(name.split(".")[0] == chosen.name for name in names)
        names.append(f"{chosen.name}.{earlier + 1}" if earlier else chosen.name)
    return names
