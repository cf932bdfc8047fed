"""What the folder of a run tells of it, for reports: recipe, versions, curves, evaluation. Each may be missing."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs

from clt_plugins.errors import Faults
from clt_plugins.files.untrusted import load_json, parse_json, read_small
from clt_plugins.finished.curves import Curve, read_curves
from clt_plugins.finished.provenance import Origin, made_from_other
from clt_plugins.toml import toml_text

STARTS = 100
"""Starts of a run that are kept, at most: the last ones."""


@attrs.frozen(kw_only=True)
class Facts:
    """What is known of the run that trained a transcoder. A transcoder of another tool has none of it."""

    name: str = ""
    """The recipe's `name`, else that of the folder."""
    folder: str = ""
    """The last part of the path of the run's folder; "" without a run."""
    recipe: Mapping[str, Any] = attrs.field(factory=dict)
    """The recipe with all defaults, as plain tables."""
    recipe_text: str = ""
    """The same as TOML."""
    versions: Mapping[str, Any] = attrs.field(factory=dict)
    """`versions.json`: of clt-plugins, Python, libraries and plugins; the command."""
    history: list[Mapping[str, Any]] = attrs.field(factory=list)
    """The lines of `history.jsonl`: one for each start of the run."""
    transcoder: Origin | None = None
    """The transcoder whose features are shown."""
    curves: dict[str, Curve] = attrs.field(factory=dict)
    """Metrics over training by name, thinned; from `metrics.jsonl`, so none without the logger `jsonl`."""
    evaluation: Mapping[str, Any] | None = None
    """`evaluation.json` of this transcoder, as the stage `evaluate` wrote it."""
    circuits: Mapping[str, Any] | None = None
    """`circuits.json` of this transcoder, as the stage `circuits` wrote it."""
    notes: list[str] = attrs.field(factory=list)
    """What could not be read, and why: a line each."""


def run_of(folder: Path) -> Path | None:
    """The run's folder that a folder lies in, at most four levels up; None if it lies in none."""
    return next((above for above in folder.absolute().parents[:4] if (above / "recipe.toml").is_file()), None)


def read_facts(run: Path | None, transcoder: Origin | None = None, evaluation: Path | None = None) -> Facts:
    """What a run's folder tells. Files that are missing or damaged are left out; a note says which were damaged.

    Raises:
        OSError: a file cannot be read, which is no damage.

    Args:
        run: the folder; None: only the transcoder is known.
        transcoder: whose features are reported on.
        evaluation: the folder of its `evaluation.json`; that of the run if not given.
    """
    if run is None:
        return Facts(name=transcoder.folder if transcoder is not None else "", transcoder=transcoder)
    run = run.resolve()
    notes: list[str] = []

    def attempt(file: Path, read: Callable[[Path], Any], otherwise: Any) -> Any:
        if not file.exists():
            return otherwise
        try:
            return read(file)
        except (Faults, ValueError) as error:
            notes.append(str(error))
            return otherwise

    recipe = attempt(run / "recipe.toml", _recipe, {})
    curves, unread = attempt(run / "metrics.jsonl", read_curves, ({}, []))
    notes += unread

    def result(folder: Path, name: str) -> Mapping[str, Any] | None:
        read = attempt(folder / name, load_json, None)
        if read is not None and transcoder is not None and made_from_other(folder, name, transcoder):
            notes.append(f"{folder.name}/{name} is of another transcoder than {transcoder.folder}, and left out")
            return None
        return read if isinstance(read, Mapping) else None

    return Facts(
        name=str(recipe.get("name") or run.name),
        folder=run.name,
        recipe=recipe,
        recipe_text=toml_text(recipe) if recipe else "",
        versions=_table(attempt(run / "versions.json", load_json, {})),
        history=attempt(run / "history.jsonl", _history, []),
        transcoder=transcoder,
        curves=curves,
        evaluation=result(evaluation or run / "evaluation", "evaluation.json"),
        circuits=result(run / "circuits", "circuits.json"),
        notes=notes,
    )


def _recipe(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(read_small(file).decode("utf-8"))
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{file.name}: not readable TOML: {error}") from error


def _history(file: Path) -> list[Mapping[str, Any]]:
    starts = []
    for line in read_small(file).splitlines()[-STARTS:]:
        try:
            starts.append(_table(parse_json(line)))
        except ValueError:
            continue  # the last line may not be finished
    return starts


def _table(data: Any) -> Mapping[str, Any]:
    return data if isinstance(data, Mapping) else {}
