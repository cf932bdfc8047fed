"""What a folder of a transcoder holds: of a run, of one alone, or of another tool. No decoder is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor

from clt_plugins.contract.results.inspector import Inspected
from clt_plugins.errors import Faults
from clt_plugins.files.folders import check_folder
from clt_plugins.files.records import as_data, defined, read_json
from clt_plugins.files.sliced import SlicedTensors
from clt_plugins.files.tensors import read_tensor, tensor_bytes, tensor_shapes
from clt_plugins.files.untrusted import has_file, printable
from clt_plugins.finished.find import find_trained
from clt_plugins.model.saved.description import FILES, Description
from clt_plugins.model.saved.other_tools import find_reader
from clt_plugins.model.transcoder import CrossLayerTranscoder
from clt_plugins.toml import inline

if TYPE_CHECKING:
    from clt_plugins.registry.plugins import Plugins


@attrs.frozen(kw_only=True)
class Thresholds:
    """Of all features."""

    least: float | None
    median: float | None
    largest: float | None


@attrs.frozen(kw_only=True)
class TranscoderFolder:
    """What `inspect` shows of a transcoder; its JSON has the same names."""

    path: str
    """The transcoder's folder."""
    format: str
    """Whose format it is: "clt-plugins", or the name of another tool's."""
    kind: str
    """What it is, for people."""
    n_layers: int = attrs.field(alias="layers")
    d_model: int
    n_features: int = attrs.field(alias="features")
    """Per layer."""
    encoder: dict[str, Any]
    activation: dict[str, Any]
    tying: dict[str, Any]
    normalisation: dict[str, Any] | None
    """None where it follows from the numbers in the files."""
    model: dict[str, Any]
    """The language model, as far as it is known; under `hooks` TransformerLens's names of what is read and written."""
    thresholds: Thresholds | None
    """None where the activation has none."""
    dtypes: dict[str, int]
    """Bytes of tensors by their type, as safetensors names it."""
    files: int
    bytes: int
    """Of all files."""
    step: int | None = None
    tokens: int | None = None
    """Trained on."""
    verified: str
    """What was checked."""
    faults: list[str]
    """What is damaged, a line each."""


def inspect_transcoder(path: Path, plugins: Plugins, *, verify: bool) -> Inspected:
    """Describe a transcoder.

    Args:
        path: a run's folder, a transcoder's, or another tool's.
        verify: of a folder of ours, compare all checksums; of another tool's, read every number.

    Raises:
        Faults: it is no transcoder, or its files are not complete.
    """
    folder = find_trained(path, plugins).folder
    report = (_own if has_file(folder / "transcoder.json") else _other)(folder, plugins, verify)
    data: Mapping[str, Any] = as_data(report)
    return Inspected(text=as_text(report), data=data, faults=report.faults)


def _own(folder: Path, plugins: Plugins, verify: bool) -> TranscoderFolder:
    """A folder that this package wrote."""
    said = read_json(folder / "transcoder.json", Description)
    faults: list[str] = []
    if verify:
        try:
            check_folder(folder, FILES)
        except (Faults, OSError) as error:
            faults += str(error).splitlines()
    tensors = SlicedTensors.find(folder, "transcoder")
    log_threshold = tensors.read("log_threshold") if "log_threshold" in tensors.shapes else None
    normalisation = said.normalisation
    return TranscoderFolder(
        path=str(folder),
        format="clt-plugins",
        kind=f"transcoder of clt-plugins {said.clt_plugins}",
        layers=said.n_layers,
        d_model=said.d_model,
        features=said.n_features,
        encoder=said.encoder,
        activation=said.activation,
        tying=said.tying,
        normalisation={"name": normalisation} if isinstance(normalisation, str) else normalisation,
        model=said.model,
        thresholds=_thresholds(log_threshold),
        step=said.step,
        tokens=said.tokens,
        verified="all checksums" if verify else "shapes",
        faults=faults,
        **_sizes(folder),
    )


def _other(folder: Path, plugins: Plugins, verify: bool) -> TranscoderFolder:
    """A folder of another tool."""
    name, reader = find_reader(folder, plugins)
    imported = reader.read(folder)
    has_thresholds = imported.activation.get("name") == "jumprelu"
    return TranscoderFolder(
        path=str(folder),
        format=name,
        kind=imported.kind,
        layers=imported.n_layers,
        d_model=imported.d_model,
        features=imported.n_features,
        encoder={"name": "plain"},
        activation=dict(imported.activation),
        tying=dict(imported.tying),
        normalisation=None if imported.normalisation is None else dict(imported.normalisation),
        model=dict(imported.model),
        thresholds=_thresholds(imported.tensor("log_threshold")) if has_thresholds else None,
        verified="all numbers" if verify else "shapes",
        faults=_not_finite(folder, plugins) if verify else [],
        **_sizes(folder),
    )


def _thresholds(log_threshold: Tensor | None) -> Thresholds | None:
    if log_threshold is None:
        return None
    values = log_threshold.float().exp().flatten()
    least, median, largest = defined(torch.stack([values.min(), values.median(), values.max()]))
    return Thresholds(least=least, median=median, largest=largest)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _sizes(folder: Path) -> dict[str, Any]:
    """Number and bytes of the files, and bytes of tensors by type."""
    files = _files(folder)
    dtypes: dict[str, int] = {}
    for path in files:
        if path.suffix == ".safetensors":
            for dtype, size in tensor_bytes(path).items():
                dtypes[dtype] = dtypes.get(dtype, 0) + size
    return {"files": len(files), "bytes": sum(path.stat().st_size for path in files), "dtypes": dtypes}


def _not_finite(folder: Path, plugins: Plugins) -> list[str]:
    """The tensors that hold numbers which are not finite."""
    faults = []
    files = [path for path in _files(folder) if path.suffix == ".safetensors"]
    if not files:  # numbers in another kind of file, which only the format's reader knows
        try:
            CrossLayerTranscoder.load(folder, device="cpu", plugins=plugins)
        except Faults as error:
            faults += str(error).splitlines()
    for path in files:
        for name in tensor_shapes(path):
            value = read_tensor(path, name)
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                faults.append(f"{path}: tensor {name!r} holds numbers that are not finite")
    return faults


def as_text(report: TranscoderFolder) -> str:
    """The report for people."""
    hooks = report.model.get("hooks")
    named = hooks if isinstance(hooks, Mapping) else {}
    sites = {side: report.model.get(f"{side}s") or named.get(side) or "what the MLPs " + verb for side, verb in SIDES}
    dtypes = ", ".join(f"{dtype} {size / 1e6:,.1f} MB" for dtype, size in sorted(report.dtypes.items()))
    lines = [
        f"{report.path}: {report.kind}",
        f"  format {report.format}; {report.n_layers} layers x {report.n_features:,} features, "
        f"d_model {report.d_model}",
        f"  activation {inline(report.activation)}",
        f"  tying {inline(report.tying)}, encoder {inline(report.encoder)}",
        f"  normalisation {'by the numbers in its files' if (n := report.normalisation) is None else inline(n)}",
        f"  model {report.model.get('path', 'not named')}: reads {sites['input']}, writes {sites['output']}",
        f"  {report.bytes / 1e6:,.1f} MB in {report.files} files; tensors: {dtypes or 'none in safetensors'}",
    ]
    if report.thresholds is not None:
        least, median, largest = (
            "not a number" if value is None else f"{value:.4g}"
            for value in (report.thresholds.least, report.thresholds.median, report.thresholds.largest)
        )
        lines.insert(3, f"  thresholds from {least} to {largest}, median {median}")
    if report.step is not None:
        tokens = "" if report.tokens is None else f", {report.tokens:,} tokens"
        lines.append(f"  trained for {report.step:,} steps{tokens}")
    lines += [f"! {fault}" for fault in report.faults]
    count = len(report.faults)
    lines.append(f"checked: {report.verified}; {count or 'no'} {'faults' if count > 1 else 'fault'}")
    return "\n".join(map(printable, lines))


SIDES = (("input", "read"), ("output", "add to the residual stream"))
