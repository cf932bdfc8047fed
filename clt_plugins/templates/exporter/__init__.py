"""The exporter `example`: every tensor in one safetensors file, and the sizes in a JSON file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from attrs import frozen

from clt_plugins import Refused, Spec, hookimpl

if TYPE_CHECKING:
    from clt_plugins import Context, CrossLayerTranscoder


@frozen(kw_only=True)
class ExampleConfig:
    """`weights.safetensors` and `sizes.json`."""

    prefix: str = ""
    """Put before the name of each tensor."""


class Example:
    """An `Exporter`. It also `Checks`: what the format cannot hold is refused before training."""

    def __init__(self, config: ExampleConfig, context: Context):
        self.prefix = config.prefix

    def check(self, transcoder: CrossLayerTranscoder) -> list[str]:
        """Complaints, each `setting: what is wrong: remedy`. Look at settings only: values mean nothing yet."""
        if not transcoder.normaliser.fold().inputs.diagonal:
            return ['normalisation: the format holds a scale for each dimension, no matrix: use "mean_std"']
        return []

    def export(self, transcoder: CrossLayerTranscoder, folder: Path) -> None:
        """Write into an empty folder.

        Raises:
            Refused: the format cannot hold this transcoder.
        """
        from safetensors.torch import save_file

        for complaint in self.check(transcoder):
            setting, text = complaint.split(": ", 1)
            raise Refused(setting, text)
        # By the names in files: W_enc, b_enc, those of tying and activation, and the statistics under `normaliser.`.
        tensors = {self.prefix + name: x.cpu().contiguous() for name, x in transcoder.tensors().items()}
        save_file(tensors, folder / "weights.safetensors")
        sizes = {"layers": transcoder.n_layers, "d_model": transcoder.d_model, "features": transcoder.n_features}
        (folder / "sizes.json").write_text(json.dumps(sizes, indent=2) + "\n")


@hookimpl
def clt_exporters() -> list[Spec]:
    return [Spec("example", ExampleConfig, Example)]
