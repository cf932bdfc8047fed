"""A transcoder's files: `transcoder.safetensors` (of several ranks a slice each) and `transcoder.json`; and reading
the files of other tools.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import attrs
import torch
from torch import nn

from clt_plugins.contract.spec import __version__
from clt_plugins.errors import Refused
from clt_plugins.files.folders import atomic_folder, check_folder, recover
from clt_plugins.files.hub.choose import fetch_place, final_transcoder
from clt_plugins.files.hub.names import hub_place
from clt_plugins.files.records import FORMAT, read_json, write_json
from clt_plugins.files.sliced import SlicedTensors, put_tensors
from clt_plugins.model.devices import bare_context, make_device, make_kernels, make_parallel
from clt_plugins.model.normalisation.stored import check_stored, detected_normalisation
from clt_plugins.model.parameters import check_finite, give_memory
from clt_plugins.recipe.structure import plain, structure_choice
from clt_plugins.registry.build import build
from clt_plugins.registry.plugins import load_plugins

if TYPE_CHECKING:
    from clt_plugins.contract.results.exporter import Imported, ReadsBack
    from clt_plugins.registry.plugins import Plugins

logger = logging.getLogger(__name__)

Make = Callable[..., Any]
"""The class of transcoder: this module stands below it, so it is handed in, and a transcoder is `Any` here."""

MOST_LAYERS = 10_000
"""Layers of a transcoder; language models have at most a few hundred."""

FILES = ("transcoder.json", "transcoder*.safetensors")
"""What the manifest of a transcoder's folder must list."""

LAZY_ABOVE = 2**31
"""Bytes of a decoder in another tool's folder above which it stays on disk."""


def _is_dtype(_: Any, attribute: attrs.Attribute[Any], value: str) -> None:
    if not isinstance(getattr(torch, value, None), torch.dtype):
        raise ValueError(f"'{attribute.name}' must be a type of torch, such as float32: {value!r}")


@attrs.frozen(kw_only=True)
class Description:
    """`transcoder.json`: what a transcoder is, besides its tensors."""

    format: int = FORMAT
    """The version of the transcoder's files."""
    clt_plugins: str = __version__
    """The version of clt-plugins that wrote them."""
    n_layers: int = attrs.field(alias="layers")
    """L: transcribed layers of the language model."""
    d_model: int
    """D: the width of the language model."""
    n_features: int = attrs.field(alias="features")
    """F: features per layer."""
    dtype: str = attrs.field(validator=_is_dtype)
    """The type of the parameters, as torch names it."""
    normalisation: str | dict[str, Any]
    """The normalisation: its name and its settings, as [normalisation] of a recipe."""
    model: dict[str, Any]
    """The language model, as [model] of a recipe; empty if it is not known."""
    encoder: dict[str, Any] = attrs.field(factory=lambda: {"name": "plain"})
    """The encoder: its name and its settings, as [encoder] of a recipe; absent in old files, which have a plain one."""
    activation: dict[str, Any]
    """The activation: its name and its settings, as [activation] of a recipe."""
    tying: dict[str, Any]
    """The tying: its name and its settings, as [tying] of a recipe."""
    step: int | None = None
    """Training steps done; None if it is not known."""
    tokens: int | None = None
    """Tokens trained on; None if it is not known."""


def put_transcoder(transcoder: Any, folder: Path) -> None:
    """Write a transcoder's two files into a folder that `atomic_folder` yields."""
    parallel = transcoder.context.parallel
    put_tensors(folder, "transcoder", transcoder.tensors(), transcoder.feature_axes(), parallel, transcoder.n_features)
    if parallel.rank > 0:
        return
    description = Description(
        layers=transcoder.n_layers,
        d_model=transcoder.d_model,
        features=transcoder.n_features,
        dtype=str(transcoder.context.dtype).removeprefix("torch."),
        normalisation=plain(transcoder.choices["normalisation"]),
        model=transcoder.model_described(),
        encoder=plain(transcoder.choices["encoder"]),
        activation=plain(transcoder.choices["activation"]),
        tying=plain(transcoder.choices["tying"]),
        step=transcoder.step,
        tokens=transcoder.tokens,
    )
    write_json(folder / "transcoder.json", description)


def save_transcoder(transcoder: Any, folder: Path) -> None:
    """Write a transcoder as a folder, atomically; of several ranks, each writes its slices."""
    with atomic_folder(folder, transcoder.context.parallel) as partial:
        put_transcoder(transcoder, partial)


def load_transcoder(
    make: Make, folder: Path, *, device: str, plugins: Plugins | None, kernels: str, lazy: bool | None
) -> Any:
    """See `CrossLayerTranscoder.load`."""
    plugins = plugins or load_plugins()
    device = str(make_device(device))
    if (place := hub_place(folder)) is not None:
        folder = final_transcoder(fetch_place(place))
    recover(folder)
    if not (folder / "transcoder.json").is_file():
        return _import(make, folder, device=device, plugins=plugins, kernels=kernels, lazy=lazy)
    # Checksums before anything is built: a truncated file must not become a transcoder that looks well.
    check_folder(folder, FILES)
    file = folder / "transcoder.json"
    stored = SlicedTensors.find(folder, "transcoder")
    description = read_json(file, Description)
    _check_sizes(description, folder)
    # It is built on "meta": no memory is filled with first values that the file replaces, nor taken before the file is
    # known to have the tensors.
    transcoder = _without_memory(make, description, file, device, plugins, kernels, stored)
    give_memory(transcoder, device)
    copy_tensors(stored, transcoder)
    check_stored(transcoder, folder / "transcoder.safetensors")
    return transcoder.eval()


def _check_sizes(description: Description, folder: Path) -> None:
    """Before anything is built, refuse sizes that no transcoder has: files may come from anybody.

    Raises:
        Refused: a size is not positive, or so large that all memory could not hold it.
    """
    n_layers, width, features = description.n_layers, description.d_model, description.n_features
    if min(n_layers, width, features) < 1 or n_layers > MOST_LAYERS or n_layers**2 * width * features >= 2**60:
        raise Refused(folder, f"no transcoder has {n_layers} layers, d_model {width} and {features} features")


def _without_memory(
    make: Make,
    description: Description,
    origin: Path,
    device: str,
    plugins: Plugins,
    kernels: str,
    stored: SlicedTensors | None = None,
) -> Any:
    """A transcoder as `transcoder.json` describes it, on the device "meta" if that is possible.

    Args:
        stored: the tensors that it must have.
    """
    context = bare_context(
        torch.device("meta"),
        dtype=getattr(torch, description.dtype),
        kernels=make_kernels(kernels, torch.device(device), plugins),
        parallel=make_parallel("single", plugins),
        n_layers=description.n_layers,
        d_model=description.d_model,
        n_features=description.n_features,
    )
    parts = {
        part: structure_choice(plugins, part, getattr(description, part), str(origin))
        for part in ("encoder", "activation", "tying", "normalisation")
    }
    transcoder = make(context, **parts)
    if stored is not None:
        check_tensors(stored, transcoder)
    if any(inner._non_persistent_buffers_set for inner in transcoder.modules()):
        # No file has what is computed when it is built.
        context = attrs.evolve(context, device=torch.device(device))
        transcoder = make(context, **parts)
    transcoder.described_model = dict(description.model)
    transcoder.step, transcoder.tokens = description.step, description.tokens
    return transcoder


def find_reader(folder: Path, plugins: Plugins) -> tuple[str, ReadsBack]:
    """The name and the reader of the first format that recognises a folder.

    Raises:
        Refused: none does.
        OSError: none does, and a file could not be read.
    """
    if not folder.exists():
        raise Refused(folder, "no such folder")
    unread: OSError | None = None
    for name, make in plugins.readers().items():
        try:
            reader: ReadsBack = make()
            if reader.recognises(folder):
                return name, reader
        except Exception as error:
            # One broken plugin must not stop the others from reading.
            logger.warning("%s: the reader of %r cannot look at it: %s", folder, name, error)
            unread = error if isinstance(error, OSError) else unread
    if unread is not None:
        raise unread
    raise Refused(folder, "not a transcoder: no transcoder.json in it, nor another tool's format")


def _import(make: Make, folder: Path, *, device: str, plugins: Plugins, kernels: str, lazy: bool | None) -> Any:
    """A transcoder from another tool's files.

    Raises:
        Refused: no exporter recognises them, or they are not complete; says what is there.
    """
    imported: Imported = find_reader(folder, plugins)[1].read(folder)
    description = Description(
        layers=imported.n_layers,
        d_model=imported.d_model,
        features=imported.n_features,
        dtype="float32",
        normalisation=dict(imported.normalisation or {"name": detected_normalisation(imported)}),
        model=dict(imported.model),
        activation=dict(imported.activation),
        tying=dict(imported.tying),
    )
    _check_sizes(description, folder)
    transcoder = _without_memory(make, description, folder, device, plugins, kernels)
    on_disk = imported.decoder is not None and (imported.decoder_bytes > LAZY_ABOVE if lazy is None else lazy)
    if on_disk:
        # The tying is replaced before the rest gets memory, so that the decoder gets none.
        transcoder.tying = cast(Any, nn.Module())
    # Statistics that the folder lacks stay as a new transcoder has them.
    first = build(transcoder.choices["normalisation"], attrs.evolve(transcoder.context, device=torch.device(device)))
    give_memory(transcoder, device)
    transcoder.normaliser = first
    transcoder.target_variance.fill_(1)
    if on_disk:
        assert imported.decoder is not None
        transcoder.tying = imported.decoder(transcoder.context)
    _fill(transcoder, imported, folder, skip=set(transcoder.tying.views()) if on_disk else set())
    check_stored(transcoder, folder)
    logger.info("%s: %s%s", folder, imported.kind, ", its decoder left on disk" if on_disk else "")
    return transcoder.eval()


@torch.no_grad()
def _fill(transcoder: Any, imported: Imported, folder: Path, skip: set[str]) -> None:
    """Copy another tool's tensors into a transcoder; those that it lacks keep their first values.

    Raises:
        Refused: a tensor is of another shape, or what was learned is not finite; names it.
    """
    for name, target in transcoder.tensors(skip).items():
        value = imported.tensor(name)
        if value is None:
            continue
        if value.shape != target.shape:
            raise Refused(folder, f"{name} is {list(value.shape)}, expected {list(target.shape)}")
        check_finite(transcoder, name, value, folder)
        target.copy_(value)


def check_tensors(stored: SlicedTensors, transcoder: Any) -> None:
    """Whether saved tensors are those of a transcoder, which may be on the device "meta".

    Raises:
        Refused: a tensor is missing, left over, or of another shape; names it.
    """
    targets, axes = transcoder.tensors(), transcoder.feature_axes()
    for name in targets.keys() ^ stored.shapes.keys():
        lacking = "lacks" if name in targets else "has an unknown"
        raise Refused(stored.folder, f"{lacking} tensor {name!r}")
    for name, target in targets.items():
        shape, axis = list(target.shape), axes[name]
        if axis is not None:
            shape[axis] = transcoder.n_features
        if shape != stored.shapes[name]:
            raise Refused(stored.folder, f"tensor {name!r} is {stored.shapes[name]}, expected {shape}")


@torch.no_grad()
def copy_tensors(stored: SlicedTensors, transcoder: Any) -> None:
    """Copy saved tensors, or this rank's part of them, into a transcoder's parameters and statistics.

    Raises:
        Refused: see `check_tensors`; or what was learned is not finite; names it.
    """
    check_tensors(stored, transcoder)
    axes = transcoder.feature_axes()
    for name, target in transcoder.tensors().items():
        axis = axes[name]
        value = stored.read(name) if axis is None else stored.read_part(name, axis, transcoder.own)
        check_finite(transcoder, name, value, stored.folder)
        target.copy_(value)
