"""The exporter `example`: every tensor in one safetensors file, and the sizes in JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import frozen

from clt_plugins import Spec, hookimpl

if TYPE_CHECKING:
    from clt_plugins import Context, CrossLayerTranscoder


@frozen(kw_only=True)
class ExampleConfig:
    """`weights.safetensors` and `sizes.json`."""

    prefix: str = ""
    """Put before the name of each tensor."""


class Example:
    def __init__(self, config: ExampleConfig, context: Context):
        self.prefix = config.prefix

    def export(self, transcoder: CrossLayerTranscoder, folder: Any) -> None:
        """Write into an empty folder. A transcoder that the format cannot hold is a `ValueError` with the remedy."""
        from safetensors.torch import save_file

        # By names of files: W_enc, b_enc, the tying's, the activation's, and the statistics under `normaliser.`.
        tensors = {self.prefix + name: x.cpu().contiguous() for name, x in transcoder.tensors().items()}
        save_file(tensors, Path(folder) / "weights.safetensors")
        sizes = {name: getattr(transcoder, name) for name in ("layers", "d_model", "features")}
        (Path(folder) / "sizes.json").write_text(json.dumps(sizes, indent=2) + "\n")


@hookimpl
def clt_exporters() -> list[Spec]:
    return [Spec("example", ExampleConfig, Example)]
