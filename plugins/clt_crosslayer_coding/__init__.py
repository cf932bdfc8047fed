"""The library crosslayer-coding (decode-clt): its stored activations as a source, its checkpoints as an exporter."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import field, frozen, validators

from clt_plugins import Spec, hookimpl

if TYPE_CHECKING:
    from clt_plugins import Context, Recipe


@frozen(kw_only=True)
class SourceConfig:
    """A folder of `chunk_N.h5` or `.hdf5` files with metadata.json, as crosslayer-coding writes it.

    Every row once per epoch, in a new order each time, chunks mixed. The files have no checksums: damage is noticed
    only where HDF5 notices it. Memory: two buffers of `buffer_tokens` rows, three batches, and two blocks.

    A block is what is read at a time: about 4 MiB, or, where the arrays are compressed, the rows of an HDF5 chunk (the
    library's default is 16,384), since HDF5 decompresses them together. Raise `buffer_tokens` above that number to mix
    rows of more chunks. With several data ranks a block in which two ranks' rows meet is read by both.
    """

    path: Path
    """The folder with metadata.json and index.bin."""
    held_out_tokens: int = field(default=16384, validator=validators.gt(0))
    """How many of the data set's last rows are kept for evaluation and never trained on. (The library shuffles rows
    within a chunk, so of the chunk they are cut from, other rows of the same documents may be trained on.)"""
    buffer_tokens: int = field(default=16384, validator=validators.gt(0))
    """Rows that are shuffled together, on each rank; at least a batch."""


def _has_one_slot(_: Any, attribute: Any, value: str | None) -> None:
    if value is not None and value.count("{}") != 1:
        raise ValueError(f"'{attribute.name}' must hold one {{}} where the layer's number goes: {value!r}")


@frozen(kw_only=True)
class ExportConfig:
    """A checkpoint of the library crosslayer-coding, as SAEDashboard reads it; `CrossLayerTranscoder.load` reads it
    back.

    It is `model.safetensors`, `cfg.json` and, if activations are normalised, `norm_stats.json`.
    """

    model_name: str | None = None
    """The language model's name; that of the recipe if not given (of a local folder its last part)."""
    tl_input_template: str | None = field(default=None, validator=_has_one_slot)
    """The TransformerLens hook of the inputs, such as "blocks.{}.mlp.hook_in"; derived from the recipe's model.inputs
    if not given."""


def build_source(config: SourceConfig, context: Context) -> Any:
    from clt_crosslayer_coding.source import build

    return build(config, context)


def build_exporter(config: ExportConfig, context: Context | None = None) -> Any:
    from clt_crosslayer_coding.write import CrosslayerCoding

    return CrosslayerCoding(config)


@hookimpl
def clt_sources() -> list[Spec]:
    return [Spec("crosslayer-coding", SourceConfig, build_source)]


@hookimpl
def clt_exporters() -> list[Spec]:
    return [
        Spec(
            "crosslayer-coding",
            ExportConfig,
            build_exporter,
            aliases=("crosslayer_coding",),
            reader=lambda: build_exporter(ExportConfig()),
        )
    ]


@hookimpl
def clt_check(recipe: Recipe) -> list[str]:
    """The limits of the checkpoint that the recipe alone shows; the exporter's `check` sees the rest."""
    from clt_crosslayer_coding import limits

    faults, activation = [], recipe.activation
    for path, chosen in recipe.selected():
        if path.startswith("stages[") and chosen.choice.slot == "activation":
            activation = chosen  # a conversion: what comes after it gets another activation
        elif isinstance(chosen.config, ExportConfig):
            faults += [f"{path}: {fault}" for fault in limits.of_recipe(chosen.config, recipe, activation)]
    return faults
