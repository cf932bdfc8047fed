"""`config.yaml` of circuit-tracer: which language model, where features read and write, which activation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clt_exporters.hooks import input_hook, model_name, output_hook
from clt_exporters.reading.files import described, text
from clt_plugins import Refused

NAMES = "config.yaml", "config.json"
"""The files that may describe a folder; some trainers write JSON."""


def described_set(kind: str, config: Any, model: Mapping[str, Any]) -> dict[str, Any]:
    """What `config.yaml` says.

    Args:
        kind: "cross_layer_transcoder" or "transcoder_set".
        config: the exporter's.
        model: the language model, as in `[model]`.
    """
    said = {
        "model_kind": kind,
        "model_name": model_name(config.model_name, model),
        "feature_input_hook": input_hook(config.input_hook, model),
        "feature_output_hook": output_hook(config.output_hook, model),
    }
    return said if config.scan is None else {**said, "scan": config.scan}


def read_description(folder: Path, kind: str) -> tuple[dict[str, Any], dict[str, str | None]]:
    """The language model, as in `[model]`, and the hooks that the folder's description names.

    Raises:
        Refused: the description is not readable, or of another kind.
    """
    path, said = described(folder, *NAMES)
    stated = said.get("model_kind", kind)
    if stated != kind:
        raise Refused(path, f"a {stated!r}, not a {kind}")
    name = text(said.get("model_name"))
    hooks = {"input": text(said.get("feature_input_hook")), "output": text(said.get("feature_output_hook"))}
    return ({} if name is None else {"path": name}), hooks
