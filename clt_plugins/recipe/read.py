"""A recipe: a TOML file that says what to train, read into typed, checked, complete settings."""

from __future__ import annotations

import copy
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import attrs
from attrs import Attribute, field, frozen, validators

from clt_plugins.contract.recipe import ConvertConfig, EvaluateConfig, ModelConfig, TrainConfig, TranscoderConfig
from clt_plugins.contract.spec import Selected, Spec
from clt_plugins.recipe.overrides import Overrides
from clt_plugins.recipe.structure import Fault, Faults, converter
from clt_plugins.toml import document

if TYPE_CHECKING:
    from clt_plugins.registry.plugins import Plugins

__all__ = [
    "ConvertConfig",
    "EvaluateConfig",
    "ModelConfig",
    "Recipe",
    "RecipeError",
    "TrainConfig",
    "TranscoderConfig",
    "as_data",
    "as_toml",
    "plain",
    "read_recipe",
]


class RecipeError(ValueError):
    """What is wrong with a recipe: all of it, a line per fault."""

    def __init__(self, faults: Sequence[str]):
        self.faults = list(faults)
        super().__init__("\n".join(self.faults))


def _as_folder(_: Any, attribute: Attribute[Any], value: str) -> None:
    if not value.replace("-", "a").replace(".", "a").replace("_", "a").isalnum() or value.startswith("."):
        raise ValueError(f"'{attribute.name}' must be letters, digits, '-', '_' and '.', to name a folder: {value!r}")


@frozen(kw_only=True)
class Recipe:
    """What to train, on what, and how; `clt_plugins plugins` describes every table.

    A field's `default` in its metadata is written as a recipe writes it: a choice by its name.
    """

    name: str = field(validator=_as_folder, metadata={"example": "my-transcoder"})
    """What the run is called; its folder is below `runs/<name>/`."""
    seed: int = field(default=0, validator=[validators.ge(0), validators.lt(2**63)])
    """Every random number comes from it."""
    requires: list[str] = field(factory=list)
    """Distributions that must be installed, such as `clt-gated>=1.0`."""
    model: ModelConfig | None = None
    """The language model."""
    source: Annotated[Selected, "source"] = field(metadata={"example": "stream"})
    """Where activations come from."""
    transcoder: TranscoderConfig
    """The transcoder's size and arithmetic."""
    activation: Annotated[Selected, "activation"] = field(metadata={"example": "batchtopk"})
    """What turns pre-activations into features."""
    tying: Annotated[Selected, "tying"] = field(metadata={"default": "untied"})
    """The decoder: which weights carry a feature to which layer."""
    losses: list[Annotated[Selected, "losses"]] = field(metadata={"default": ["mse", "auxk"]})
    """Terms of the training loss; they are added up."""
    train: TrainConfig
    """The training loop."""
    loggers: list[Annotated[Selected, "loggers"]] = field(metadata={"default": ["tensorboard", "jsonl", "console"]})
    """Sinks of metrics."""
    parallel: Annotated[Selected, "parallel"] = field(metadata={"default": "single"})
    """How features and tokens are split over processes."""
    kernels: Annotated[Selected, "kernels"] = field(metadata={"default": "auto"})
    """Sparse products; "auto" takes the fastest for the device."""
    convert: ConvertConfig | None = field(default=None, metadata={"example": None})
    """After training, thresholds in place of a selection by rank; not converted without this table."""
    evaluate: EvaluateConfig | None = field(default=None, metadata={"example": None})
    """After that, the transcoder judged on held-out text and inside the language model; not without this table."""
    exports: list[Annotated[Selected, "exports"]] = field(metadata={"default": []})
    """Formats of other tools that the transcoder is written in at the end."""


@frozen(kw_only=True)
class _AutoConfig:
    """By device."""


def _no_build(config: Any, device: Any) -> Any:
    raise AssertionError('kernels "auto" are chosen when the device is known')


AUTO_KERNELS = Spec("auto", _AutoConfig, _no_build)
"""Stands in a recipe for kernels to be chosen by device."""


def read_recipe(
    recipe: str | Path | Mapping[str, Any], overrides: Sequence[str] = (), plugins: Plugins | None = None
) -> Recipe:
    """Read a recipe and check all that can be checked without building anything.

    Args:
        recipe: a file, or its tables as a dictionary (where None means "not given").
        overrides: `--set` flags, `KEY=VALUE` each.
        plugins: what choices there are; freshly loaded if not given.

    Raises:
        RecipeError: with every fault, a line each.
        PluginError: a plugin's own check is broken.
    """
    if plugins is None:
        from clt_plugins.registry.plugins import load

        plugins = load()
    if isinstance(recipe, Mapping):
        source, folder, table = "recipe", None, copy.deepcopy(dict(recipe))
    else:
        source, folder, table = str(recipe), Path(recipe).parent, _read_toml(Path(recipe))
    for a in attrs.fields(Recipe):
        if "default" in a.metadata and table.get(a.name) is None:
            table[a.name] = copy.deepcopy(a.metadata["default"])
    flags = Overrides(overrides)
    faults = flags.apply(table)

    def pick(slot: str, name: str) -> Spec:
        assert plugins is not None
        return AUTO_KERNELS if (slot, name) == ("kernels", "auto") else plugins.pick(slot, name).spec

    typed = None
    found: list[Fault] = []
    try:
        typed = converter(pick, folder).structure(table, Recipe)
    except Faults as error:
        found = error.faults
    found += _missing_distributions(table.get("requires"))
    faults += [flags.line(fault, source) for fault in found]
    if typed is not None and not faults:
        complaints = [*_across_tables(typed, plugins), *plugins.checks(typed)]
        faults = [flags.line(_from_text(text), source) for text in complaints]
    if typed is None or faults:
        raise RecipeError(faults)
    return typed


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_bytes().decode("utf-8"))
    except FileNotFoundError:
        raise RecipeError([f"{path}: no such file"]) from None
    except OSError as error:
        raise RecipeError([f"{path}: cannot be read: {error.strerror}"]) from error
    except UnicodeDecodeError as error:
        raise RecipeError([f"{path}: not UTF-8 text: {error.reason} at byte {error.start}"]) from error
    except tomllib.TOMLDecodeError as error:
        raise RecipeError([f"{path}: {error}"]) from error


def _across_tables(recipe: Recipe, plugins: Plugins) -> Iterator[str]:
    """Complaints about the engine's own tables that no single field shows."""
    if recipe.convert is None:
        return
    try:
        plugins.pick("activation", recipe.convert.activation)
    except ValueError as error:
        yield f"convert.activation: {error}"
    given = recipe.convert.l0 if isinstance(recipe.convert.l0, list) else [recipe.convert.l0]
    layers = recipe.model.layers if recipe.model is not None else None
    try:  # without a [model] that says how many layers there are, their number is seen when the source is built
        recipe.convert.targets(len(layers or given), recipe.transcoder.features)
    except ValueError as error:
        yield str(error)


def _from_text(complaint: str) -> Fault:
    """A plugin's complaint "activation.k: too large" with its path told apart."""
    path, colon, text = complaint.partition(": ")
    if not colon or not path.replace(".", "").replace("_", "").replace("[", "").replace("]", "").isalnum():
        return Fault((), complaint)
    parts = path.replace("[", ".").replace("]", "").split(".")
    return Fault(tuple(int(part) if part.isdecimal() else part for part in parts), text)


def _missing_distributions(requires: Any) -> list[Fault]:
    """What of `requires` is not installed, or not in that version."""
    if not requires or not isinstance(requires, list):
        return []
    from importlib.metadata import PackageNotFoundError, version

    from packaging.requirements import InvalidRequirement, Requirement

    faults = []
    for index, text in enumerate(requires):
        if not isinstance(text, str):
            continue  # the type's own fault is reported
        try:
            wanted = Requirement(text)
            installed = version(wanted.name)
        except InvalidRequirement:
            faults.append(Fault(("requires", index), f'expected a requirement such as "clt-gated>=1.0", got "{text}"'))
        except PackageNotFoundError:
            faults.append(Fault(("requires", index), f"{text} is not installed: pip install '{text}'"))
        else:
            if not wanted.specifier.contains(installed, prereleases=True):
                faults.append(
                    Fault(("requires", index), f"{text} is needed, but {wanted.name} {installed} is installed")
                )
    return faults


def plain(value: Any) -> Any:
    """Typed settings as plain TOML data: tables, lists and scalars, defaults included, None left out."""
    if isinstance(value, Selected):
        return {"name": value.name, **plain(value.config)}
    if attrs.has(type(value)):
        items = ((a.alias, getattr(value, a.name)) for a in attrs.fields(type(value)) if a.init)
        return {key: plain(item) for key, item in items if item is not None}
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def as_data(recipe: Recipe) -> dict[str, Any]:
    """The resolved recipe as plain data; `read_recipe` makes the same recipe of it."""
    return plain(recipe)


def as_toml(recipe: Recipe) -> str:
    """The resolved recipe as TOML, every default written out; `read_recipe` makes the same recipe of it."""
    return document(as_data(recipe))
