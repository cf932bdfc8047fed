"""Transcoders of SAELens: a folder for each layer with `cfg.json` and `sae_weights.safetensors`.

| tensor | shape |
| --- | --- |
| `W_enc`, `b_enc` | [D, F], [F] |
| `W_dec`, `b_dec` | [F, D], [D] |
| `threshold`, of the architectures "jumprelu_..." | [F] |
| `W_skip`, of "..._skip_transcoder", applied as W_skip x | [D, D] |

They are read as transcoders whose features write to their own layer only.

Shapes: D d_model, F features per layer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clt_exporters.reading.files import Weights, described, text
from clt_exporters.reading.layers import Layers
from clt_exporters.reading.on_disk import Rows
from clt_plugins import Imported, Refused

ARCHITECTURES = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"


def is_saelens(folder: Path) -> bool:
    """Whether a folder, or folders in it, have SAELens's files."""
    return folder.is_dir() and bool(_folders(folder))


def read_saelens(folder: Path) -> Imported:
    """Read the folder of one transcoder, or folders of several in it.

    Raises:
        Refused: a file or tensor is missing, damaged or of another shape; or it is no transcoder.
    """
    paths = _folders(folder)
    configs = [described(path, CONFIG) for path in paths]
    architecture = str(configs[0][1].get("architecture"))
    for path, said in configs:
        _check(path, said, architecture)
    jumprelu, skip = (word in architecture for word in ("jumprelu", "skip"))
    files = [Weights(path / WEIGHTS) for path in paths]
    D, F = files[0].sizes("W_enc", "d_model, features")
    shapes = {"W_enc": [D, F], "b_enc": [F], "W_dec": [F, D], "b_dec": [D]}
    shapes |= {"threshold": [F]} if jumprelu else {}
    shapes |= {"W_skip": [D, D]} if skip else {}
    for file in files:
        for name, shape in shapes.items():
            file.get(name, shape)
    numbers, hooks, language_model = _hooks([said for _, said in configs])
    order = sorted(range(len(files)), key=lambda i: numbers[i]) if numbers else list(range(len(files)))
    files = [files[i] for i in order]
    layers = Layers(
        folder=folder,
        n_layers=len(files),
        d_model=D,
        n_features=F,
        W_enc=lambda i: files[i].get("W_enc", [D, F]).T,
        b_enc=lambda i: files[i].get("b_enc", [F]),
        b_dec=lambda i: files[i].get("b_dec", [D]),
        threshold=(lambda i: files[i].get("threshold", [F])) if jumprelu else None,
        W_skip=(lambda i: files[i].get("W_skip", [D, D]).T) if skip else None,
        rows=lambda i: Rows([files[i].get("W_dec", [F, D])[:, None]]),
        own_layer=True,
    )
    model: dict[str, Any] = {} if language_model is None else {"path": language_model}
    if numbers and sorted(numbers) != list(range(len(files))):
        model["layers"] = sorted(numbers)
    activation = {"name": "jumprelu"} if jumprelu else {"name": "relu"}
    size = sum(file.path.stat().st_size for file in files)
    return layers.imported(f"SAELens {architecture}", activation, model, size, hooks=hooks)


def _folders(folder: Path) -> list[Path]:
    """The folders of the layers, or the folder itself."""
    return [path for path in (folder, *sorted(folder.iterdir())) if (path / WEIGHTS).is_file() and _is_saelens(path)]


def _is_saelens(path: Path) -> bool:
    try:
        return "architecture" in described(path, CONFIG)[1]
    except Refused:
        return False


def _check(path: Path, said: Mapping[str, Any], architecture: Any) -> None:
    """Refuse what a transcoder of ours does not compute."""
    if said.get("architecture") not in ARCHITECTURES:
        raise Refused(path, f"a {said.get('architecture')!r}, not one of {', '.join(ARCHITECTURES)}")
    if said["architecture"] != architecture:
        raise Refused(path, f"a {said['architecture']}, and the first layer's is a {architecture}")
    for key, neutral in (("normalize_activations", "none"), ("reshape_activations", "none")):
        if said.get(key, neutral) not in (neutral, None):
            raise Refused(path, f"{key} is {said[key]!r}: only {neutral!r} can be loaded; fold it into the weights")
    if said.get("apply_b_dec_to_input"):
        raise Refused(path, "apply_b_dec_to_input is true, which SAELens itself refuses for a transcoder")


def _hooks(configs: list[Mapping[str, Any]]) -> tuple[list[int], dict[str, str | None], str | None]:
    """The layers' numbers in the language model (empty if they are not known), the hooks within a block, and the
    language model's name."""
    numbers: list[int] = []
    inner: dict[str, set[str]] = {"input": set(), "output": set()}
    names: set[str | None] = set()
    for said in configs:
        metadata = said.get("metadata")
        about: Mapping[str, Any] = {**said, **metadata} if isinstance(metadata, Mapping) else said
        names.add(text(about.get("model_name")))
        for side, key in (("input", "hook_name"), ("output", "hook_name_out")):
            match = re.fullmatch(r"blocks\.(\d{1,4})\.(.+)", str(about.get(key)))
            if match is not None:
                inner[side].add(match[2])
            if side == "input" and match is not None:
                numbers.append(int(match[1]))
    known = len(set(numbers)) == len(configs)
    hooks = {side: found.pop() if len(found) == 1 else None for side, found in inner.items()}
    return (numbers if known else []), hooks, names.pop() if len(names) == 1 else None
