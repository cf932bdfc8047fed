"""The stage `feature_norms`: decoder norm, encoder norm and density of each feature, as a table and a histogram."""

from __future__ import annotations

import csv
from importlib.util import find_spec
from typing import TYPE_CHECKING

from attrs import field, frozen, validators

from clt_plugins import FREE_ON_RESUME, Refused, Spec, StageInfo, hookimpl

if TYPE_CHECKING:
    from clt_plugins import Context, Job


@frozen(kw_only=True)
class FeatureNormsConfig:
    """`feature_norms.csv` with a line for each feature, and histograms of its columns, `feature_norms.png`."""

    tokens: int = field(default=4096, validator=validators.gt(0))
    """Held-out tokens for the density: the share of tokens at which a feature is active."""
    every: int | None = field(default=None, validator=validators.optional(validators.gt(0)), metadata=FREE_ON_RESUME)
    """Also every so many steps during training, on checkpoints."""


class FeatureNorms:
    """A `Stage`. Norms are Euclidean: the decoder's over all layers it writes to, both of normalised activations."""

    def __init__(self, config: FeatureNormsConfig, context: Context):
        self.tokens = config.tokens
        self.info = StageInfo(folder="feature_norms", needs="source", every=config.every)

    def check(self, job: Job) -> None:
        if find_spec("matplotlib") is None:
            raise Refused("stages.feature_norms", "needs matplotlib: pip install 'clt-model-ideas[plot]'")
        job.transcoder.encoder.expand(0, job.transcoder.tying)  # refused by encoders that have no matrix

    def run(self, job: Job) -> None:
        import torch
        from matplotlib.figure import Figure

        from clt_plugins import score

        encoder, tying = job.transcoder.encoder, job.transcoder.tying
        matrices = (encoder.expand(layer, tying)[0] for layer in range(job.transcoder.n_layers))
        norms = torch.stack([matrix.double().norm(dim=1) for matrix in matrices])
        density = score(job.transcoder, job.source.held_out(self.tokens)).density
        columns = {"decoder_norm": tying.norms(), "encoder_norm": norms, "density": density}
        columns = {name: x.double().cpu() for name, x in columns.items()}
        with (job.folder / "feature_norms.csv").open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow(["layer", "feature", *columns])
            for place in torch.cartesian_prod(*map(torch.arange, norms.shape)).tolist():
                table.writerow(place + [f"{x[*place].item():.9g}" for x in columns.values()])
        figure = Figure(figsize=(12, 4), layout="constrained")
        for axes, (name, x) in zip(figure.subplots(1, 3), columns.items(), strict=True):
            axes.hist(x.flatten().numpy(), bins=50)
            axes.set(xlabel=name.replace("_", " "), ylabel="features")
        figure.savefig(job.folder / "feature_norms.png", dpi=100)
        job.show(f"norms of {norms.numel()} features", {name: x.mean().item() for name, x in columns.items()})


@hookimpl
def clt_stages() -> list[Spec]:
    return [Spec("feature_norms", FeatureNormsConfig, FeatureNorms)]
