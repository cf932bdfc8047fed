"""What comes after training, each as a folder that is whole or absent: convert, evaluate, export."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import click
import torch

from clt_plugins.contract.abilities import Checks
from clt_plugins.errors import Fault, Faults
from clt_plugins.files.folders import whole_folder, write_json
from clt_plugins.finished import convert as conversion
from clt_plugins.finished import evaluate as evaluation
from clt_plugins.model.saved import put_transcoder
from clt_plugins.recipe.read import recipe_data
from clt_plugins.registry.build import build

if TYPE_CHECKING:
    from clt_plugins.contract.context import Context
    from clt_plugins.contract.interfaces import Source
    from clt_plugins.contract.recipe import ConvertConfig, EvaluateConfig, Recipe
    from clt_plugins.contract.spec import Selected
    from clt_plugins.model.assemble import Parts
    from clt_plugins.model.transcoder import CrossLayerTranscoder
    from clt_plugins.registry.plugins import Plugins


def check_stages(parts: Parts, recipe: Recipe, plugins: Plugins) -> None:
    """Refuse, before training, what it and the stages after it would stumble over; each says so itself.

    Args:
        parts: as built; the transcoder may be on the device "meta".

    Raises:
        Faults: all of them.
    """
    transcoder, source = parts.transcoder, parts.source
    faults: list[Fault] = []

    def attempt(check: Callable[[], Any]) -> Any:
        try:
            return check()
        except Faults as error:
            faults.extend(error.faults)

    # As it will be: the thresholds are still to be found.
    becomes: CrossLayerTranscoder | None = transcoder
    if recipe.convert is not None:
        config, ones = recipe.convert, torch.ones(transcoder.W_enc.shape[:2])
        attempt(lambda: conversion.check_ranks(transcoder))
        attempt(lambda: config.targets(transcoder.n_layers, transcoder.n_features))
        becomes = attempt(lambda: conversion.with_thresholds(transcoder, ones, config.activation, plugins))
    if recipe.evaluate is not None:
        judged = recipe.evaluate
        attempt(lambda: evaluation.model_tokens(source, judged))
    # Training needs some text apart, too; but it is not worth running a language model for the plan of it alone.
    if recipe.convert is not None or recipe.evaluate is not None or not transcoder.W_enc.is_meta:
        attempt(lambda: evaluation.check_held_out(source))
    for index, chosen in enumerate(recipe.exports):
        exporter = attempt(partial(build, chosen, parts.context))
        if exporter is None:
            continue
        if isinstance(exporter, Checks) and becomes is not None:
            faults += [Fault(("exports", index), text) for text in exporter.check(becomes)]
    if faults:
        raise Faults(faults)


def convert_stage(
    transcoder: CrossLayerTranscoder, source: Source, config: ConvertConfig, plugins: Plugins, folder: Path
) -> tuple[CrossLayerTranscoder, dict[str, Any]]:
    """Convert into a folder: the transcoder, and `convert.json` with the report.

    Raises:
        Stopped: a layer cannot reach its target; the folder is as it was.
    """
    converted, report = conversion.convert(transcoder, source, config, plugins)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with whole_folder(folder) as partial:
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
) -> dict[str, Any]:
    """Evaluate; into a folder, if given: `evaluation.json`, and what the recipe's loggers write."""
    report = evaluation.evaluate(transcoder, source, config)
    if folder is None:
        return report
    with whole_folder(folder) as partial:
        write_json(partial / "evaluation.json", evaluation.as_json(report))
        inside = attrs.evolve(context, folder=partial)
        for chosen in recipe.loggers:
            logger = build(chosen, inside)
            logger.start(recipe_data(recipe), 0)
            try:
                logger.log(recipe.train.steps, evaluation.as_metrics(report))
            finally:
                logger.close("finished")
    return report


def export_stage(transcoder: CrossLayerTranscoder, chosen: Selected, folder: Path) -> None:
    """Export into a folder.

    Raises:
        ValueError: the format cannot hold the transcoder; nothing is written.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with whole_folder(folder) as partial:
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
    """The stages that a recipe asks for, in `folder`: `converted/`, `evaluation/`, `exports/NAME/`.

    Returns:
        The transcoder, converted if so asked.
    """
    for stale in ("converted", "evaluation", "exports"):
        # Of a run that ended here before and went on: it belongs to another transcoder.
        shutil.rmtree(folder / stale, ignore_errors=True)
    if recipe.convert is not None:
        transcoder, report = convert_stage(transcoder, source, recipe.convert, plugins, folder / "converted")
        click.echo(conversion.as_table(report), err=True)
    if recipe.evaluate is not None:
        place = folder / "evaluation"
        found = evaluate_stage(transcoder, source, recipe.evaluate, recipe=recipe, context=context, folder=place)
        click.echo(evaluation.as_table(found), err=True)
    for name, chosen in zip(_names(recipe.exports), recipe.exports, strict=True):
        export_stage(transcoder, chosen, folder / "exports" / name)
        click.echo(f"exported to {folder / 'exports' / name}", err=True)
    return transcoder


def _names(exports: Sequence[Selected]) -> list[str]:
    """A folder for each export: its format, with a number where one comes again."""
    names: list[str] = []
    for chosen in exports:
        again = sum(each.split(".")[0] == chosen.name for each in names)
        names.append(f"{chosen.name}.{again + 1}" if again else chosen.name)
    return names


def to_json(data: Any) -> str:
    return json.dumps(data, indent=2, allow_nan=False)
