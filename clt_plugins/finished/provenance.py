"""What a result (a report, a conversion, an export) was made from: which transcoder, and with which settings.

Every result holds such a record. So reports of different transcoders can be told apart, and a resumed run keeps the
results that it would only make again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from clt_plugins.contract.types import recipe_key
from clt_plugins.errors import Faults
from clt_plugins.files.folders import MANIFEST, listed_files
from clt_plugins.files.hub.names import place_of_copy
from clt_plugins.files.records import from_data, read_json
from clt_plugins.files.untrusted import has_file, load_json, read_small
from clt_plugins.model.saved.description import FILES, Description
from clt_plugins.recipe.structure import plain

if TYPE_CHECKING:
    from clt_plugins.contract.recipe import Recipe
    from clt_plugins.contract.results.stage import StageInfo
    from clt_plugins.contract.spec import Selected


@attrs.frozen(kw_only=True)
class Origin:
    """A transcoder on disk, as results name it."""

    folder: str
    """The last part of its folder's path: `transcoder`, `converted`, `step_000400`."""
    sha256: str | None = None
    """A digest of its tensors, activation, tying and normalisation; a copy has the same. None for a folder of another
    tool that has no manifest.json."""
    step: int | None = None
    """Training steps done; None where the folder does not say."""
    tokens: int | None = None
    """Tokens trained on; None where the folder does not say."""
    hub: str | None = None
    """The folder on the hub that it was read from, with the commit; None if it was a folder of this disk."""
    converted_from: Origin | None = None
    """The transcoder before its conversion; None if it was not converted, or where the folder does not say."""


@attrs.frozen(kw_only=True)
class Provenance:
    """What a result was made from."""

    transcoder: Origin
    """The transcoder that was judged, converted or exported."""
    settings: dict[str, Any]
    """The settings that the result depends on, by the recipe's tables."""


def identify(folder: Path) -> Origin:
    """The transcoder in a folder.

    Raises:
        Faults: a file that describes it is damaged.
    """
    name = folder.resolve().name
    place = place_of_copy(folder)
    hub = None if place is None else str(place)
    if not has_file(folder / MANIFEST):
        return Origin(folder=name, hub=hub)
    ours = has_file(folder / "transcoder.json")
    files = listed_files(folder, FILES if ours else ())
    if not ours:  # an export
        return Origin(folder=name, sha256=_digest({path: file.sha256 for path, file in files.items()}), hub=hub)
    description = read_json(folder / "transcoder.json", Description)
    # Not the whole file: which version wrote it, and which step it is of, do not change what the transcoder computes.
    tensors = {
        path: one.sha256 for path, one in files.items() if path.startswith("transcoder") and path[-5:] != ".json"
    }
    sha256 = _digest([tensors, description.activation, description.tying, description.normalisation])
    # A conversion's own report, or the record of another stage that returned a transcoder.
    record = recorded(folder / "convert.json") or recorded(folder / "stage.json")
    return Origin(
        folder=name,
        sha256=sha256,
        step=description.step,
        tokens=description.tokens,
        hub=hub,
        converted_from=record.transcoder if record is not None else None,
    )


def recorded(file: Path) -> Provenance | None:
    """What the result in a JSON file was made from; None where the file is missing, or does not say.

    Raises:
        Refused: the file is not readable JSON, or its record is damaged.
    """
    if not has_file(file):
        return None
    data = load_json(file)
    record = data.get("made_from") if isinstance(data, Mapping) else None
    return None if record is None else from_data(Provenance, record, file)


def made_from_other(folder: Path, file: str, origin: Origin) -> bool:
    """Whether the result in a folder says that it was made from another transcoder."""
    try:
        record = recorded(folder / file)
    except Faults:
        return False  # reading the result will name the damage
    return record is not None and record.transcoder.sha256 != origin.sha256


def settings_of(selected: Selected, info: StageInfo, recipe: Recipe | None) -> dict[str, Any]:
    """A stage's settings, with those of the data that it reads; without those that change only when or where it runs
    (`FREE_ON_RESUME`)."""
    free = {recipe_key(a) for a in attrs.fields(type(selected.config)) if a.metadata.get("free_on_resume")}
    own = {key: value for key, value in plain(selected.config).items() if key not in free}
    if info.needs == "transcoder" or recipe is None:
        return {selected.name: own}
    data = {"source": plain(recipe.source), "seed": recipe.seed_of_data, "batch_tokens": recipe.train.batch_tokens}
    if recipe.transforms:
        data["transforms"] = plain(recipe.transforms)
    if recipe.model is not None:
        data["model"] = plain(recipe.model)
    return {selected.name: own, **data}


def results_read(root: Path, info: StageInfo) -> dict[str, Any]:
    """The other results that a stage reads, as a setting: a digest of each, None for one that is not there.

    Args:
        root: the folder that results go below.
    """
    if not info.reads and not info.may_read:
        return {}
    manifests = {folder: root / folder / MANIFEST for folder in (*info.reads, *info.may_read)}
    return {
        "reads": {
            folder: hashlib.sha256(read_small(file)).hexdigest() if has_file(file) else None
            for folder, file in manifests.items()
        }
    }


def _digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
