"""What is known of a transcoder that is pushed: from its folder, and from the folder of its run where it is in one."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from clt_hub.public import Neutral
from clt_plugins import Fault, Faults, HubPlace, Refused, check_folder, for_others, has_file, identify, load_json

if TYPE_CHECKING:
    from clt_hub import PushConfig
    from clt_plugins import Recipe

logger = logging.getLogger(__name__)

OWN = ("transcoder.json", "transcoder*.safetensors", "convert.json", "stage.json")
"""The files of a transcoder; a checkpoint has more, which only training needs."""


@attrs.frozen(kw_only=True, eq=False)
class Facts:
    """A transcoder, and all that its card says."""

    config: PushConfig
    place: HubPlace
    folder: Path
    """Its files."""
    kept_as: str
    """Their folder in the repository: "transcoder" or "converted"; empty for another tool's files."""
    described: dict[str, Any]
    """`transcoder.json`; of another tool's folder the same tables as far as they are known."""
    base_model: str | None
    """The language model's id on the hub, or its name."""
    neutral: Neutral
    """Takes paths of this disk out of what is pushed."""
    recipe: dict[str, Any] | None = None
    """The recipe's tables, without paths of this disk; None if it is not known."""
    versions: dict[str, Any] | None = None
    evaluation: dict[str, Any] | None = None
    """The content of `evaluation.json`, of this transcoder."""
    circuits: dict[str, Any] | None = None
    """The content of `circuits.json`: scores of attribution graphs."""
    conversion: dict[str, Any] | None = None
    """The content of `convert.json`."""
    exports: list[Path] = attrs.field(factory=list)
    """Folders of its exports."""

    @property
    def datasets(self) -> list[str]:
        """Ids of data sets on the hub."""
        if self.config.datasets is not None:
            return self.config.datasets
        text = self.text
        return [text] if text is not None and re.fullmatch(r"[\w.-]+/[\w.-]+", text) else []

    @property
    def per_layer(self) -> bool:
        """Whether features write to their own layer only."""
        return (self.described.get("tying") or {}).get("name") == "per_layer"

    @property
    def text(self) -> str | None:
        """The text that was read, as the recipe names it; None if the source reads none."""
        text = (self.recipe or {}).get("source", {}).get("text")
        return text if isinstance(text, str) else None

    def circuit_tracer(self) -> str | None:
        """The folder in the repository that circuit-tracer loads; None if there is none."""
        for export in self.exports:
            if (export / "config.yaml").is_file() and (export / "W_enc_0.safetensors").is_file():
                return self.place.path(f"exports/{export.name}")
        if not self.kept_as and (self.folder / "W_enc_0.safetensors").is_file():
            return self.place.folder
        return None


def gather(
    config: PushConfig,
    folder: Path,
    run: Path | None,
    recipe: Recipe | None,
    sizes: Mapping[str, Any] | None = None,
    exact: str | None = None,
) -> Facts:
    """Everything that a push needs to know, checked.

    Args:
        folder: the transcoder's files.
        run: the folder of its run.
        recipe: of its run.
        sizes: what another tool's folder amounts to; None for a folder of our own.
        exact: the transcoder's digest; that of the folder if it is None.

    Raises:
        Faults: something names a path of this disk, and what others are to read is not said; a file that the user
            names is missing; or one is damaged.
    """
    if has_file(folder / "manifest.json"):
        check_folder(folder)  # a damaged file, pushed, would be everybody's
    tables, texts = neutral_recipe(config, recipe)
    neutral = Neutral(texts)
    described = dict(sizes) if sizes is not None else load_json(folder / "transcoder.json")
    described["model"] = _model(described.get("model") or {}, config, neutral)
    digest = exact or identify(folder).sha256
    results = _Results(run, digest)
    name = described["model"].get("path")
    return Facts(
        config=config,
        place=HubPlace.parse(config.repository),
        folder=folder,
        kept_as="" if sizes is not None else "converted" if has_file(folder / "convert.json") else "transcoder",
        described=described,
        base_model=config.base_model or name,
        neutral=neutral,
        recipe=tables,
        versions=_versions(run),
        evaluation=results.best("evaluation.json"),
        circuits=results.best("circuits.json"),
        conversion=load_json(folder / "convert.json") if has_file(folder / "convert.json") else None,
        exports=results.exports(config.exports),
    )


def neutral_recipe(config: PushConfig, recipe: Recipe | None) -> tuple[dict[str, Any] | None, dict[str, str]]:
    """The recipe's tables for others, without pushes; and what was changed in them.

    Raises:
        Faults: see `for_others`; says which setting of `push` helps.
    """
    if recipe is None:
        return None, {}
    others = [one for one in recipe.stages if type(one.config) is not type(config)]
    kept = attrs.evolve(recipe, stages=others)  # type: ignore[call-arg] # a table that is made of the slots
    instead = dict(config.instead)
    if config.base_model is not None and recipe.model is not None:
        instead.setdefault("model.path", config.base_model)
    try:
        return for_others(kept, instead)
    except Faults as error:
        raise Faults(attrs.evolve(one, text=f"{one.text}: {_remedy(one)}") for one in error.faults) from error


def _remedy(fault: Fault) -> str:
    if fault.path == "model.path":
        return "set base_model (--base-model ID)"
    return f"set instead (--instead {fault.path}=TEXT)"


def _model(model: Mapping[str, Any], config: PushConfig, neutral: Neutral) -> dict[str, Any]:
    """The language model, as transcoder.json names it, for others."""
    tables: dict[str, Any] = neutral(dict(model))
    for key in ("path", "tokenizer"):
        name = tables.get(key)
        if not isinstance(name, str) or not (Path(name).is_absolute() or Path(name).exists()):
            continue
        said = config.instead.get(f"model.{key}", config.base_model if key == "path" else None)
        if said is None:
            remedy = "base_model (--base-model)" if key == "path" else f"instead (--instead model.{key}=ID)"
            raise Refused(f"model.{key}", f"{name!r} is a path of this disk: say what others are to read: {remedy}")
        neutral.texts[name] = said
        tables[key] = said
    return tables


def _versions(run: Path | None) -> dict[str, Any] | None:
    """What it was trained with; the command line is left out, since it has paths of this disk."""
    if run is None or not has_file(run / "versions.json"):
        return None
    return {key: value for key, value in load_json(run / "versions.json").items() if key != "command"}


class _Results:
    """What a run's folder holds that was made from one transcoder."""

    def __init__(self, run: Path | None, digest: str | None):
        self.run, self.digest = run, digest

    def best(self, name: str) -> dict[str, Any] | None:
        """The result of that file's name; of several, the one that read most."""
        if self.run is None:
            return None
        files = [path for inside in ("*", "*/*", "stages/*/*") for path in sorted(self.run.glob(f"{inside}/{name}"))]
        reports = [data for path in files if (data := self._of_it(path)) is not None]
        return max(reports, key=_read, default=None)

    def exports(self, names: Iterable[str] | None) -> list[Path]:
        """The folders of exports.

        Raises:
            Faults: one that was asked for is not there, or of another transcoder; or one is damaged.
        """
        if self.run is None:
            if names:
                raise Refused("exports", "there is no run with a folder exports/: push the run's folder")
            return []
        there = {path.name: path for path in sorted((self.run / "exports").glob("*")) if path.is_dir()}
        for path in there.values():
            if any(os.path.lexists(path / name) for name in ("export.json", "manifest.json")):
                check_folder(path)  # without its record it would be left out, as one of another transcoder
        right = {name: path for name, path in there.items() if self._of_it(path / "export.json") is not None}
        if names is None:
            for name in there.keys() - right.keys():
                logger.warning("exports/%s is left out: it was not made from this transcoder", name)
            return list(right.values())
        for name in names:
            if name not in right:
                why = "was not made from this transcoder: export it again" if name in there else "is not there"
                raise Refused(f"exports/{name}", why)
        return [right[name] for name in names]

    def _of_it(self, path: Path) -> dict[str, Any] | None:
        """A result, if it was made from the transcoder."""
        if self.digest is None or not path.is_file():
            return None
        data = load_json(path)
        origin = ((data.get("made_from") or {}).get("transcoder") or {}) if isinstance(data, Mapping) else {}
        return data if origin.get("sha256") == self.digest else None


def _read(result: Mapping[str, Any]) -> tuple[bool, int]:
    graphs = result.get("graphs")
    return result.get("model") is not None, result.get("tokens") or (len(graphs) if isinstance(graphs, list) else 0)
